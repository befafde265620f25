"""Malformed and hostile ONNX files, written by code, and what becomes of them when they are read.

As a program it writes and reads them all in a process of its own, which may not open a file outside
the folder, take much memory or hang: `python -m tests.hostile_files FOLDER` prints one JSON object.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import random
import resource
import select
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import dropsurgery as ds
from dropsurgery.errors import DropsurgeryError
from dropsurgery.report import onnx_census

SECONDS = 30  # the most that one file may take
MEMORY = 3 * 2**30  # address space beyond what the libraries take
CANARY = b"secret" * 100
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Hostile:
    """A file, what writes it into a folder, and what the message must say; None for anything."""

    name: str
    write: Write
    says: str | None


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1))
    return nn.Sequential(*layers, nn.Linear(144, 3)).eval()


# --- by hand -------------------------------------------------------------------------------------


def tensor(name: str = "w", *dims: int, kind: int = TensorProto.FLOAT, **fields: Any) -> Any:
    made = TensorProto(name=name, data_type=kind, dims=dims or (2,))
    for field, value in fields.items():
        if isinstance(value, list):
            getattr(made, field).extend(value)
        else:
            setattr(made, field, value)
    return made


def good(name: str = "w") -> Any:
    return numpy_helper.from_array(np.ones(2, np.float32), name)


def external(location: str | None, **entries: str) -> Any:
    made = tensor(data_location=TensorProto.EXTERNAL)
    if location is not None:
        made.external_data.add(key="location", value=location)
    for key, value in entries.items():
        made.external_data.add(key=key, value=value)
    return made


def sparse(values: Any, indices: Any, *dims: int) -> Any:
    made = onnx.SparseTensorProto(dims=dims)
    made.values.CopyFrom(values)
    made.values.name = "w"
    made.indices.CopyFrom(indices)
    return made


def whole(*numbers: int, shape: tuple[int, ...] | None = None) -> Any:
    array = np.array(numbers, np.int64)
    return numpy_helper.from_array(array.reshape(shape) if shape else array, "i")


def value(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(
    nodes: list[Any] | None = None,
    weights: tuple[Any, ...] = (),
    *,
    inputs: list[Any] | None = None,
    sparse_weights: tuple[Any, ...] = (),
    functions: tuple[Any, ...] = (),
    **metadata: str,
) -> Any:
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"], name="add")]
    graph = helper.make_graph(
        nodes, "g", inputs or [value("x", 2)], [value("y", "n")], list(weights),
        sparse_initializer=list(sparse_weights),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    for key, text in metadata.items():
        made.metadata_props.add(key=key.replace("__", "."), value=text)
    return made


def node(kind: str, inputs: list[str], outputs: list[str], **options: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, name=kind.lower(), **options)


def branch(nodes: list[Any], output: str, weights: tuple[Any, ...] = ()) -> Any:
    return helper.make_graph(nodes, "b", [], [value(output, 2)], list(weights))


def choice(body: Any) -> Any:
    """Return an If node both of whose branches are `body`."""
    return node("If", ["c"], ["y"], then_branch=body, else_branch=body)


def condition() -> Any:
    return numpy_helper.from_array(np.array(True), "c")


def nested(depth: int) -> Any:
    body = branch([node("Identity", ["x"], ["z"])], "z")
    for level in range(depth):
        inner = helper.make_node("If", ["c"], [f"z{level}"], then_branch=body, else_branch=body)
        # Both branches would double the size with every level.
        del inner.attribute[1].g.node[:]
        inner.attribute[1].g.node.add(op_type="Identity", input=["x"], output=[f"e{level}"])
        inner.attribute[1].g.output[0].name = f"e{level}"
        body = branch([inner], f"z{level}")
    return choice(body)


def function(name: str, *calls: str) -> Any:
    steps = [
        helper.make_node(call, [f"v{index}"], [f"v{index + 1}"], domain="own")
        for index, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    steps.append(helper.make_node("Relu", [f"v{len(calls)}"], ["out"]))
    return helper.make_function("own", name, ["v0"], ["out"], steps, opsets)


def calling(name: str) -> list[Any]:
    return [helper.make_node(name, ["x"], ["y"], domain="own")]


# --- writers -------------------------------------------------------------------------------------


def just(made: Any, **files: bytes) -> Write:
    """Return what writes a model, and other files beside it ("w_data" is w.data)."""

    def write(folder: Path) -> None:
        content = made if isinstance(made, bytes) else made.SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_bytes(data)

    return write


def with_external(location: str | None, place: Write | None = None, **entries: str) -> Write:
    def write(folder: Path) -> None:
        path = None if location is None else location.replace("ABSOLUTE", str(outside(folder)))
        just(model(weights=(external(path, **entries),)))(folder)
        if place is not None:
            place(folder)

    return write


def outside(folder: Path) -> Path:
    return folder.parent.parent / "outside"


def symlink(target: str) -> Write:
    def write(folder: Path) -> None:
        (folder / "real.data").write_bytes(bytes(8))
        (folder / "w.data").symlink_to(target.replace("ABSOLUTE", str(outside(folder))))

    return write


def linked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(outside(folder))


def hard_link(folder: Path) -> None:
    os.link(outside(folder) / "linked.bin", folder / "w.data")


def named_like_an_address(folder: Path) -> None:
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(8))


OUT = "plain path below the model's folder"


def external_tricks() -> Iterator[Hostile]:
    named: dict[str, tuple[str | None, str]] = {
        "parent": ("../../outside/canary.bin", OUT),
        "parent twice": ("sub/../../../outside/canary.bin", OUT),
        "absolute": ("ABSOLUTE/canary.bin", OUT),
        "url": ("file:///etc/passwd", OUT),
        "device": ("/dev/zero", OUT),
        "home": ("~/w.data", "missing"),
        "dot": ("./w.data", OUT),
        "double slash": ("sub//w.data", OUT),
        "backslash": ("..\\..\\outside\\canary.bin", OUT),
        "drive": ("C:/outside/canary.bin", OUT),
        "share": ("\\\\server\\share\\canary.bin", OUT),
        "nul": ("w.data\0../../outside/canary.bin", OUT),
        "long": ("w" * 5000, OUT),
        "longer than a name": ("w" * 300, "missing"),
        "empty": ("", OUT),
        "nowhere": (None, OUT),
        "trailing slash": ("w.data/", OUT),
        "itself": ("model.onnx", "in the model file itself"),
        "missing": ("w.data", "external data are missing"),
        "address": ("*/_ORT_MEM_ADDR_/*", OUT),
    }
    for name, (location, says) in named.items():
        place = named_like_an_address if name == "address" else None
        yield Hostile(f"external {name}", with_external(location, place), says)
    placed: dict[str, tuple[str, Write, str]] = {
        "link out": ("w.data", symlink("ABSOLUTE/canary.bin"), "behind a symbolic link"),
        "relative link out": ("w.data", symlink("../../outside/canary.bin"), "symbolic link"),
        "link inside": ("w.data", symlink("real.data"), "symbolic link"),
        "dangling link": ("w.data", symlink("nothing"), "symbolic link"),
        "link to itself": ("w.data", symlink("w.data"), "symbolic link"),
        "link to zeros": ("w.data", symlink("/dev/zero"), "symbolic link"),
        "linked folder": ("sub/canary.bin", linked_folder, "symbolic link"),
        "hard link": ("w.data", hard_link, "hard link"),
        "folder": ("w.data", lambda folder: (folder / "w.data").mkdir(), "no file"),
        "pipe": ("w.data", lambda folder: os.mkfifo(folder / "w.data"), "no file"),
        "file as folder": ("w.data/w", lambda folder: _data(folder, 8), "missing: Not a directory"),
    }
    for name, (location, place, says) in placed.items():
        yield Hostile(f"external {name}", with_external(location, place), says)
    for name, entries, says in (
        ("negative offset", {"offset": "-8"}, "offset of external data is '-8'"),
        ("offset beyond", {"offset": "4096"}, "end at byte 4104 of a file of 8"),
        ("offset just beyond", {"offset": "1"}, "end at byte 9 of a file of 8"),
        ("offset that wraps", {"offset": str(2**64 - 4)}, "offset of external data"),
        ("offset in hex", {"offset": "0x10"}, "offset of external data"),
        ("offset in other digits", {"offset": "\u0663"}, "offset of external data"),
        ("length of nothing", {"length": "0"}, "takes 8 bytes, and its external data are 0"),
        ("length beyond", {"length": "1000000000000"}, "takes 8 bytes"),
        ("negative length", {"length": "-1"}, "length of external data"),
        ("length and offset", {"offset": "4", "length": "8"}, "end at byte 12"),
        ("unknown key", {"basepath": "/etc"}, "external data are told by"),
    ):
        write = with_external("w.data", lambda f: _data(f, 8), **entries)
        yield Hostile(f"external {name}", write, says)
    short = with_external("w.data", lambda folder: _data(folder, 7))
    yield Hostile("external cut short", short, "end at byte 8 of a file of 7")


def _data(folder: Path, size: int) -> None:
    (folder / "w.data").write_bytes(bytes(size))


def hidden_external() -> Iterator[Hostile]:
    """External data in places where a reader that looks at initializers alone does not look."""
    away = external("../../outside/canary.bin")
    twice = external("w.data")
    twice.external_data.add(key="location", value="../../outside/canary.bin")
    both, text, quiet = external("w.data"), external("w.data"), external("../../outside/canary.bin")
    both.raw_data = bytes(8)
    text.data_type = TensorProto.STRING
    quiet.data_location = TensorProto.DEFAULT
    constant = node("Constant", [], ["w"], value=away)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    inner = branch([node("Add", ["x", "w"], ["z"])], "z", (away,))
    odd = function("f")
    odd.attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(away)
    for name, made, says in (
        ("constant", model([constant, add]), OUT),
        ("branch", model([choice(inner)], (condition(),)), OUT),
        ("sparse values", model(sparse_weights=(sparse(away, whole(0, 1), 2),)), "lie outside"),
        ("sparse indices", model(sparse_weights=(sparse(good(), away, 2),)), "lie outside"),
        ("function default", model(calling("f"), functions=(odd,)), OUT),
        ("two locations", model(weights=(twice,)), "external data are told by"),
        ("and inside", model(weights=(both,)), "in the file and outside it"),
        ("strings", model(weights=(text,)), "strings cannot lie outside"),
        ("not marked", model(weights=(quiet,)), "in the file and outside it"),
    ):
        yield Hostile(f"external in {name}", just(made, w_data=bytes(8)), says)


def tensor_tricks() -> Iterator[Hostile]:
    eight = bytes(8)
    for name, made, says in (
        ("negative", tensor("w", -2, raw_data=eight), "has the shape -2"),
        ("overflow", tensor("w", 2**32, 2**32, raw_data=eight), "absurd shape 4294967296x"),
        ("overflow to two", tensor("w", 2**63 - 1, 2, 2, raw_data=eight), "absurd shape"),
        ("overflow beside zero", tensor("w", 0, 2**62, 2**62), "absurd shape"),
        ("many axes", tensor("w", *[1] * 65, raw_data=bytes(4)), "absurd shape"),
        ("huge", tensor("w", 2**40, raw_data=eight), "holds 8 bytes instead of 4398046511104"),
        ("short", tensor("w", 3, raw_data=eight), "holds 8 bytes instead of 12"),
        ("long", tensor("w", 1, raw_data=eight), "holds 8 bytes instead of 4"),
        ("empty", tensor("w", 2), "holds 0 entries instead of 2"),
        ("entries", tensor("w", 2, float_data=[1.0] * 3), "holds 3 entries instead of 2"),
        ("wrong field", tensor("w", 2, int64_data=[1, 2]), "holds 0 entries instead of 2"),
        ("halves", tensor("w", 2, kind=10, int32_data=[1]), "holds 1 entries instead of 2"),
        ("strings", tensor("w", 2, kind=8, string_data=[b"a"]), "holds 1 strings instead of 2"),
        ("type", tensor("w", 2, kind=0, raw_data=eight), "unknown element type 0"),
        ("type beyond", tensor("w", 2, kind=9999, raw_data=eight), "unknown element type 9999"),
    ):
        yield Hostile(f"tensor {name}", just(model(weights=(made,))), says)
    ones = good()
    for name, made, says in (
        ("outside", sparse(ones, whole(0, 2), 2), "index outside"),
        ("negative", sparse(ones, whole(-1, 1), 2), "index outside"),
        ("far", sparse(ones, whole(0, 2**62), 2), "index outside"),
        ("pairs", sparse(ones, whole(0, 0, 1, 5, shape=(2, 2)), 2, 2), "index outside"),
        ("descending", sparse(ones, whole(1, 0), 2), "ascending"),
        ("twice", sparse(ones, whole(1, 1), 2), "ascending"),
        ("count", sparse(ones, whole(0, 1, 2), 4), "indices of shape"),
        ("rank", sparse(ones, whole(0, 0, 0, 1, 1, 1, shape=(2, 3)), 2, 2), "indices of shape"),
        ("floats", sparse(ones, ones, 2), "int64 indices"),
        ("matrix", sparse(tensor("w", 1, 2, raw_data=eight), whole(0, 1), 2), "no list"),
        ("dense", sparse(ones, whole(0, 1), 2**16, 2**16), "17179869184 bytes when filled in"),
        ("overflow", sparse(ones, whole(0, 1), 2**33, 2**33), "absurd shape"),
        ("negative shape", sparse(ones, whole(0, 1), -2), "has the shape -2"),
        ("short values", sparse(tensor("w", 2, raw_data=b""), whole(0, 1), 2), "holds 0 bytes"),
    ):
        yield Hostile(f"sparse {name}", just(model(sparse_weights=(made,))), says)


def size_tricks() -> Iterator[Hostile]:
    giant = numpy_helper.from_array(np.array([2**18, 2**18], np.int64), "s")
    listed = TensorProto(name="s", data_type=7, dims=(2,), int64_data=[2**18, 2**18])
    fill = helper.make_node("ConstantOfShape", ["s"], ["w"])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    constant = node("Constant", [], ["s"], value=giant)
    ints = node("Constant", [], ["s"], value_ints=[2**40])
    random_ = node("RandomNormal", [], ["w"], shape=[2**40])
    for name, made in (
        ("filled", model([fill, add], (giant,))),
        ("filled by a list", model([fill, add], (listed,))),
        ("filled by a constant", model([constant, fill, add])),
        ("filled by numbers", model([ints, fill, add])),
        ("expanded", model([node("Expand", ["x", "s"], ["y"])], (giant,))),
        ("resized", model([node("Resize", ["x", "", "", "s"], ["y"])], (giant,))),
        ("drawn", model([random_, add])),
        ("input", model([node("Relu", ["x"], ["y"])], inputs=[value("x", "n", 2**40)])),
    ):
        yield Hostile(f"size {name}", just(made), "absurd shape")


def graph_tricks() -> Iterator[Hostile]:
    def add(first: str, second: str, output: str) -> Any:
        return helper.make_node("Add", [first, second], [output], name=f"make {output}")

    turn = branch([add("x", "b", "a"), add("x", "a", "b")], "b")
    captured = branch([node("Add", ["x", "late"], ["z"])], "z")
    doubled = branch([node("Relu", ["x"], ["z"]), node("Tanh", ["x"], ["z"])], "z")
    bomb = [function("f0")] + [function(f"f{i}", *[f"f{i - 1}"] * 10) for i in range(1, 8)]
    long = [function("f0")] + [function(f"f{i}", f"f{i - 1}") for i in range(1, 400)]
    w = (good(),)
    for name, made, says in (
        ("cycle", model([add("x", "b", "a"), add("a", "a", "b"), add("b", "b", "y")]), "a cycle"),
        ("cycle of one", model([add("x", "y", "y")]), "a cycle"),
        ("cycle in a branch", model([choice(turn)], (condition(),)), "a cycle"),
        (
            "cycle through a branch",
            model(
                [
                    node("If", ["c"], ["y"], then_branch=captured, else_branch=captured),
                    add("y", "y", "late"),
                ],
                (condition(),),
            ),
            "a cycle",
        ),
        ("no origin", model([add("x", "nothing", "y")]), "nothing makes the value 'nothing'"),
        ("no output", model([add("x", "x", "z")]), "nothing makes the output 'y'"),
        ("made twice", model([add("x", "x", "y"), add("x", "x", "y")]), "two values bear"),
        ("made over", model([add("x", "w", "w"), add("w", "x", "y")], w), "two values bear"),
        ("twice in a branch", model([choice(doubled)], (condition(),)), "two values bear"),
        ("weights twice", model(weights=(good(), good())), "two values bear the name 'w'"),
        ("inputs twice", model(weights=w, inputs=[value("x", 2)] * 2), "two values bear"),
        ("nested", model([nested(17)], (condition(),)), "nested more than 16 deep"),
        ("function of itself", model(calling("f"), functions=(function("f", "f"),)), "itself"),
        (
            "functions in a ring",
            model(calling("f"), functions=(function("f", "g"), function("g", "f"))),
            "a function calls itself",
        ),
        ("functions alike", model(calling("f"), functions=(function("f"),) * 2), "bear one name"),
        ("functions that explode", model(calling("f7"), functions=tuple(bomb)), "nodes once its"),
        ("functions in a row", model(calling("f399"), functions=tuple(long)), "64 deep"),
        ("function without origin", model(calling("f"), functions=(_torn(),)), "nothing makes"),
        ("names of a shell", model(weights=w, dropsurgery__outputs="$(id)"), "metadata are"),
        ("names of numbers", model(weights=w, dropsurgery__outputs="[1]"), "metadata are damaged"),
        ("names too deep", model(weights=w, dropsurgery__outputs="[" * 10**5), "metadata are"),
        ("scopes too deep", _scoped("-" * 10**5 + "1"), "draws random numbers"),
        ("scopes of another kind", _scoped("{1: 2}"), "draws random numbers"),
        ("opset beyond", _opset(2**40), "no version 1099511627776"),
        ("opset below", _opset(-1), "no version -1"),
        ("an operator of nobody", model([node("Evil", ["x"], ["y"])]), "cannot load the file"),
        ("nothing at all", onnx.ModelProto(), "not a complete ONNX model"),
    ):
        yield Hostile(f"graph {name}", just(made), says)


def _scoped(text: str) -> Any:
    made = model([node("RandomNormalLike", ["x"], ["y"])])
    made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    return made


def _opset(version: int) -> Any:
    made = model(weights=(good(),))
    made.opset_import[0].version = version
    return made


def _torn() -> Any:
    made = function("f")
    made.node[0].input[0] = "nothing"
    return made


def text_tricks(base: bytes) -> Iterator[Hostile]:
    plain = model(weights=(good(),)).SerializeToString()
    for name, old, new in (
        ("operator", b"Add", b"\xff\xfe\xfd"),
        ("node", b"add", b"\xff\xfe\xfd"),
        ("value", b"\x01w", b"\x01\xff"),
        ("graph", b"\x12\x01g", b"\x12\x01\xff"),
    ):
        assert old in plain
        yield Hostile(f"text {name}", just(plain.replace(old, new)), None)
    deep = b""
    for _ in range(3000):  # node, attribute, graph, node …, deeper than any stack
        deep = _field(1, _field(5, _field(6, deep)))
    yield Hostile("nested without end", just(base + _field(7, deep)), "not a complete ONNX model")


def _field(number: int, payload: bytes) -> bytes:
    size, length = b"", len(payload)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + payload


def no_files() -> Iterator[Hostile]:
    def path(folder: Path) -> Path:
        return folder / "model.onnx"

    yield Hostile("no file", lambda folder: None, "there is no such file")
    yield Hostile("a folder", lambda folder: path(folder).mkdir(), "this is no file")
    yield Hostile("a pipe", lambda folder: os.mkfifo(path(folder)), "this is no file")
    yield Hostile("a link to nothing", lambda folder: path(folder).symlink_to("no"), "no such file")
    yield Hostile(
        "a link to itself", lambda folder: path(folder).symlink_to("model.onnx"), "cannot be read"
    )
    yield Hostile("a device", lambda folder: path(folder).symlink_to("/dev/zero"), "no file")
    yield Hostile("a sparse giant", _giant, "less than 2 GiB")
    for name, content in (
        ("empty", b""),
        ("zeros", bytes(1000)),
        ("text", b"#!/bin/sh\nrm -rf /\n" * 50),
        ("zip", b"PK\x03\x04" + bytes(500)),
        ("pickle", b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 9),
        ("long length", b"\x3a\xff\xff\xff\xff\x07" + bytes(100)),
        ("endless varint", b"\xff" * 1000),
    ):
        yield Hostile(f"content {name}", just(content), "not a complete ONNX model")


def _giant(folder: Path) -> None:
    with (folder / "model.onnx").open("wb") as file:
        file.truncate(2**31 + 5)


# --- fuzzed --------------------------------------------------------------------------------------


def fuzzed(base: bytes, count: int, seed: int = 0) -> Iterator[Hostile]:
    """Yield files with flipped bits, cut, spliced, with bytes repeated, taken out or made large."""
    draw = random.Random(seed)
    other = model(weights=(external("w.data"),)).SerializeToString()
    for index in range(count):
        data = bytearray(base)
        kind = ("flip", "cut", "splice", "repeat", "delete", "number")[index % 6]
        at = draw.randrange(len(data))
        size = draw.randrange(1, 40)
        if kind == "flip":
            for _ in range(draw.choice((1, 1, 2, 8))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            start = draw.randrange(len(other))
            data[at : at + size] = other[start : start + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "delete":
            del data[at : at + size]
        else:
            data[at : at + 4] = struct.pack("<I", draw.choice((2**31 - 1, 2**32 - 1, 0x7F7F7F7F)))
        yield Hostile(f"fuzzed {index} {kind}", just(bytes(data)), None)


def everything(base: bytes, fuzz: int) -> Iterator[Hostile]:
    """Yield every hostile file, those made from a sound one's bytes last."""
    yield from external_tricks()
    yield from hidden_external()
    yield from tensor_tricks()
    yield from size_tricks()
    yield from graph_tricks()
    yield from text_tricks(base)
    yield from no_files()
    yield from fuzzed(base, fuzz)


# --- the process that reads them -----------------------------------------------------------------


class Watch:
    """Linux's word on whether any code of any language opened or changed what is in a folder."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(os.O_NONBLOCK)
        opened, accessed, modified, created, deleted = 0x20, 0x1, 0x2, 0x100, 0x200
        mask = opened | accessed | modified | created | deleted
        number = libc.inotify_add_watch(self._file, os.fsencode(folder), mask)
        if self._file < 0 or number < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def events(self) -> list[str]:
        """Return the names of the files that something happened to since the last call."""
        names = []
        while select.select([self._file], [], [], 0)[0]:
            data = os.read(self._file, 65536)
            while data:
                length = struct.unpack_from("iIII", data)[3]
                names.append(data[16 : 16 + length].rstrip(b"\0").decode())
                data = data[16 + length :]
        return names


def attempt(call: Callable[[], object]) -> dict[str, str]:
    try:
        call()
    except DropsurgeryError as error:
        return {"kind": "refused", "type": type(error).__name__, "message": str(error)}
    except Exception as error:
        return {"kind": "raised", "type": type(error).__name__, "message": str(error)[:300]}
    return {"kind": "read", "type": "", "message": ""}


def main(folder: Path, fuzz: int, seed: int = 0) -> None:
    """Write every file, read each three ways, and print what became of them as JSON."""
    net = network()
    ds.export_onnx(net, folder / "sound.onnx", torch.zeros(1, 3, 8, 8))
    ds.record(folder / "sound.onnx", net, ds.verify(net, folder / "sound.onnx"))
    base = (folder / "sound.onnx").read_bytes()
    (folder / "outside").mkdir()
    for name in ("canary.bin", "linked.bin"):
        (folder / "outside" / name).write_bytes(CANARY)
    cases = list(everything(base, 0)) + list(fuzzed(base, fuzz, seed))
    paths = []
    for index, case in enumerate(cases):
        own = folder / "cases" / str(index)
        own.mkdir(parents=True)
        case.write(own)
        paths.append(own / "model.onnx")
    watch = Watch(folder / "outside")
    opened: list[str] = []
    sys.addaudithook(lambda event, args: _heard(event, args, opened))
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case, path in zip(cases, paths, strict=True):
        before = sorted(item.name for item in path.parent.iterdir())
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        told: dict[str, Any] = {
            "name": case.name,
            "says": case.says,
            "verify": attempt(lambda path=path: ds.verify(net, path, seeds=(0,), batch_sizes=(1,))),
            "census": attempt(lambda path=path: onnx_census(path)),
            "record": attempt(lambda path=path: ds.check_record(path)),
        }
        faulthandler.cancel_dump_traceback_later()
        told["touched"] = [*watch.events(), *opened]
        told["left"] = sorted({item.name for item in path.parent.iterdir()} ^ set(before))
        opened.clear()
        print(json.dumps(told), flush=True)
    # The watch itself must be able to see.
    (folder / "outside" / "canary.bin").read_bytes()
    print(json.dumps({"seen": [*watch.events(), *opened]}))


def _heard(event: str, args: tuple[Any, ...], opened: list[str]) -> None:
    if event == "open" and isinstance(args[0], str) and "outside" in args[0]:
        opened.append(args[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
