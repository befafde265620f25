"""Pages of the documentation whose commands and snippets run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import prints, run_page

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_on_provenance(tmp_path: Path) -> None:
    assert run_page(DOCS / "provenance.md", tmp_path) == 6


def test_a_page_that_tells_something_else_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('INTACT', 7)\n```\n\n```text\nINTACT 9\n```\n")
    assert run_page(page, tmp_path) == 1
    page.write_text(re.sub("INTACT 9", "CHANGED 9", page.read_text()))
    with pytest.raises(AssertionError):
        run_page(page, tmp_path)


def test_an_ellipsis_stands_for_anything_and_a_hash_for_a_hash() -> None:
    assert prints("a\n...\nz 0123456789abcdef\n", "a\nb\nc\nz  fedcba9876543210")
    assert not prints("a\n...\nz", "b\nc\nz")
    assert not prints("a\n...", "z a b")
    assert not prints("a deadbeefdeadbeef", "a somethingelse")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (DOCS / target).exists(), target
