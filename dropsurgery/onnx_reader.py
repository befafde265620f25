"""Reading an ONNX file that nobody vouches for: opened once, checked before anything runs it.

An ONNX file names other files (its weights), sizes and operators, and every one of them can lie.
What is checked here is all that can be told without running the graph: that the file is a whole
model, that its tensors hold as much data as their shapes say, that its external data lie in files
of their own below its folder, and that its graph is one (`onnx_structure.py`). Nothing is read
outside the folder, and no more memory is taken than the file's own size explains.

What a sound graph does when it runs is another matter: it is a program, and may loop for a week.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from dropsurgery.errors import OnnxFileError, UnsafeFileError
from dropsurgery.graph.signature import first_line
from dropsurgery.onnx_structure import bodies, check_structure

# Bytes that a sparse tensor may take when it is filled in, whatever the file says of its shape.
MOST_DENSE = 2**28
# A protobuf message holds less than this.
_MOST_BYTES = 2**31
_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_INT64, _STRING = 7, 8
# Bits of an element by onnx.TensorProto.DataType; strings have no fixed size.
_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
# Where data lie that are not raw: the field, and how many bits of the element each entry holds.
_FIELDS = {
    **dict.fromkeys((1, 14), ("float_data", 32)),
    **dict.fromkeys((11, 15), ("double_data", 64)),
    7: ("int64_data", 64),
    **dict.fromkeys((12, 13), ("uint64_data", 64)),
    6: ("int32_data", 32),
    **dict.fromkeys((4, 5, 10, 16), ("int32_data", 16)),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26), ("int32_data", 8)),
}
_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True)
class OnnxFile:
    """A file that passed the checks.

    Attributes:
        path: the file, as it was named.
        real: the file itself, where `path` is a link: to be opened in its place, since libraries
            look for external data beside the name that they are given.
        model: the `onnx.ModelProto`, without the external data.
        sidecars: the files with external data, by the location that the model calls them.
    """

    path: Path
    real: Path
    model: Any
    sidecars: dict[str, Path]

    @property
    def metadata(self) -> dict[str, str]:
        """The model's `metadata_props`."""
        return {item.key: item.value for item in self.model.metadata_props}


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read an ONNX file and check all that can be checked without running it.

    Args:
        path: the file. It may be a link; external data are looked for beside what it points to, and
            may not be links themselves.

    Raises:
        OnnxFileError: there is no such file, it is no complete ONNX model, its tensors hold less or
            more than their shapes say, its graph has a cycle, a value of no origin or two values of
            one name, or its external data are missing.
        UnsafeFileError: its external data lie outside its folder, behind a link or in the file
            itself, or a shape in it asks for memory that nothing in the file explains.
    """
    path = Path(path)
    model = _parsed(path, regular_content(path))
    try:
        check_structure(model, str(path))
        sidecars: dict[str, Path] = {}
        for place, tensor in _tensors(model, path):
            if tensor.data_location == _EXTERNAL:
                location, file = _external(path, place, tensor)
                sidecars[location] = file
            else:
                _check_content(place, tensor)
    except UnicodeError as error:
        raise _broken(path, "it holds text that is not UTF-8") from error
    return OnnxFile(path, path.resolve(), model, dict(sorted(sidecars.items())))


def regular_content(path: Path) -> bytes:
    """Return the bytes of a regular file of less than 2 GiB.

    Raises:
        OnnxFileError: there is no such file, or it is none: a folder, a pipe, a device.
    """
    try:
        # A pipe would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | _CLOSE_ON_EXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OnnxFileError("this is no file", where=str(path), fix="check the path")
            if found.st_size >= _MOST_BYTES:
                raise UnsafeFileError(
                    "an ONNX file has less than 2 GiB",
                    where=f"{path} ({found.st_size} bytes)",
                    fix="keep its weights in external data",
                )
            return file.read()
    except FileNotFoundError as error:
        raise OnnxFileError(
            "there is no such file", where=str(path), fix="check the path"
        ) from error
    except IsADirectoryError as error:
        raise OnnxFileError("this is no file", where=str(path), fix="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OnnxFileError(
            f"the file cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix="check the path",
        ) from error


_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)


def _parsed(path: Path, content: bytes) -> Any:
    import onnx

    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf has error classes of its own
        raise _broken(path, first_line(error), len(content)) from error
    if not model.graph.node and not model.graph.output:
        raise _broken(path, "", len(content))
    return model


def _broken(path: Path, why: str, size: int | None = None) -> OnnxFileError:
    return OnnxFileError(
        "the file is not a complete ONNX model" + (f": {why}" if why else ""),
        where=str(path) if size is None else f"{path} ({size} bytes)",
        fix="export it again; a download may have been cut short",
    )


# --- tensors -------------------------------------------------------------------------------------


def _tensors(model: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, tensor) for every tensor of a model, those of sparse ones included."""
    for place, body in bodies(model):
        for tensor in getattr(body, "initializer", ()):
            yield f"{path}, {place}initializer {tensor.name!r}", tensor
        for sparse in getattr(body, "sparse_initializer", ()):
            yield from _sparse(f"{path}, {place}sparse initializer {sparse.values.name!r}", sparse)
        for node in body.node:
            for attribute in node.attribute:
                where = f"{path}, {place}node {node.name!r}, attribute {attribute.name!r}"
                yield from _of_attribute(where, attribute)
        for attribute in getattr(body, "attribute_proto", ()):
            yield from _of_attribute(f"{path}, {place}attribute {attribute.name!r}", attribute)


def _of_attribute(place: str, attribute: Any) -> Iterator[tuple[str, Any]]:
    if attribute.HasField("t"):
        yield place, attribute.t
    for tensor in attribute.tensors:
        yield place, tensor
    if attribute.HasField("sparse_tensor"):
        yield from _sparse(place, attribute.sparse_tensor)
    for sparse in attribute.sparse_tensors:
        yield from _sparse(place, sparse)


def _sparse(place: str, sparse: Any) -> Iterator[tuple[str, Any]]:
    """Check a sparse tensor as a whole, and yield what it is made of."""
    size = _bytes(place, sparse.dims, sparse.values.data_type)
    if size > MOST_DENSE:
        raise UnsafeFileError(
            f"a sparse tensor of shape {_shape(sparse.dims)} takes {size} bytes when filled in",
            where=place,
            fix=f"keep a tensor of more than {MOST_DENSE} bytes dense, so that the file shows it",
        )
    for part, name in ((sparse.values, "values"), (sparse.indices, "indices")):
        if part.data_location == _EXTERNAL:
            raise UnsafeFileError(
                f"the {name} of a sparse tensor lie outside the file", where=place, fix=_KEEP_INSIDE
            )
        _check_content(place, part)
    _check_indices(place, sparse)
    yield place, sparse.values
    yield place, sparse.indices


_KEEP_INSIDE = "save the model with them inside"


def _check_indices(place: str, sparse: Any) -> None:
    """Check that indices are whole numbers, ascending, inside the shape, one for each value."""
    from onnx import numpy_helper

    count, dims = prod(sparse.values.dims), list(sparse.dims)
    shape = tuple(sparse.indices.dims)
    if len(sparse.values.dims) != 1 or sparse.indices.data_type != _INT64:
        raise OnnxFileError("a sparse tensor's values are no list with int64 indices", where=place)
    if shape not in ((count,), (count, len(dims))):
        raise OnnxFileError(
            f"a sparse tensor has {count} values and indices of shape {shape}", where=place
        )
    indices = numpy_helper.to_array(sparse.indices)
    limits = dims if len(shape) == 2 else [prod(dims)]
    columns = indices.reshape(count, len(limits))
    flat = [0] * count
    for column, limit in zip(columns.T.tolist(), limits, strict=True):
        if any(not 0 <= index < limit for index in column):
            raise UnsafeFileError(
                f"a sparse tensor of shape {_shape(dims)} has an index outside it", where=place
            )
        flat = [before * limit + index for before, index in zip(flat, column, strict=True)]
    if any(b <= a for a, b in pairwise(flat)):
        raise OnnxFileError(
            "the indices of a sparse tensor are not in ascending order", where=place
        )


def _check_content(place: str, tensor: Any) -> None:
    """Check that a tensor in the file holds as many bytes or entries as its shape says."""
    size = _bytes(place, tensor.dims, tensor.data_type)
    if tensor.external_data:
        raise OnnxFileError("a tensor lies in the file and outside it", where=place)
    if tensor.data_type == _STRING:
        found, wanted, what = len(tensor.string_data), size, "strings"
    elif tensor.HasField("raw_data"):
        found, wanted, what = len(tensor.raw_data), size, "bytes"
    else:
        field, bits = _FIELDS[tensor.data_type]
        found, what = len(getattr(tensor, field)), "entries"
        wanted = -(-size * 8 // bits)
    if found != wanted:
        raise OnnxFileError(
            f"a tensor of shape {_shape(tensor.dims)} holds {found} {what} instead of {wanted}",
            where=place,
            fix="export it again; the file is damaged",
        )


def _bytes(place: str, dims: Any, data_type: int) -> int:
    """Return the bytes that a tensor takes (for strings: their number)."""
    if data_type != _STRING and data_type not in _BITS:
        raise OnnxFileError(f"a tensor has the unknown element type {data_type}", where=place)
    if any(size < 0 for size in dims):
        raise OnnxFileError(f"a tensor has the shape {_shape(dims)}", where=place)
    # Sizes beside a 0 count too: code that multiplies them from the left overflows.
    whole = prod(size for size in dims if size)
    if len(dims) > 64 or whole >= 2**60:
        raise UnsafeFileError(f"a tensor has the absurd shape {_shape(dims)}", where=place)
    return -(-prod(dims) * _BITS.get(data_type, 8) // 8)


def _shape(dims: Any) -> str:
    return "x".join(map(str, dims[:8])) + ("x…" if len(dims) > 8 else "") or "()"


# --- external data -------------------------------------------------------------------------------


def _external(path: Path, place: str, tensor: Any) -> tuple[str, Path]:
    """Check where a tensor's external data lie; return their location and the file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not set(entries) <= _KEYS:
        raise OnnxFileError(
            f"external data are told by {', '.join(repr(e.key) for e in tensor.external_data[:8])}",
            where=place,
            fix=f"each of {', '.join(sorted(_KEYS))} once at most",
        )
    if tensor.HasField("raw_data"):
        raise OnnxFileError("a tensor lies in the file and outside it", where=place)
    if tensor.data_type == _STRING:
        raise OnnxFileError("strings cannot lie outside the file", where=place)
    location = entries.get("location", "")
    file = sidecar(path, location, place)
    size = _bytes(place, tensor.dims, tensor.data_type)
    offset, length = (_number(entries, key, place) for key in ("offset", "length"))
    if length is not None and length != size:
        raise OnnxFileError(
            f"a tensor of shape {_shape(tensor.dims)} takes {size} bytes, and its external data "
            f"are {length}",
            where=place,
        )
    there = file.stat().st_size
    if (offset or 0) + size > there:
        raise OnnxFileError(
            f"external data end at byte {(offset or 0) + size} of a file of {there} bytes",
            where=f"{place}: {location}",
            fix="copy the file again; it is cut short, or another model's",
        )
    return location, file


def _number(entries: dict[str, str], key: str, place: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise OnnxFileError(f"the {key} of external data is {text[:40]!r}", where=place)
    return int(text)


def sidecar(path: Path, location: str, place: str) -> Path:
    """Return the file that a location names, if it is a file of its own in the model's folder.

    Raises:
        UnsafeFileError: it leads out of the folder, through a link, or to the model itself.
        OnnxFileError: there is no such file.
    """
    where = f"{place}: {location[:200]!r}"
    parts = location.split("/")
    # A backslash and a drive lead out on Windows; "*" is onnxruntime's mark of a memory address.
    strange = re.search(r"[\\\0*]|^[A-Za-z]:", location) or len(location) > 1000
    if not location or strange or any(part in ("", ".", "..") for part in parts):
        raise UnsafeFileError(
            "external data lie in a file named by a plain path below the model's folder",
            where=where,
            fix="save the model again with its external data beside it",
        )
    folder = path.resolve().parent
    file = folder
    for part in parts:
        file = file / part
        try:
            mode = file.lstat().st_mode
        except OSError as error:
            raise OnnxFileError(
                f"the model's external data are missing: {error.strerror or error}",
                where=where,
                fix=f"put {location[:200]} beside the model",
            ) from error
        if stat.S_ISLNK(mode):
            raise UnsafeFileError(
                "external data lie behind a symbolic link",
                where=where,
                fix="copy the file to where the link is (cp -L)",
            )
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFileError("external data lie in what is no file", where=where)
    if found.st_nlink > 1:
        raise UnsafeFileError(
            "external data lie in a file that has another name too (a hard link)",
            where=where,
            fix="copy it: the other name may be any file of this disk",
        )
    if file == path.resolve():
        raise UnsafeFileError("external data lie in the model file itself", where=where)
    return file
