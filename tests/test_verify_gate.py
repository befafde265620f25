"""The arithmetic of the gate, on tensors: for each rule what passes and what does not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError, ProviderError
from dropsurgery.verify import Gate, providers
from dropsurgery.verify.float64 import Float64
from dropsurgery.verify.gate import Ratio, Tally, errors, unit, widened

EPS = torch.finfo(torch.float32).eps


def tally(*rows: tuple[Tensor, Tensor, Tensor]) -> Tally:
    result = Tally(rows[0][0].dtype)
    for index, (native, wide, candidate) in enumerate(rows):
        result.add(native, wide, candidate, f"input {index}")
    return result


def ratios(*rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Ratio]:
    found = errors(tally(*rows), Gate())
    assert found is not None
    return {ratio.kind: ratio for ratio in found.ratios}


def noisy(
    seed: int, size: tuple[int, ...] = (4, 500), *, own: float = 1.0, other: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """An output, its float64 run and a candidate's, with independent errors of a few eps."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(size, generator=generator, dtype=torch.float64)

    def error(scale: float) -> Tensor:
        return 8 * scale * EPS * torch.randn(size, generator=generator, dtype=torch.float64)

    return (exact + error(own)).float(), exact, (exact + error(other)).float()


def test_equal_errors_have_ratios_of_one() -> None:
    found = ratios(*(noisy(seed) for seed in range(6)))
    assert list(found) == ["rmse", "max", "typical", "mean"]
    assert all(ratio.value == pytest.approx(1, abs=0.25) for ratio in found.values())
    assert all(ratio.ok for ratio in found.values())


def test_ratios_measure_how_much_larger_an_error_is() -> None:
    found = ratios(*(noisy(seed, other=10) for seed in range(6)))
    assert all(ratio.value == pytest.approx(10, rel=0.3) for ratio in found.values())
    assert not any(ratio.ok for ratio in found.values())


def test_scale_does_not_matter() -> None:
    small = ratios(*(noisy(seed, other=2) for seed in range(3)))
    large = ratios(*(tuple(t * 2.0**40 for t in noisy(seed, other=2)) for seed in range(3)))  # type: ignore[misc]
    assert {k: r.value for k, r in small.items()} == pytest.approx(
        {k: r.value for k, r in large.items()}
    )


def test_each_input_counts_the_same_whatever_its_scale() -> None:
    wrong = noisy(0, other=20)
    right = [tuple(1e6 * t for t in noisy(seed)) for seed in (1, 2)]
    assert not ratios(wrong, *right)["rmse"].ok  # type: ignore[arg-type]


def test_a_reference_that_is_exact_by_luck_does_not_fail_rounding() -> None:
    exact = torch.randn(4, 100, dtype=torch.float64).float().double()
    native = exact.float()
    assert all(r.ok for r in ratios((native, exact, native)).values())
    last_bit = torch.nextafter(native, torch.tensor(math.inf))
    assert all(r.ok for r in ratios((native, exact, last_bit)).values())
    assert not ratios((native, exact, (exact * (1 + 20 * EPS)).float()))["rmse"].ok


def test_few_values_widen_the_limits() -> None:
    assert widened(3, 10**8) == pytest.approx(3, rel=1e-3)
    assert widened(3, 16) == pytest.approx(3 * math.e)
    alarms = 0
    for seed in range(0, 4000, 10):  # one number an input, ten inputs
        found = ratios(*(noisy(seed + i, (1, 1)) for i in range(10)))
        alarms += not all(ratio.ok for ratio in found.values())
    assert alarms == 0


def test_a_single_value_that_is_wrong_is_still_caught() -> None:
    rows = [noisy(seed, (1, 1), other=300) for seed in range(10)]
    assert not all(ratio.ok for ratio in ratios(*rows).values())


def test_an_offset_below_the_noise_shows_in_the_mean() -> None:
    rows = [noisy(seed, (8, 500)) for seed in range(12)]
    shift = 10 * EPS
    shifted = [(a, b, (c.double() + shift).float()) for a, b, c in rows]
    found = ratios(*shifted)
    assert found["rmse"].ok
    assert not found["mean"].ok


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, "3", None])
def test_limits_are_positive_numbers(limit: object) -> None:
    with pytest.raises(ArgumentError, match=r"Gate\.typical is"):
        Gate(typical=limit)  # type: ignore[arg-type]


def test_a_reference_that_keeps_its_digits() -> None:
    known = tally(*(noisy(seed) for seed in range(3)))
    native, wide, _ = noisy(7)
    assert known.keeps_digits(native * 2.0**-40, wide * 2.0**-40)
    assert not known.keeps_digits(native * 2.0**-80, wide * 2.0**-80)
    assert not known.keeps_digits(native, wide * (1 + 1e-4))
    assert not known.keeps_digits(torch.full_like(native, math.nan), wide)
    assert not known.keeps_digits(torch.zeros_like(native), torch.zeros_like(wide))
    assert not Tally(torch.float32).keeps_digits(native, wide)


def test_an_output_of_zeros() -> None:
    zeros = torch.zeros(2, 5)
    assert all(r.ok for r in ratios((zeros, zeros.double(), zeros)).values())
    assert not ratios((zeros, zeros.double(), zeros + 1e-3))["rmse"].ok
    # Zero on one input only: measured by its size on the others.
    normal = noisy(0, (2, 5))
    assert not ratios(normal, (zeros, zeros.double(), zeros + 1e-3))["rmse"].ok


@pytest.mark.parametrize(
    ("native", "candidate", "problem"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"shape \(3, 2\) instead of \(2, 3\)"),
        (torch.ones(2, 1), torch.ones(1, 2), r"shape \(1, 2\) instead of \(2, 1\)"),
        (torch.ones(2), torch.ones(2).half(), "dtype float16 instead of float32"),
        (torch.ones(2), torch.tensor([1, math.nan]), "1 of 2 values are NaN"),
        (torch.tensor([1, math.nan]), torch.tensor([1, math.nan]), "reference itself returns NaN"),
        (torch.tensor([1, math.nan]), torch.ones(2), "reference itself returns NaN"),
        (torch.tensor([1, math.inf]), torch.ones(2), "infinite where the reference is finite"),
        (torch.ones(2), torch.tensor([1, math.inf]), "infinite where the reference is finite"),
        (torch.tensor([math.inf]), torch.tensor([-math.inf]), "infinities of the other sign"),
    ],
)
def test_what_no_tolerance_covers(native: Tensor, candidate: Tensor, problem: str) -> None:
    result = tally((native, native.double(), candidate))
    assert problem.replace("\\", "") in result.problem
    assert result.problem.endswith("(input 0)")


def test_equal_infinities_are_left_out_of_the_errors() -> None:
    native, wide, candidate = noisy(0)
    for tensor in (native, wide, candidate):
        tensor[:, 7] = -math.inf
    assert all(ratio.ok for ratio in ratios((native, wide, candidate)).values())
    candidate[:, 8] += 1e-3
    assert not all(ratio.ok for ratio in ratios((native, wide, candidate)).values())


def test_integers_and_booleans_are_exact() -> None:
    numbers = torch.tensor([[1, 2, 3]])
    assert tally((numbers, numbers, numbers)).differing == 0
    assert tally((numbers, numbers, numbers + torch.tensor([0, 0, 1]))).differing == 1
    flags = torch.tensor([True, False])
    assert tally((flags, flags, ~flags)).differing == 2
    # No wrapping around: 0 - 255 is not 1.
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8)
    assert tally((bytes_, bytes_, bytes_.flip(0))).differing == 2


def test_complex_outputs_count_both_parts() -> None:
    exact = torch.randn(3, 50, dtype=torch.complex128)
    native = exact.to(torch.complex64)
    assert all(r.ok for r in ratios((native, exact, native)).values())
    wrong = (exact + 1e-4j).to(torch.complex64)
    assert not ratios((native, exact, wrong))["rmse"].ok


def test_the_unit_of_float64_allows_for_accumulated_rounding() -> None:
    assert unit(torch.float32) == EPS
    assert 1e-13 < unit(torch.float64) < 1e-12


# float64 without a copy


class Stubborn(nn.Module):
    """Casts to float32 by itself, and makes tensors that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.act = nn.PReLU()
        self.pair = nn.Bilinear(6, 6, 6)
        self.constant = torch.randn(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).float().to(self.fc.weight.dtype) + self.constant
        y = y.to(torch.float32) + torch.linspace(0, 1, 6)
        y += self.fc.bias
        return self.pair(self.act(y), y).type(torch.float32)


def twin(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).double()


def test_float64_is_float64_throughout() -> None:
    torch.manual_seed(0)
    model, x = Stubborn().eval(), torch.randn(3, 6)
    with torch.no_grad(), Float64():
        wide = model(x.double())
    assert wide.dtype == torch.float64
    w = {key: value.double() for key, value in model.state_dict().items()}
    y = x.double() @ w["fc.weight"].T + w["fc.bias"] + model.constant.double()
    y = y + torch.linspace(0, 1, 6).double() + w["fc.bias"]
    a = torch.where(y > 0, y, w["act.weight"] * y)
    expected = torch.einsum("bi,oij,bj->bo", a, w["pair.weight"], y) + w["pair.bias"]
    torch.testing.assert_close(wide, expected, rtol=1e-13, atol=1e-13)
    assert model.fc.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.GELU()),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.GRU(8, 4, num_layers=2, bidirectional=True, batch_first=True),
        nn.LSTM(8, 4, batch_first=True),
    ],
)
def test_float64_agrees_with_a_copy_of_the_model(model: nn.Module) -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = twin(model.eval())(x)
        with Float64():
            found = model(x)
    expected, found = (o[0] if isinstance(o, tuple) else o for o in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("same", ["query, key, value", "key, value", "none"])
def test_attention_in_float64_is_given_what_lies_in_order(
    batch_first: bool, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x, y, z = (torch.randn(3, 5, 8) for _ in range(3))
    calls = {"query, key, value": (x, x, x), "key, value": (x, y, y), "none": (x, y, z)}[same]
    seen: list[tuple[Tensor, ...]] = []
    project = nn.functional._in_projection_packed

    def watched(*args: Any) -> Any:
        seen.append(args[:3])
        return project(*args)

    monkeypatch.setattr(nn.functional, "_in_projection_packed", watched)
    wide = {id(t): t.double() for t in calls}
    with torch.no_grad(), Float64():
        found = layer(*(wide[id(t)] for t in calls))[0]
    given = seen[0]
    assert all(t.is_contiguous() for t in given)
    assert [given[0] is given[1], given[1] is given[2]] == [
        calls[0] is calls[1],
        calls[1] is calls[2],
    ]
    with torch.no_grad():
        expected = twin(layer)(*(wide[id(t)] for t in calls))[0]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def test_what_containers_hold_is_widened() -> None:
    x, y = torch.randn(3), torch.randn(3)
    with Float64():
        joined = torch.cat([x, y])
        made = torch.zeros(3, dtype=torch.float16)
        largest = torch.stack((x, y)).max(0)
        filtered = nn.functional.conv1d(x[None, None], y[None, None], padding="same")
        assert x.shape == (3,)
    assert {t.dtype for t in (joined, made, largest.values, filtered)} == {torch.float64}
    assert largest.indices.dtype == torch.int64


# Providers


def assigned(*nodes: tuple[str, str, str]) -> list[SimpleNamespace]:
    """What onnxruntime reports: (provider, node name, operator)."""
    return [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda name=name, kind=kind: [SimpleNamespace(name=name, op_type=kind)],
        )
        for provider, name, kind in nodes
    ]


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
EXACT = {CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT", "device_id": "0"}, CPU: {}}


def test_nodes_on_the_provider_are_counted() -> None:
    placed = assigned((CUDA, "a", "Conv"), (CUDA, "b", "Relu"), (CPU, "s", "Shape"))
    shapes = frozenset({"s"})
    found = providers.confirm("cuda", [CUDA, CPU], placed, shapes, EXACT)
    assert found == "CUDA 2/3 nodes; Shape on CPU; TF32 off"
    placed = assigned((CUDA, "a", "Conv"))
    found = providers.confirm("cuda", [CUDA, CPU], placed, frozenset(), EXACT)
    assert found == "CUDA 1/1 nodes; TF32 off"
    placed = assigned((CPU, "a", "Conv"))
    assert providers.confirm("cpu", [CPU], placed, frozenset(), {CPU: {}}) == "CPU 1/1 nodes"


def test_a_node_that_fell_back_is_named() -> None:
    placed = assigned((CUDA, "a", "Conv"), (CPU, "layer1/Resize", "Resize"), (CPU, "s", "Shape"))
    with pytest.raises(ProviderError, match=r"1 of 3 nodes fell back from CUDA") as caught:
        providers.confirm("cuda", [CUDA, CPU], placed, frozenset({"s"}), EXACT)
    assert caught.value.where == "layer1/Resize (Resize)"
    # A node without a name is no shape node, whatever it computes.
    placed = assigned((CUDA, "a", "Conv"), *((CPU, "", "Shape") for _ in range(7)))
    with pytest.raises(ProviderError, match="7 of 8 nodes fell back") as caught:
        providers.confirm("cuda", [CUDA, CPU], placed, frozenset({"s"}), EXACT)
    assert str(caught.value.where).endswith("? (Shape) and 2 more")


def test_a_provider_that_was_dropped_whole() -> None:
    placed = assigned((CPU, "a", "Conv"))
    with pytest.raises(ProviderError, match="onnxruntime dropped CUDAExecutionProvider"):
        providers.confirm("cuda", [CPU], placed, frozenset({"a"}), {CPU: {}})


def test_no_report_is_no_proof() -> None:
    with pytest.raises(ProviderError, match="does not say where its nodes run"):
        providers.confirm("cuda", [CUDA, CPU], [], frozenset(), EXACT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_tf32", "1"), ("use_tf32", None), ("cudnn_conv_algo_search", "EXHAUSTIVE")],
)
def test_an_option_that_was_not_taken(key: str, value: str | None) -> None:
    found = {k: v for k, v in EXACT[CUDA].items() if k != key}
    options = {CUDA: {**found, key: value} if value else found}
    message = f"runs with {key}={value!r} instead of"
    with pytest.raises(ProviderError, match=message):
        providers.confirm(
            "cuda",
            [CUDA],
            assigned((CUDA, "a", "Conv")),
            frozenset(),
            options,  # type: ignore[arg-type]
        )


def test_what_is_asked_for() -> None:
    chosen = providers.session_arguments("cuda")["providers"]
    assert chosen[0] == (CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"})
    assert chosen[1] == CPU
    assert providers.session_options().use_deterministic_compute


def test_a_session_that_is_not_deterministic() -> None:
    session = SimpleNamespace(
        get_session_options=lambda: SimpleNamespace(use_deterministic_compute=False)
    )
    with pytest.raises(ProviderError, match="dropped the option for deterministic computation"):
        providers.confirm_session("cpu", session, frozenset())


def test_a_session_with_a_fake_assignment() -> None:
    session = SimpleNamespace(
        get_session_options=lambda: SimpleNamespace(use_deterministic_compute=True),
        get_providers=lambda: [CUDA, CPU],
        get_provider_graph_assignment_info=lambda: assigned(
            *((CUDA, f"n{i}", "Conv") for i in range(121)), (CPU, "s", "Shape")
        ),
        get_provider_options=lambda: EXACT,
    )
    found = providers.confirm_session("cuda", session, frozenset({"s"}))
    assert found == "CUDA 121/122 nodes; Shape on CPU; TF32 off"


def test_a_provider_that_is_not_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match="this onnxruntime has no CUDAExecutionProvider"):
        providers.check("cuda")
    with pytest.raises(ArgumentError, match="provider is 'tpu'"):
        providers.check("tpu")


def test_shape_nodes_are_those_that_no_data_enters() -> None:
    def node(kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output)

    graph = helper.make_graph(
        [
            node("Shape", ["x"], "shape"),
            node("Gather", ["shape", "zero"], "size"),
            node("Concat", ["size", "zero"], "target"),
            node("Relu", ["x"], "data"),
            node("Reshape", ["data", "target"], "reshaped"),
            node("Cast", ["size"], "number"),
            node("Mul", ["reshaped", "number"], "y"),
            node("Mul", ["zero", "zero"], "constant"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("zero", TensorProto.INT64, [1], [0])],
    )
    assert providers.shape_nodes(graph) == {"shape", "size", "target", "number"}
