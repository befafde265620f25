"""Running what a page of the documentation shows, and comparing what it prints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ELLIPSIS = "..."


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return (language, text) of the code blocks of a page."""
    found = _BLOCK.findall(page.read_text())
    return [(language, text) for language, text in found if not languages or language in languages]


def masked(text: str) -> str:
    """Hide what depends on the machine: measured numbers, hashes, the layout that follows them."""
    text = re.sub(r"\b(?=[a-f]*\d)[0-9a-f]{16}\b", "#", text)
    text = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text)
    return re.sub(r"\s+", " ", text.replace("─", "")).strip()


def prints(told: str, printed: str) -> bool:
    """Say whether a page tells what is printed; "..." stands for anything."""
    parts = [re.escape(masked(part)) for part in told.split(_ELLIPSIS)]
    return re.fullmatch(".*".join(parts), masked(printed)) is not None


def run_page(page: Path, folder: Path) -> int:
    """Run all blocks of a page in order, in a folder, and return how many things were compared.

    A text block is what the Python block before it prints; a console block holds commands, each
    with what it prints, and "# exit code N" behind one that does not end with 0.
    """
    scope: dict[str, object] = {}
    printed, compared = "", 0
    for language, text in blocks(page, "python", "text", "console"):
        if language == "python":
            out = io.StringIO()
            with contextlib.chdir(folder), contextlib.redirect_stdout(out):
                exec(compile(text, page.name, "exec"), scope)
            printed = out.getvalue()
        elif language == "text":
            assert prints(text, printed), printed
            compared += 1
        else:
            compared += _run_commands(text, folder)
    return compared


def _run_commands(text: str, folder: Path) -> int:
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    for command, told in found:
        wanted = re.search(r"# exit code (\d+)$", command)
        words = shlex.split(command, comments=True)
        assert words[0] == "dropsurgery"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == (int(wanted[1]) if wanted else 0), done.stderr
        assert prints(told, done.stdout), f"{command}\n{done.stdout}"
    return len(found)
