"""Inputs of a comparison: given as files and streams, or made up for every open axis."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, VerifyError
from dropsurgery.verify.cases import Spec, draw, other_symbols
from dropsurgery.verify.given import given_cases, read_arrays
from dropsurgery.verify.specs import bounded, guessed_specs


class Scale(nn.Module):
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return x * 2 if factor is None else x * factor


def labels(inputs: Any, model: nn.Module | None = None) -> tuple[str, ...]:
    model = model or Scale()
    verdict = ds.verify(model, model, inputs, seeds=(0,), batch_sizes=(1,))
    assert verdict.ok, str(verdict)
    return tuple(label for label in verdict.inputs if "varied" not in label)


# Given


def test_a_generator_is_read_one_call_at_a_time() -> None:
    drawn: list[str] = []

    def stream() -> Iterator[Tensor]:
        for index in range(4):
            drawn.append(f"made {index}")
            yield torch.randn(2, 3)

    def tell(label: str) -> None:
        drawn.append(label)

    verdict = ds.verify(Scale(), Scale(), stream(), seeds=(0,), progress=tell)
    assert verdict.ok
    assert drawn[:4] == ["made 0", "yours 0", "made 1", "yours 1"]


def test_what_a_data_loader_returns() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.rand(6, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert labels(loader) == ("yours 0", "yours 1", "yours 2", "yours 2, faint")


def test_arrays_are_tensors() -> None:
    array = numpy.random.default_rng(0).standard_normal((2, 3), dtype=numpy.float32)
    assert labels(array) == ("yours", "yours, faint")
    assert labels((array, array))[0] == "yours"
    assert labels([{"x": array, "factor": torch.ones(2, 3)}])[0] == "yours"


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    numpy.save(tmp_path / "b.npy", numpy.ones((2, 3), "float32"))
    numpy.savez(
        tmp_path / "a.npz",
        factor=numpy.full((2, 3), 3, "float32"),
        x=numpy.ones((2, 3), "float32"),
    )
    (tmp_path / "notes.txt").write_text("no array")
    assert labels(tmp_path)[:2] == ("yours a.npz", "yours b.npy")
    assert labels(str(tmp_path / "b.npy"))[0] == "yours"


def test_arrays_are_told_by_name(tmp_path: Path) -> None:
    one, two = numpy.ones((2, 3), "float32"), numpy.full((2, 3), 3, "float32")
    path = tmp_path / "a.npz"
    numpy.savez(path, factor=two, x=one)
    assert isinstance(read_arrays(path, ("x", "factor")), dict)
    # Nobody knows which is which.
    for names in (("x",), ("x", "scale"), ("a", "b")):
        with pytest.raises(ArgumentError, match="arrays are named factor, x, and forward takes"):
            read_arrays(path, names)
    numpy.savez(path, one, x=two)
    with pytest.raises(ArgumentError, match="arrays are named x, arr_0, and"):
        read_arrays(path, ("x", "factor"))
    # In numpy's own numbering, and where there is but one.
    numpy.savez(path, one, two)
    found = read_arrays(path, ("x", "factor"))
    assert isinstance(found, tuple)
    assert [float(array[0, 0]) for array in found] == [1, 3]
    numpy.savez(path, pixels=two)
    assert isinstance(read_arrays(path, ("x", "factor")), tuple)
    (tmp_path / "folder").mkdir()
    numpy.savez(tmp_path / "folder" / "b.npz", wrong=one, x=two)
    with pytest.raises(ArgumentError, match="arrays are named wrong, x, and forward takes x, f"):
        ds.verify(Scale(), Scale(), tmp_path / "folder")


def test_folders_and_files_that_hold_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"the folder holds no \.npy or \.npz file"):
        ds.verify(Scale(), Scale(), tmp_path)
    with pytest.raises(ArgumentError, match="the inputs cannot be read"):
        ds.verify(Scale(), Scale(), tmp_path / "none.npy")
    (tmp_path / "pickled.npy").write_bytes(b"\x80\x04N.")
    numpy.save(tmp_path / "text.npy", numpy.array(["a"]))
    numpy.save(tmp_path / "object.npy", numpy.array([{}], dtype=object))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2**60,)}"
    (tmp_path / "huge.npy").write_bytes(header.ljust(127) + b"\n")
    for name in ("pickled.npy", "text.npy", "object.npy", "huge.npy"):
        with pytest.raises(ArgumentError, match="the inputs cannot be read"):
            read_arrays(tmp_path / name)


def test_a_later_call_without_tensors_is_refused() -> None:
    cases = given_cases([torch.ones(1), (3,)])
    next(cases)
    with pytest.raises(ArgumentTypeError, match="inputs holds no tensor"):
        next(cases)


# Streaming


SEEN: list[weakref.ref[Tensor]] = []
ALIVE: list[int] = []


def watched(tensor: Tensor) -> Tensor:
    SEEN.append(weakref.ref(tensor))
    ALIVE.append(sum(ref() is not None for ref in SEEN))
    return tensor


class Watched(nn.Module):
    """Counts those of its outputs that somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return watched(self.fc(x))


def test_memory_does_not_grow_with_the_number_of_inputs() -> None:
    model = Watched()
    most = []
    for count in (3, 40):
        SEEN.clear()
        ALIVE.clear()
        stream = (watched(torch.randn(7, 64)) for _ in range(count))
        verdict = ds.verify(model, model, stream, seeds=(0,), batch_sizes=(7,))
        assert verdict.ok
        assert len(verdict.inputs) == count + 2
        assert len(SEEN) > 4 * count
        most.append(max(ALIVE))
    assert most[0] == most[1] <= 8


def test_models_are_freed_when_the_comparison_is_over() -> None:
    model = Scale()
    model.weight = nn.Parameter(torch.ones(3))
    watch = weakref.ref(model.weight)
    ds.verify(model, model, torch.ones(2, 3), seeds=(0,))
    del model
    gc.collect()
    assert watch() is None


# Made up for a file


def written(path: Path, shape: list[Any], nodes: list[Any], rank: int | None = None) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * (rank or len(shape)))],
        [helper.make_tensor("target", TensorProto.INT64, [2], [-1, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def relu() -> list[Any]:
    return [helper.make_node("Relu", ["x"], ["output"])]


def test_every_open_axis_is_swept(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", ["N", "length"], relu())
    verdict = ds.verify(nn.ReLU(), path, seeds=(5,))
    assert verdict.ok, str(verdict)
    assert verdict.inputs == (
        "seed 5, batch 1, length 16",
        "seed 5, batch 3, length 16",
        "seed 5, batch 3, length 17",
        "seed 5, batch 3, length 1",
        "seed 5, batch 3, length 16, faint",
    )


def test_a_size_that_was_baked_in_is_found(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "target"], ["y"])]
    nodes.append(helper.make_node("Relu", ["y"], ["output"]))
    path = written(tmp_path / "m.onnx", ["N", "length"], nodes)
    verdict = ds.verify(nn.ReLU(), path)
    assert not verdict.ok
    text = str(verdict)
    assert "length 17" in text


def test_images_and_axes_without_names(tmp_path: Path) -> None:
    class Strided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] % 32 or x.shape[3] % 32:
                raise ValueError("sides are multiples of 32")
            return torch.relu(x)

    path = written(tmp_path / "m.onnx", ["N", 3, None, "w"], relu())
    verdict = ds.verify(Strided(), path, seeds=(0,), batch_sizes=(2,))
    assert verdict.ok
    assert verdict.inputs[:3] == (
        "seed 0, batch 2, x.2 64, w 64",
        "seed 0, batch 2, x.2 96, w 64",
        "seed 0, batch 2, x.2 64, w 96",
    )


def test_the_same_name_is_the_same_size(tmp_path: Path) -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != x.shape[2]:
                raise ValueError("not square")
            return torch.relu(x)

    path = written(tmp_path / "m.onnx", ["N", "side", "side"], relu())
    assert ds.verify(Square(), path).ok


def test_sizes_may_be_computed_from_others() -> None:
    spec = Spec("x", torch.float32, ("batch", "length", "2*length + 1"))
    assert other_symbols([spec]) == ["length"]
    assert spec.sized({"batch": 3, "length": 4}) == [3, 4, 9]
    odd = Spec("x", torch.float32, ("batch", "length**2"))
    with pytest.raises(VerifyError, match="cannot be computed"):
        odd.sized({"batch": 1, "length": 2})


def test_axes_that_the_reference_fixes_are_noted(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 32:
                raise ValueError("32, please")
            return torch.relu(x)

    path = written(tmp_path / "m.onnx", ["N", "length"], relu())
    verdict = ds.verify(Fixed(), path, seeds=(0,), batch_sizes=(1,))
    assert "the file's axis 'length' was tried in one size, 32" in " ".join(verdict.notes)

    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("never")

    with pytest.raises(VerifyError, match="no size was found for the open axes length"):
        ds.verify(Never(), path)


def test_own_inputs_leave_axes_untried(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", ["N", "length"], relu())
    verdict = ds.verify(nn.ReLU(), path, torch.randn(2, 9))
    assert verdict.ok
    assert "the file's axis 'length' was tried in the sizes of your inputs only" in verdict.notes


# Token ids and masks


class Encoder(nn.Module):
    """Positions, segments and tokens, with a mask of one kind or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.tokens = nn.Embedding(50, 8)
        self.segments = nn.Embedding(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Tensor, segment_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.segments(segment_ids)
        if self.kind == "bool":
            hidden = attention_mask  # true: left out
            if attention_mask.dtype != torch.bool:
                raise TypeError("a boolean mask, please")
        elif self.kind == "int":
            if attention_mask.dtype != torch.int64:
                raise TypeError("an integer mask, please")
            hidden = attention_mask == 0
        else:
            hidden = (1 - attention_mask) * -1e4
        return self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_masks_and_tokens_are_made_up(kind: str, tmp_path: Path) -> None:
    model = Encoder(kind).eval()
    dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[kind]
    ids = torch.randint(2, (2, 6))
    path = ds.export_onnx(
        model, tmp_path / "m.onnx", (ids, ids, torch.tensor([[1, 1, 1, 0, 0, 0]] * 2).to(dtype))
    )
    for candidate in (path, model):
        verdict = ds.verify(model, candidate)
        assert verdict.ok, str(verdict)
        assert verdict.tested
    # A row of the table that a bound by the smallest table would never look up.
    changed = Encoder(kind).eval()
    changed.tokens.weight.data[40:] += 0.1
    assert not ds.verify(changed, path).ok


def test_every_row_of_a_mask_keeps_some_and_hides_some() -> None:
    spec = Spec("attention_mask", torch.bool, (64, 5))
    mask = draw(spec, [64, 5], 0, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool
    assert mask[:, 0].all()
    assert not mask[:, -1].any()
    assert len(mask.sum(1).unique()) == 4
    assert draw(spec, [2, 1], 0, torch.Generator().manual_seed(0)).all()
    floats = draw(Spec("mask", torch.float32, (8, 4)), [8, 4], 0, torch.Generator().manual_seed(0))
    assert set(floats.flatten().tolist()) == {0.0, 1.0}


def test_indices_are_bounded_by_their_own_table() -> None:
    model = Encoder("int")
    specs = [Spec(n, torch.int64, ("batch", 6)) for n in ("input_ids", "segment_ids", "mask")]
    ids = torch.tensor([[0, 1, 0, 1, 1, 0]])
    tensors = [ids, 1 - ids, torch.ones_like(ids)]
    found = bounded(specs, tensors, lambda: model(*tensors))
    assert [spec.high for spec in found] == [50, 2, 2]


def test_what_several_arguments_look_like() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
            return self.fc(left * right) * mask[:, None].to(left.dtype)

    specs = guessed_specs(Pair())
    assert [s.name for s in specs[0]] == ["left", "right", "mask"]
    assert [s[2].dtype for s in specs[:3]] == [torch.bool, torch.int64, torch.float32]
    with pytest.raises(VerifyError, match="cannot be told from the network"):
        guessed_specs(nn.Bilinear(2, 2, 2))


def test_labels_tell_the_seeds() -> None:
    verdict = ds.verify(nn.Linear(3, 2), nn.Linear(3, 2), seeds=(11, 12))
    assert {label.split(",")[0] for label in verdict.inputs} == {"seed 11", "seed 12"}
