"""The caller's own inputs: tensors, an iterable of calls, a file or a folder of arrays."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.verify.cases import Case, has_axis, leaves

_FIX = "a tensor, a tuple of forward's arguments, an iterable of these, or a folder of .npy files"
_ENDINGS = (".npy", ".npz")


def given_cases(inputs: Any, names: Collection[str] = ()) -> Iterator[Case]:
    """Yield the caller's calls, one at a time: nothing is read before it is needed.

    Args:
        inputs: a tensor or an array; a tuple or mapping of forward's arguments; a list, generator
            or other iterable of such calls, where a list stands for a tuple, as data loaders
            return it; or the path of an .npy or .npz file, or of a folder of such files, each of
            which is one call.
        names: of forward's arguments, which an .npz of several arrays has to name them by.

    Raises:
        ArgumentTypeError: something else was given, or nothing.
        ArgumentError: a file that cannot be read, a folder without arrays.
    """
    if isinstance(inputs, str | os.PathLike):
        yield from _files(Path(inputs), names)
        return
    one = _call(inputs)
    if one is not None:
        yield _case("yours", one)
        return
    if not isinstance(inputs, Iterable):
        raise ArgumentTypeError(f"inputs holds a {type(inputs).__name__}", fix=_FIX)
    single = False
    if isinstance(inputs, Sequence):  # what is there at once is checked at once
        single = len(inputs) == 1
        for item in inputs:
            _checked(item)
    index = -1
    for index, item in enumerate(inputs):
        yield _case("yours" if single else f"yours {index}", _checked(item))
    if index < 0:
        raise ArgumentTypeError("inputs holds no tensor", fix="pass a tensor, or leave it out")


def check_path(inputs: Any) -> None:
    """Refuse a path that does not exist, before the long part rather than after it.

    Raises:
        ArgumentError: there is nothing there.
    """
    if isinstance(inputs, str | os.PathLike) and not os.path.exists(inputs):
        raise ArgumentError(
            "the inputs cannot be read: there is no such file or folder",
            where=os.fspath(inputs),
            fix="an .npy or .npz file, or a folder of them",
        )


def _call(value: Any) -> tuple[Any, ...] | Mapping[str, Any] | None:
    """Return the arguments of one call, or None where a value is none."""
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        return (value,)
    return value if isinstance(value, tuple | Mapping) else None


def _checked(item: Any) -> tuple[Any, ...] | Mapping[str, Any]:
    call = tuple(item) if isinstance(item, list) else _call(item)
    if call is None:
        raise ArgumentTypeError(f"inputs holds a {type(item).__name__}", fix=_FIX)
    return call


def _case(label: str, call: tuple[Any, ...] | Mapping[str, Any]) -> Case:
    def tensor(leaf: Any) -> Any:
        return torch.as_tensor(leaf) if hasattr(leaf, "__array_interface__") else leaf

    if isinstance(call, Mapping):
        case = Case(label, (), pytree.tree_map(tensor, dict(call)))
    else:
        case = Case(label, pytree.tree_map(tensor, call), {})
    if not any(isinstance(leaf, Tensor) for leaf in leaves(case)):
        raise ArgumentTypeError("inputs holds no tensor", fix="pass a tensor, or leave it out")
    return case


def _files(path: Path, names: Collection[str]) -> Iterator[Case]:
    if not path.is_dir():
        yield _case("yours", read_arrays(path, names))
        return
    found = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
    if not found:
        raise ArgumentError(
            "the folder holds no .npy or .npz file", where=str(path), fix="one file for each call"
        )
    for file in found:
        yield _case(f"yours {file.name}", read_arrays(file, names))


def read_arrays(
    path: str | os.PathLike[str], names: Collection[str] = ()
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Read the arrays of an .npy or .npz file, without running anything pickled in it.

    Args:
        path: the file.
        names: of forward's arguments. The arrays of an .npz that bear such names are returned by
            name; one array, and arrays that numpy named ("arr_0", …), by position.

    Raises:
        ArgumentError: it cannot be read, holds what is no array of numbers, or several arrays of
            other names.
    """
    import numpy

    try:
        with open(path, "rb") as file:
            read = numpy.load(file, allow_pickle=False)
            if isinstance(read, numpy.ndarray):
                return (torch.from_numpy(read),)
            arrays = {str(key): torch.from_numpy(read[key]) for key in read}
    except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
        raise ArgumentError(
            f"the inputs cannot be read: {error}", where=os.fspath(path), fix="an .npy or .npz file"
        ) from error
    if arrays and names and set(arrays) <= set(names):
        return arrays
    # Which of several is which is not to be guessed: files keep them in the order of writing.
    if names and len(arrays) > 1 and set(arrays) != {f"arr_{i}" for i in range(len(arrays))}:
        raise ArgumentError(
            f"the arrays are named {', '.join(arrays)}, and forward takes {', '.join(names)}",
            where=os.fspath(path),
            fix="name them as forward does, in numpy.savez(path, name=array), or give no names",
        )
    return tuple(arrays.values())


def variations(
    case: Case, seeds: Sequence[int], batch_sizes: Sequence[int] | None
) -> Iterator[Case]:
    """Yield the caller's case with slightly smaller numbers, and in other batch sizes.

    Each float is shrunk by less than one part in 128, which keeps its sign and range and draws its
    rounding anew; batches are put together from the case's own rows.

    Args:
        case: one of the caller's own.
        seeds: as in `random_cases`.
        batch_sizes: None where the candidate's batch is fixed.
    """
    rows = next((leaf.shape[0] for leaf in leaves(case) if has_axis(leaf)), None)
    sizes = (rows,) if batch_sizes is None or not rows else batch_sizes
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            picks = None
            if rows and size != rows:
                picks = torch.randint(rows, (size or 1,), generator=generator)

            def vary(
                leaf: Any, picks: Tensor | None = picks, noise: torch.Generator = generator
            ) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                if picks is not None and has_axis(leaf) and leaf.shape[0] == rows:
                    leaf = leaf[picks.to(leaf.device)]
                if not leaf.is_floating_point():
                    return leaf
                shrink = torch.rand(leaf.shape, generator=noise, dtype=torch.float64) / 128
                return (leaf.double() * (1 - shrink.to(leaf.device))).to(leaf.dtype)

            args, kwargs = pytree.tree_map(vary, (case.args, dict(case.kwargs)))
            label = f"{case.label} varied, seed {seed}"
            if size is not None:
                label += f", batch {size}"
            yield Case(label, args, kwargs, optional=size != rows)
