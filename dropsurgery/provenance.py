"""A verdict that travels with the file: what was verified, against what, and by what.

`record` writes a record into the ONNX file's own `metadata_props`; `check_record` reads it back and
says whether the file is still the one that the verdict is about. The record holds

- `file`: SHA-256 of the graph, of the weights in the file, and of each file with external data;
- `reference`: SHA-256 of the weights of the network that the file was compared with;
- `verdict`: the comparison, with its numbers and its inputs;
- `passes`, `seeds`, `versions`: how the file was made and checked.

Each section is hashed together with the hash before it, so that an edit of any of them is found
and named, and so is a section put in from another record. The hashes of the file are taken from
its bytes, less the record, and not from what a library makes of them: what is not in the record
is, byte for byte, what was verified.

This finds accidents and edits. It does not stop somebody who changes the file and writes a new
record: for that, sign the record with a key that they do not have (`key=`, HMAC-SHA256).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError, OnnxFileError
from dropsurgery.onnx_reader import OnnxFile, read_onnx, regular_content
from dropsurgery.onnx_writer import check_target
from dropsurgery.report import environment, finite
from dropsurgery.tables import printable, render
from dropsurgery.verify import Verdict

RECORD, LINE = "dropsurgery.record", "dropsurgery.verdict"
_FORMAT = 1
_SECTIONS = ("file", "reference", "verdict", "passes", "seeds", "versions")
_SHORTEST_KEY = 16
_VERSIONS = ("python", "dropsurgery", "torch", "onnx", "onnxruntime")
# Fields of onnx.ModelProto and onnx.GraphProto.
_GRAPH, _METADATA = 7, 14
_WEIGHTS = (5, 15)


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        part: what: a section of the record, "graph", "weights", a file with external data.
        ok: whether it is as it was recorded.
        detail: in words.
    """

    part: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class RecordCheck:
    """Whether a file is the one that its record is about. True in a condition if it is.

    Attributes:
        path: the file.
        findings: what was checked, in order.
        record: the sections of the record as they were read: `file`, `reference`, `verdict`,
            `passes`, `seeds`, `versions`.
    """

    path: str
    findings: tuple[Finding, ...]
    record: Mapping[str, Any]

    def __bool__(self) -> bool:
        return self.intact

    @property
    def intact(self) -> bool:
        """Whether nothing was changed."""
        return all(finding.ok for finding in self.findings)

    @property
    def equivalent(self) -> bool:
        """Whether nothing was changed and the recorded verdict is that the file is equivalent."""
        return self.intact and self.record["verdict"].get("ok") is True

    @property
    def conclusion(self) -> str:
        """The result in words, as it is printed."""
        if not self.intact:
            changed = ", ".join(finding.part for finding in self.findings if not finding.ok)
            return f"CHANGED since it was verified: {changed}"
        return f"INTACT, recorded as {printable(self.record['verdict'].get('conclusion'))}"

    def text(self, width: int = 100) -> str:
        """Return the recorded verdict and what was checked, of at most `width` columns."""
        rows = [(f.part, "ok" if f.ok else "CHANGED", f.detail) for f in self.findings]
        table = render(("part", "", "detail"), rows, title=self.path, width=width)
        told = printable(self.record.get("verdict", {}).get("text", "nothing"))
        quoted = "\n".join(f"  {line}" for line in told.split("\n"))
        return "\n\n".join((f"the record says:\n{quoted}", table, self.conclusion))

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain data for `json.dumps`."""
        return {
            "file": self.path,
            "intact": self.intact,
            "equivalent": self.equivalent,
            "conclusion": self.conclusion,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "record": dict(self.record),
        }


# --- the two verbs -------------------------------------------------------------------------------


def record(
    path: str | os.PathLike[str],
    reference: nn.Module | str | os.PathLike[str],
    verdict: Verdict,
    *,
    key: bytes | None = None,
) -> RecordCheck:
    """Write a verdict into the file that it is about, in place of an earlier one.

    Everything else in the file stays as it is, to the byte. The file is replaced in one step, once
    the new one has been read back and checked; when that fails it stays as it was. The modules are
    not changed.

    Args:
        path: the ONNX file.
        reference: the network, or the ONNX file, that it was compared with.
        verdict: what `verify` said of the two just now, whichever way it went.
        key: 16 bytes or more, to sign the record with; `check_record` needs the same.

    Returns:
        The check of the file that was written.

    Raises:
        ArgumentError: the verdict is about another file, or the key is too short.
        ArgumentTypeError: an argument has the wrong type, or the reference holds no plain tensors.
        OnnxFileError: the file cannot be read.
        ExportError: the file cannot be written.
    """
    if not isinstance(verdict, Verdict):
        raise ArgumentTypeError(
            f"the verdict is a {type(verdict).__name__}", fix="what ds.verify returned"
        )
    if Path(verdict.candidate).name != Path(path).name:
        raise ArgumentError(
            "the verdict is about another file",
            where=f"{verdict.candidate}, not {os.fspath(path)}",
            fix="verify this file",
        )
    _check_key(key)
    target = check_target(path)
    file = _opened(target)
    content = regular_content(target)
    sections = _sections(file, content, reference, verdict)
    check = _replace(target, content, _entries(sections, key), key)
    return dataclasses.replace(check, path=os.fspath(path))


def check_record(
    path: str | os.PathLike[str],
    *,
    reference: nn.Module | str | os.PathLike[str] | None = None,
    key: bytes | None = None,
) -> RecordCheck:
    """Say whether an ONNX file is still the one that its recorded verdict is about.

    Nothing is run. The file may come from anywhere: it is read as `verify` reads it, which refuses
    what is damaged or reaches out of its folder.

    Args:
        path: the ONNX file.
        reference: a network or an ONNX file that ought to be the one of the record.
        key: what the record was signed with. Without it a signature is only reported.

    Raises:
        OnnxFileError: the file cannot be read, or it carries no record.
        ArgumentError, ArgumentTypeError: the key is no key, or the reference none.
    """
    _check_key(key)
    return _checked(_opened(path), regular_content(Path(path)), reference, key)


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a network's state dict, as it is recorded.

    It covers the names in ascending order, each with its dtype, its shape and its elements' bytes,
    and depends on nothing else: not on the device, the strides or how the weights were saved.

    Raises:
        ArgumentTypeError: a tensor has no bytes of its own: it is sparse, quantised or on meta.
    """
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            continue  # get_extra_state: no weights
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise ArgumentTypeError(
                "a weight has no bytes to hash", where=f"{name}: {value.layout}"
            )
        head = [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
        digest.update(f"{json.dumps(head)}\n".encode())
        plain = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        flat = plain.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the record ----------------------------------------------------------------------------------


def _check_key(key: Any) -> None:
    if key is not None and not isinstance(key, bytes):
        raise ArgumentTypeError(f"the key is a {type(key).__name__}", fix="bytes")
    if key is not None and len(key) < _SHORTEST_KEY:
        raise ArgumentError(
            f"the key has {len(key)} bytes", fix=f"{_SHORTEST_KEY} or more, drawn at random"
        )


def _sections(
    file: OnnxFile, content: bytes, reference: Any, verdict: Verdict
) -> dict[str, dict[str, Any]]:
    # A path tells of the machine; the name of the file is enough.
    told = dataclasses.replace(verdict, candidate=Path(verdict.candidate).name)
    metadata = file.metadata
    facts = environment()
    labels = " ".join(verdict.inputs)
    sections = {
        "file": _contents(file, content),
        "reference": _reference(reference),
        "verdict": {**told.to_json(), "text": str(told)},
        "passes": {name: metadata.get(f"dropsurgery.{name}", "") for name in ("source", "passes")},
        "seeds": {"seeds": sorted({int(seed) for seed in re.findall(r"seed (\d+)", labels)})},
        "versions": {name: facts[name] for name in _VERSIONS},
    }
    return {name: json.loads(json.dumps(finite(sections[name]))) for name in _SECTIONS}


def _reference(reference: Any) -> dict[str, Any]:
    if isinstance(reference, nn.Module):
        return {"name": type(reference).__name__, "weights": hash_weights(reference)}
    if isinstance(reference, str | os.PathLike):
        path = Path(reference)
        return {"name": path.name, **_contents(_opened(path), regular_content(path))}
    raise ArgumentTypeError(
        f"the reference is a {type(reference).__name__}", fix="a torch.nn.Module or an ONNX file"
    )


def _entries(sections: Mapping[str, Any], key: bytes | None) -> dict[str, str]:
    """Return the metadata entries: the record, and its conclusion for who reads the metadata."""
    links = dict(_links(sections, {}))
    document: dict[str, Any] = {"format": _FORMAT, "sections": sections, "links": links}
    if key is not None:
        document["signature"] = _signature(links, key)
    return {LINE: sections["verdict"]["conclusion"], RECORD: json.dumps(document)}


def _links(sections: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (section, hash of it and of the stored hash before it); without those, of its own."""
    link = f"dropsurgery record {_FORMAT}"
    for name in _SECTIONS:
        text = json.dumps([link, name, sections.get(name)], sort_keys=True, separators=(",", ":"))
        own = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        yield name, own
        link = str(stored.get(name, own))


def _signature(links: Mapping[str, Any], key: bytes) -> str:
    return hmac.new(key, json.dumps(dict(links), sort_keys=True).encode(), "sha256").hexdigest()


def _checked(file: OnnxFile, content: bytes, reference: Any, key: bytes | None) -> RecordCheck:
    document = _document(file)
    links = document["links"]
    read = document["sections"]
    sections = {name: read[name] for name in _SECTIONS if isinstance(read.get(name), dict)}
    findings = []
    for name, link in _links(sections, links):
        ok = name in sections and link == links.get(name)
        findings.append(Finding(f"recorded {name}", ok, _told(name, sections.get(name), ok)))
    lines = [item.value for item in file.model.metadata_props if item.key == LINE]
    same = lines == [sections.get("verdict", {}).get("conclusion")]
    findings.append(
        Finding("verdict line", same, "as in the record" if same else "not what the record says")
    )
    findings += _compare(sections.get("file", {}), _contents(file, content), "")
    if reference is not None:
        findings += _compare(sections.get("reference", {}), _reference(reference), "reference ")
    signature = document.get("signature")
    if key is not None or signature is not None:
        findings.append(_check_signature(links, signature, key))
    return RecordCheck(os.fspath(file.path), tuple(findings), sections)


def _document(file: OnnxFile) -> dict[str, Any]:
    texts = [item.value for item in file.model.metadata_props if item.key == RECORD]
    if not texts:
        raise OnnxFileError(
            "the file carries no record of a verdict",
            where=str(file.path),
            fix="verify it against its network, with --record (ds.record in Python)",
        )
    try:
        document = json.loads(texts[0])
        json.dumps(document)  # what can be read may still be nested too deep to be written
    except (ValueError, RecursionError):
        document = None
    shaped = isinstance(document, dict) and document.get("format") == _FORMAT
    if (
        len(texts) > 1
        or not shaped
        or not all(isinstance(document.get(part), dict) for part in ("sections", "links"))
    ):
        raise OnnxFileError(
            "the record of the verdict is damaged",
            where=f"{file.path}, metadata {RECORD!r}",
            fix="verify the file again, with --record",
        )
    result: dict[str, Any] = document
    return result


def _told(name: str, section: Mapping[str, Any] | None, ok: bool) -> str:
    """Return what a section says, in a few words; whatever a forger put there is only text."""
    if section is None:
        return "it is missing"
    if not ok:
        return "it was changed after it was written"
    shown = {
        "file": ("hashes of what was verified",),
        "reference": (section.get("name"), str(section.get("weights"))[:16]),
        "verdict": (section.get("conclusion"),),
        "passes": (section.get("source") or "not written by dropsurgery",),
        "seeds": (section.get("seeds"),),
        "versions": tuple(f"{part} {section.get(part)}" for part in _VERSIONS),
    }
    return printable(", ".join(map(str, shown[name])))


def _compare(
    recorded: Mapping[str, Any], found: Mapping[str, Any], before: str
) -> Iterator[Finding]:
    """Compare hashes, part by part; the name of a reference is for people."""
    for part in [*found, *(part for part in recorded if part not in found)]:
        now, then = found.get(part), recorded.get(part)
        if part != "name":
            detail = f"sha256 {str(now)[:16]}"
            detail += "" if now == then else f", recorded {printable(then)[:16]}"
            yield Finding(before + printable(part), now == then, detail)


def _check_signature(links: Mapping[str, Any], signature: Any, key: bytes | None) -> Finding:
    if key is None:
        return Finding("signature", True, "there is one, not checked: no key was given")
    if not isinstance(signature, str) or not signature.isascii():
        return Finding("signature", False, "the record is not signed")
    ok = hmac.compare_digest(signature, _signature(links, key))
    return Finding("signature", ok, "made with this key" if ok else "not made with this key")


# --- bytes ---------------------------------------------------------------------------------------


def _opened(path: str | os.PathLike[str]) -> OnnxFile:
    """Read and check a file, and keep its metadata alone: its bytes hold the weights already."""
    import onnx

    file = read_onnx(path)
    metadata = onnx.ModelProto(metadata_props=file.model.metadata_props)
    return dataclasses.replace(file, model=metadata)


def _contents(file: OnnxFile, content: bytes) -> dict[str, Any]:
    """Return the hashes of a file, less the record, and of its external data."""
    graph, weights = hashlib.sha256(), hashlib.sha256()
    view = memoryview(content)
    for number, start, inner, end in _fields(view, 0, len(view), file.path):
        if number == _GRAPH:
            graph.update(b"(")  # its length would tell of the weights
            for part, begin, _, finish in _fields(view, inner, end, file.path):
                (weights if part in _WEIGHTS else graph).update(view[begin:finish])
            graph.update(b")")
        elif number != _METADATA or not _is_record(view[inner:end]):
            graph.update(view[start:end])
    hashes: dict[str, Any] = {"graph": graph.hexdigest(), "weights": weights.hexdigest()}
    for location, path in file.sidecars.items():
        with path.open("rb") as opened:
            hashes[f"external data {location}"] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _is_record(entry: memoryview) -> bool:
    import onnx

    return onnx.StringStringEntryProto.FromString(bytes(entry)).key in (RECORD, LINE)


def _fields(view: memoryview, at: int, end: int, path: Path) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, start, start of the value, end) of the fields of a protobuf message."""
    fixed = {1: 8, 5: 4}
    while at < end:
        start = at
        tag, at = _varint(view, at, end, path)
        inner, kind = at, tag & 7
        if kind == 0:
            _, at = _varint(view, at, end, path)
        elif kind == 2:
            size, inner = _varint(view, at, end, path)
            at = inner + size
        elif kind in fixed:
            at += fixed[kind]
        if kind not in (0, 1, 2, 5) or at > end:
            raise _no_message(path)
        yield tag >> 3, start, inner, at


def _varint(view: memoryview, at: int, end: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _no_message(path)


def _no_message(path: Path) -> OnnxFileError:
    return OnnxFileError(
        "the file is not a plain protobuf message", where=str(path), fix="export it again"
    )


def _replace(
    target: Path, content: bytes, entries: Mapping[str, str], key: bytes | None
) -> RecordCheck:
    """Write the content with new entries beside the file, check it, and move it into place."""
    import onnx

    part: Path | None = None
    view = memoryview(content)
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name[:32]}.", dir=target.parent)
        part = Path(name)
        with open(number, "wb") as file:
            for field, start, inner, end in _fields(view, 0, len(view), target):
                if field != _METADATA or not _is_record(view[inner:end]):
                    file.write(view[start:end])
            # Fields of a message may stand in any order: what is new goes to the end.
            added = [onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items()]
            file.write(onnx.ModelProto(metadata_props=added).SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, part)
        check = _checked(_opened(part), regular_content(part), None, key)
        os.replace(part, target)
        part = None
    except OSError as error:
        raise ExportError(
            f"the record cannot be written: {error.strerror or error}", where=str(target)
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return check
