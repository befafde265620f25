from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import dropsurgery as ds
from dropsurgery import provenance
from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError, OnnxFileError
from dropsurgery.provenance import LINE, RECORD

KEY = b"0123456789abcdef"


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ds.verify.Verdict]:  # type: ignore[name-defined]
    folder = tmp_path_factory.mktemp("made")
    path = ds.export_onnx(ds.slim(network()), folder / "m.onnx", torch.randn(1, 3, 8, 8))
    return path, ds.verify(network(), path)


@pytest.fixture
def path(made: Any, tmp_path: Path) -> Path:
    """A file with a record of its own."""
    copied = Path(shutil.copy(made[0], tmp_path / "m.onnx"))
    ds.record(copied, network(), made[1])
    return copied


def changed(check: provenance.RecordCheck) -> list[str]:
    return [finding.part for finding in check.findings if not finding.ok]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def entry(model: Any, key: str) -> Any:
    return next(item for item in model.metadata_props if item.key == key)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record's JSON."""

    def on(model: Any) -> None:
        item = entry(model, RECORD)
        document = json.loads(item.value)
        change(document)
        item.value = json.dumps(document)

    edit(path, on)


# --- what is written -----------------------------------------------------------------------------


def test_a_record_tells_what_was_verified(path: Path) -> None:
    check = ds.check_record(path)
    assert check
    assert (check.intact, check.equivalent) == (True, True)
    assert check.conclusion == "INTACT, recorded as EQUIVALENT"
    assert list(check.record) == list(provenance._SECTIONS)
    assert check.record["reference"] == {
        "name": "Sequential",
        "weights": ds.hash_weights(network()),
    }
    assert check.record["seeds"] == {"seeds": [0, 1, 2]}
    assert check.record["verdict"]["candidate"] == "m.onnx"
    assert "EQUIVALENT" in check.record["verdict"]["text"]
    assert "FoldAffine" in check.record["passes"]["passes"]
    assert set(check.record["versions"]) >= {"torch", "onnx", "onnxruntime", "dropsurgery"}


def test_nothing_but_the_record_is_added(made: Any, path: Path) -> None:
    before, after = made[0].read_bytes(), path.read_bytes()
    assert after.startswith(before)
    ds.record(path, network(), made[1])
    assert path.read_bytes() == after  # the old one is replaced, and the same one is the same
    assert str(path.parent).encode() not in after  # nothing of this machine's folders
    assert [item.name for item in path.parent.iterdir()] == ["m.onnx"]
    assert ds.verify(network(), path).ok


def test_the_record_can_be_printed(path: Path) -> None:
    check = ds.check_record(path)
    text = check.text(80)
    assert text.startswith("the record says:\n  m.onnx against Sequential on CPU")
    assert text.endswith("INTACT, recorded as EQUIVALENT")
    assert json.loads(json.dumps(check.to_json()))["findings"][0] == {
        "part": "recorded file",
        "ok": True,
        "detail": "hashes of what was verified",
    }


def test_a_verdict_against_the_file_is_recorded_too(made: Any, path: Path) -> None:
    other = network()
    with torch.no_grad():
        other[0].bias.add_(1)
    check = ds.record(path, other, ds.verify(other, path))
    assert (check.intact, check.equivalent) == (True, False)
    assert check.conclusion == "INTACT, recorded as NOT EQUIVALENT"


def test_a_file_that_another_library_wrote_again_is_still_the_same(path: Path) -> None:
    edit(path, lambda model: None)
    assert ds.check_record(path).intact


# --- what is changed is named --------------------------------------------------------------------


def _weight(model: Any) -> None:
    tensor = model.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 1e-6
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _attribute(model: Any) -> None:
    attribute = next(a for a in model.graph.node[0].attribute if a.ints)
    attribute.ints[0] += 1


EDITS: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "one weight": (_weight, ["weights"]),
    "an attribute": (_attribute, ["graph"]),
    "a node's name": (lambda m: setattr(m.graph.node[0], "name", "x"), ["graph"]),
    "a weight's text": (
        lambda m: setattr(m.graph.initializer[0], "doc_string", "x"),
        ["weights"],
    ),
    "both": (lambda m: (_weight(m), _attribute(m)), ["graph", "weights"]),  # type: ignore[dict-item]
    "the opset": (lambda m: setattr(m.opset_import[0], "version", 19), ["graph"]),
    "the producer": (lambda m: setattr(m, "producer_name", "me"), ["graph"]),
    "other metadata": (lambda m: m.metadata_props.add(key="a", value="b"), ["graph"]),
    "the history": (lambda m: setattr(entry(m, "dropsurgery.passes"), "value", "[]"), ["graph"]),
    "the line": (lambda m: setattr(entry(m, LINE), "value", "NOT EQUIVALENT"), ["verdict line"]),
    "a second line": (lambda m: m.metadata_props.add(key=LINE, value="FINE"), ["verdict line"]),
    "no line": (lambda m: m.metadata_props.remove(entry(m, LINE)), ["verdict line"]),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_the_file_is_named(path: Path, what: str) -> None:
    change, parts = EDITS[what]
    edit(path, change)
    check = ds.check_record(path)
    assert changed(check) == parts
    assert not check
    assert not check.equivalent
    assert check.conclusion == f"CHANGED since it was verified: {', '.join(parts)}"
    assert "CHANGED" in check.text()


def test_every_flipped_byte_of_graph_and_weights_is_found(made: Any, path: Path) -> None:
    whole, size = path.read_bytes(), made[0].stat().st_size
    for at in range(0, size, 61):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(bytes(data))
        with contextlib.suppress(OnnxFileError):
            assert not ds.check_record(path).intact, at


RECORD_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "the verdict": (
        lambda d: d["sections"]["verdict"].update(conclusion="NOT EQUIVALENT"),
        ["recorded verdict", "verdict line"],
    ),
    "the text": (lambda d: d["sections"]["verdict"].update(text="fine"), ["recorded verdict"]),
    "a ratio": (
        lambda d: d["sections"]["verdict"]["outputs"][0].update(candidate_error=0.0),
        ["recorded verdict"],
    ),
    "a hash": (
        lambda d: d["sections"]["file"].update(weights="0" * 64),
        ["recorded file", "weights"],
    ),
    "the reference": (
        lambda d: d["sections"]["reference"].update(name="Other"),
        ["recorded reference"],
    ),
    "a version": (lambda d: d["sections"]["versions"].update(torch="9"), ["recorded versions"]),
    "the seeds": (lambda d: d["sections"]["seeds"].update(seeds=[7]), ["recorded seeds"]),
    "the passes": (lambda d: d["sections"]["passes"].clear(), ["recorded passes"]),
    "a section gone": (lambda d: d["sections"].pop("seeds"), ["recorded seeds"]),
    "a section of another kind": (lambda d: d["sections"].update(seeds=3), ["recorded seeds"]),
    "a link": (lambda d: d["links"].update(seeds="0"), ["recorded seeds", "recorded versions"]),
    "no links": (lambda d: d["links"].clear(), [f"recorded {n}" for n in provenance._SECTIONS]),
}


@pytest.mark.parametrize("what", RECORD_EDITS)
def test_an_edit_of_the_record_is_named(path: Path, what: str) -> None:
    change, parts = RECORD_EDITS[what]
    rewrite(path, change)
    check = ds.check_record(path)
    assert changed(check) == parts
    assert check.conclusion.startswith("CHANGED")
    check.text(), check.to_json()


def test_a_section_of_another_record_does_not_fit(made: Any, path: Path) -> None:
    other = network()
    with torch.no_grad():
        other[0].bias.add_(1)
    bad = Path(shutil.copy(made[0], path.with_name("bad.onnx")))
    ds.record(bad, other, ds.verify(other, bad))
    donor = json.loads(entry(onnx.load(path), RECORD).value)

    def graft(document: dict[str, Any]) -> None:
        document["sections"]["verdict"] = donor["sections"]["verdict"]
        document["links"]["verdict"] = donor["links"]["verdict"]

    rewrite(bad, graft)
    assert "recorded verdict" in changed(ds.check_record(bad))


def test_a_forged_record_is_text_and_no_crash(path: Path) -> None:
    """Who rewrites all of it is not found out, but does no harm either."""

    def forge(document: dict[str, Any]) -> None:
        sections: dict[str, Any] = {name: {} for name in provenance._SECTIONS}
        sections["verdict"] = {"text": "\x1b[2J\u202eEQUIVALENT", "ok": True}
        sections["versions"] = {"torch": [1] * 100}
        document.update(sections=sections, links=dict(provenance._links(sections, {})))

    rewrite(path, forge)
    check = ds.check_record(path)
    assert changed(check) == ["verdict line", "graph", "weights"]
    assert "\x1b" not in check.text()
    assert "\u202e" not in check.text()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "sections": 3}', "[" * 10**5, "NaN"]
)
def test_a_record_that_is_none(path: Path, text: str) -> None:
    edit(path, lambda model: setattr(entry(model, RECORD), "value", text))
    with pytest.raises(OnnxFileError, match="the record of the verdict is damaged"):
        ds.check_record(path)


def test_two_records_are_none(path: Path) -> None:
    edit(path, lambda model: model.metadata_props.append(entry(model, RECORD)))
    with pytest.raises(OnnxFileError, match="damaged"):
        ds.check_record(path)


def test_a_file_without_a_record(made: Any) -> None:
    with pytest.raises(OnnxFileError, match="carries no record of a verdict") as caught:
        ds.check_record(made[0])
    assert "--record" in str(caught.value)


# --- external data -------------------------------------------------------------------------------


def test_a_changed_sidecar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropsurgery.onnx_writer.ONE_FILE_LIMIT", 100)
    net = network()
    path = ds.export_onnx(net, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    ds.record(path, net, ds.verify(net, path))
    data = tmp_path / "m.onnx.data"
    assert ds.check_record(path).intact
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert changed(ds.check_record(path)) == ["external data m.onnx.data"]
    data.write_bytes(whole + b"\0")
    assert changed(ds.check_record(path)) == ["external data m.onnx.data"]
    data.write_bytes(whole[:-40])
    with pytest.raises(OnnxFileError, match="external data end at byte"):
        ds.check_record(path)
    data.unlink()
    with pytest.raises(OnnxFileError, match="external data are missing"):
        ds.check_record(path)


# --- weights of the reference --------------------------------------------------------------------


def test_the_reference_can_be_checked(path: Path) -> None:
    assert ds.check_record(path, reference=network()).intact
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6
    check = ds.check_record(path, reference=other)
    assert changed(check) == ["reference weights"]
    assert changed(ds.check_record(path, reference=path)) == [
        "reference graph",
        "reference weights",
    ]


def test_an_onnx_file_can_be_the_reference(made: Any, path: Path) -> None:
    check = ds.record(path, made[0], made[1])
    assert check.record["reference"]["name"] == "m.onnx"
    assert ds.check_record(path, reference=made[0]).intact
    assert changed(ds.check_record(path, reference=network())) == [
        "reference weights",
        "reference graph",
    ]


def test_the_hash_of_weights_depends_on_what_they_are_alone() -> None:
    net = network()
    first = ds.hash_weights(net)
    assert len(first) == 64
    assert ds.hash_weights(net.train()) == first
    net[0].weight.data = net[0].weight.data.to(memory_format=torch.channels_last)
    assert ds.hash_weights(net) == first
    assert ds.hash_weights(network().half()) != first
    assert ds.hash_weights(ds.trace(network())) == first
    for change in (
        lambda n: n[1].running_mean[0].add_(1e-7),
        lambda n: n[1].num_batches_tracked.add_(1),
        lambda n: n.add_module("4", nn.Linear(1, 1)),
    ):
        other = network()
        change(other)  # type: ignore[no-untyped-call]
        assert ds.hash_weights(other) != first


def test_shapes_and_dtypes_are_part_of_the_hash() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return ds.hash_weights(module)

    zeros = torch.zeros(4)
    others = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros.view(2, 2)),
        of(a=torch.zeros(4, dtype=torch.int32)),
        of(a=torch.zeros(2, dtype=torch.float64)),
        of(a=torch.zeros(2), b=torch.zeros(2)),
        of(a=torch.zeros(4, dtype=torch.bfloat16)),
        of(a=torch.zeros(2, dtype=torch.complex64)),
        of(a=torch.zeros(0)),
        of(a=torch.tensor(True)),
        of(),
    ]
    assert len(set(others)) == len(others)
    assert of(b=zeros, a=zeros) == of(a=zeros, b=zeros)


def test_weights_without_bytes() -> None:
    with pytest.raises(ArgumentTypeError, match="no bytes to hash"):
        ds.hash_weights(nn.Linear(2, 2, device="meta"))
    module = nn.Module()
    module.register_buffer("s", torch.eye(3).to_sparse())
    with pytest.raises(ArgumentTypeError, match="no bytes to hash"):
        ds.hash_weights(module)


# --- signatures ----------------------------------------------------------------------------------


def test_a_signature_needs_its_key(made: Any, path: Path) -> None:
    assert ds.record(path, network(), made[1], key=KEY).intact
    assert ds.check_record(path, key=KEY).intact
    assert changed(ds.check_record(path, key=KEY[::-1])) == ["signature"]
    unchecked = ds.check_record(path)
    assert unchecked.intact
    assert "not checked" in unchecked.findings[-1].detail


def test_who_rewrites_everything_lacks_the_key(made: Any, path: Path) -> None:
    ds.record(path, network(), made[1], key=KEY)
    edit(path, _weight)
    other = ds.verify(network(), path)
    forged = dataclasses.replace(other, ok=True)
    stolen = json.loads(entry(onnx.load(path), RECORD).value)["signature"]
    ds.record(path, network(), forged)
    assert ds.check_record(path).intact  # which is why there are keys
    assert changed(ds.check_record(path, key=KEY)) == ["signature"]
    rewrite(path, lambda document: document.update(signature=stolen))
    assert changed(ds.check_record(path, key=KEY)) == ["signature"]
    rewrite(path, lambda document: document.update(signature=["\ud800"]))
    assert changed(ds.check_record(path, key=KEY)) == ["signature"]


@pytest.mark.parametrize("key", [b"", b"short"])
def test_a_short_key_is_refused(made: Any, path: Path, key: bytes) -> None:
    with pytest.raises(ArgumentError, match=f"the key has {len(key)} bytes"):
        ds.record(path, network(), made[1], key=key)
    with pytest.raises(ArgumentTypeError, match="the key is a str"):
        ds.check_record(path, key="0123456789abcdef")  # type: ignore[arg-type]


# --- writing -------------------------------------------------------------------------------------


def test_a_verdict_of_another_file_is_refused(made: Any, tmp_path: Path) -> None:
    other = Path(shutil.copy(made[0], tmp_path / "other.onnx"))
    with pytest.raises(ArgumentError, match="about another file"):
        ds.record(other, network(), made[1])
    with pytest.raises(ArgumentTypeError, match="the verdict is a bool"):
        ds.record(other, network(), True)  # type: ignore[arg-type]
    same = Path(shutil.copy(made[0], tmp_path / "m.onnx"))
    with pytest.raises(ArgumentTypeError, match="the reference is a int"):
        ds.record(same, 3, made[1])  # type: ignore[arg-type]
    assert same.read_bytes() == made[0].read_bytes()


@pytest.mark.parametrize("at", ["fsync", "replace", "check"])
def test_a_write_that_fails_leaves_the_file_as_it_was(
    made: Any, path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    before = path.read_bytes()

    def fails(*_: object) -> None:
        if at == "check":
            raise KeyboardInterrupt
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((provenance, "_checked") if at == "check" else (os, at)), fails)
    raised = KeyboardInterrupt if at == "check" else ExportError
    with pytest.raises(raised):
        ds.record(path, network(), made[1], key=KEY)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["m.onnx"]


def test_mode_and_link_stay(made: Any, path: Path, tmp_path: Path) -> None:
    path.chmod(0o640)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "m.onnx"
    link.symlink_to(path)
    check = ds.record(link, network(), made[1], key=KEY)
    assert check.path == str(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert ds.check_record(path, key=KEY).intact


def test_a_damaged_file_is_not_recorded(made: Any, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OnnxFileError):
        ds.record(path, network(), made[1])
    groups = path.with_name("m.onnx")
    groups.write_bytes(made[0].read_bytes() + b"\xa3\x06\xa4\x06")  # an old-style group
    with pytest.raises(OnnxFileError, match="not a plain protobuf message"):
        ds.record(groups, network(), made[1])
