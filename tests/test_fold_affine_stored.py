"""FoldAffine and what a network stores beside its layers: tables, tokens, gains, matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from tests.fold_helpers import Chain, Lambda, calls, fold_affine, norms_left, ready, reasons, values

TOKENS = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
SQUARE = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
IDS = torch.tensor([[0, 3, 8, 3, 1], [2, 0, 0, 7, 5]])


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(values(*shape, seed=seed))


def norm(channels: int = 6) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels)


def turned(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm to the last axis of tokens."""
    return layer(x.transpose(1, 2)).transpose(1, 2)


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_takes_scale_and_shift(padding: int | None) -> None:
    """The row of padding is a row like any other in eval."""
    model = ready(
        Lambda(lambda n, x: turned(n.bn, n.e(x) * math.sqrt(6)).sin(),
               e=nn.Embedding(9, 6, padding_idx=padding), bn=norm())
    )  # fmt: skip
    with torch.no_grad():
        model.e.weight[0] = 0.0
        model.bn.weight[1] = 0.0
        model.bn.weight[2] = -0.7
    result = fold_affine(model, IDS)
    assert calls(result.module) == ["Embedding", "transpose", "transpose", "sin"]
    assert result.module.e.padding_idx == padding
    assert result.changes[0].what == "mul 'mul': scale into Embedding 'e'"
    # One factor for all entries needs no shapes; a vector needs the rank.
    without = fold_affine(model, IDS, shapes=False)
    assert calls(without.module).count("mul") == 0


def test_a_looked_up_parameter() -> None:
    model = ready(Lambda(lambda n, x: turned(n.bn, F.embedding(x, n.e, 0)).sin(), e=weight(9, 6),
                         bn=norm()))  # fmt: skip
    result = fold_affine(model, IDS)
    assert calls(result.module) == ["embedding", "transpose", "transpose", "sin"]
    assert result.changes[0].what == (
        "BatchNorm1d 'bn': scale into parameter 'e'; shift into parameter 'e'"
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_take_the_scale_alone(mode: Any) -> None:
    """A bag may be empty (here it holds nothing but padding), and then is zero."""
    model = ready(Lambda(lambda n, x: n.bn(n.e(x)).sin(), bn=norm(),
                         e=nn.EmbeddingBag(9, 6, mode=mode, padding_idx=3)))  # fmt: skip
    ids = torch.tensor([[3, 3, 3], [1, 3, 2]])
    result = fold_affine(model, ids)
    assert calls(result.module) == ["EmbeddingBag", "ChannelShift", "sin"]
    assert "sums the rows of bags, which may be empty" in reasons(result)
    with torch.no_grad():
        model.bn.weight[1] = -0.7
    assert norms_left(fold_affine(model, ids).module) == (mode == "max")


def test_embeddings_that_are_left_alone() -> None:
    def scaled(n: Any, x: Tensor) -> Tensor:
        return (n.e(x) * 2.5).sin()

    capped = ready(Lambda(scaled, e=nn.Embedding(9, 6, max_norm=1.0)))
    with torch.no_grad():  # a first run changes the table
        capped(torch.arange(9))
    assert calls(fold_affine(capped, IDS).module) == ["Embedding", "mul", "sin"]
    capped = ready(Lambda(lambda n, x: turned(n.bn, F.embedding(x, n.e, None, 50.0)).sin(),
                          e=weight(9, 6), bn=norm()))  # fmt: skip
    assert "changes the rows of its table" in reasons(fold_affine(capped, IDS))
    hooked = ready(Lambda(scaled, e=nn.Embedding(9, 6)))
    hooked.e.register_forward_hook(lambda layer, args, y: y.flip(1))
    assert calls(fold_affine(hooked, IDS).module) == ["Embedding", "mul", "sin"]


def test_a_tied_table_is_left_alone() -> None:
    """Copies would be exact, and larger than what they save."""

    def forward(n: Any, x: Tensor) -> Tensor:
        return n.head(turned(n.bn, n.e(x)).sin())

    model = Lambda(forward, e=nn.Embedding(9, 6), bn=norm(), head=nn.Linear(6, 9))
    model.head.weight = model.e.weight
    result = fold_affine(ready(model), IDS)
    assert norms_left(result.module) == 1
    assert "Embedding 'e' is also read by the module 'head'" in reasons(result)
    model = Lambda(
        lambda n, x: F.linear(turned(n.bn, n.e(x)).sin(), n.e.weight), e=nn.Embedding(9, 6),
        bn=norm(),
    )  # fmt: skip
    result = fold_affine(ready(model), IDS)
    assert norms_left(result.module) == 1
    assert "Embedding 'e' is also read by linear" in reasons(result)


def test_an_embedding_called_twice() -> None:
    """Both calls need the same rows, or one gets a copy of them."""
    same = Lambda(lambda n, x: (n.e(x) * 3.0).sin() + (n.e(x.flip(0)) * 3.0).cos(),
                  e=nn.Embedding(9, 6))  # fmt: skip
    result = fold_affine(ready(same), IDS)
    assert calls(result.module).count("mul") == 0
    assert [key for key in result.module.state_dict() if "weight" in key] == ["e.weight"]
    other = Lambda(lambda n, x: (n.e(x) * 3.0).sin() + n.e(x).cos(), e=nn.Embedding(9, 6))
    result = fold_affine(ready(other), IDS)
    assert calls(result.module).count("mul") == 0
    assert result.changes[0].what.endswith("scale into Embedding 'e' (a copy, 'e_folded')")


# --- products with a stored matrix -------------------------------------------------------------

PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "@": lambda n, x: x @ n.w,
    "torch.matmul": lambda n, x: torch.matmul(x, n.w),
    "method": lambda n, x: x.matmul(n.w),
    "named": lambda n, x: torch.matmul(input=x, other=n.w),
    "mm": lambda n, x: torch.mm(x.flatten(0, 1), n.w).reshape(2, 5, -1),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dense", [True, False])
def test_a_product_takes_maps_on_both_sides(name: str, dense: bool) -> None:
    """With a shift it becomes a linear layer, which has a place for it: one node all the same."""
    matrix = values(6, 4) if dense else values(4, 6).t()
    model = ready(
        Lambda(lambda n, x: turned(n.b, PRODUCTS[name](n, turned(n.a, x.sin()))).cos(),
               a=norm(), b=norm(4), w=nn.Parameter(matrix))
    )  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert norms_left(result.module) == 0
    assert calls(result.module).count("Linear") == 1
    assert "w" not in result.module.state_dict()
    assert result.module.w_linear.weight.shape == (4, 6)
    assert "(a linear layer now, 'w_linear')" in result.changes[0].what


def test_a_product_that_takes_scales_only_stays_one() -> None:
    model = ready(Lambda(lambda n, x: ((x.sin() * n.s) @ n.w * n.t).cos(), w=weight(6, 6),
                         s=weight(6, seed=1), t=weight(6, seed=2)))  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert calls(result.module) == ["sin", "matmul", "cos"]
    assert list(result.module.state_dict()) == ["w"]


def test_a_bias_that_is_added_behind_a_product() -> None:
    model = ready(Lambda(lambda n, x: F.gelu(x @ n.w + n.b) @ n.v + n.c, w=weight(6, 8),
                         b=weight(8), v=weight(8, 3), c=values(3)))  # fmt: skip
    assert calls(fold_affine(model, TOKENS).module) == ["Linear", "gelu", "Linear"]


def test_a_saved_surgery_makes_the_linear_layer_again(tmp_path: Any) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ready(
            Lambda(_many, e=nn.Embedding(9, 6), bn=norm(), w=weight(6, 6, seed=seed),
                   pos=weight(5, 6, seed=seed + 1)), seed,
        )  # fmt: skip

    module = fold_affine(build(0), IDS).module
    assert norms_left(module) == 0
    ds.save(module, tmp_path)
    loaded = ds.load(tmp_path, build(4))
    assert torch.equal(loaded(IDS), module(IDS))
    assert loaded.code == module.code


def _many(n: Any, x: Tensor) -> Tensor:
    return turned(n.bn, n.e(x) * 2.0 @ n.w + n.pos).sin()


def test_products_that_are_left_alone() -> None:
    """A square matrix does not tell rows from columns; the ranks and axes do."""
    rows = ready(Lambda(lambda n, x: n.bn(x.sin() @ n.w).cos(), w=weight(6, 6), bn=norm()))
    result = fold_affine(rows, SQUARE)
    assert norms_left(result.module) == 1
    assert "axis 1 of the output of matmul 'matmul' is mapped" in reasons(result)
    # Rows of the first factor are the result's, and it stays a matrix without a bias.
    left = ready(Lambda(lambda n, x: n.bn(n.w @ x.sin()).cos(), w=weight(6, 6), bn=norm()))
    result = fold_affine(left, SQUARE)
    assert calls(result.module) == ["sin", "matmul", "ChannelShift", "cos"]
    forward = ready(Lambda(lambda n, x: (n.w @ n.bn(x.sin())).cos(), w=weight(6, 6), bn=norm()))
    assert norms_left(fold_affine(forward, SQUARE).module) == 1
    both = ready(Lambda(lambda n, x: turned(n.bn, x @ n.w).sin() @ n.w, w=weight(6, 6), bn=norm()))
    result = fold_affine(both, TOKENS)
    assert norms_left(result.module) == 1
    assert "is also read by matmul_1" in reasons(result)


def test_addmm_is_a_linear_layer() -> None:
    """Its bias comes first, and what it reads second; the weight is (inputs, outputs)."""
    model = ready(
        Lambda(lambda n, x: n.b(torch.addmm(n.c, n.a(x.sin()), n.w)).cos(), a=norm(), b=norm(4),
               w=weight(6, 4), c=weight(4))
    )  # fmt: skip
    result = fold_affine(model, TOKENS[0])
    assert calls(result.module) == ["sin", "addmm", "cos"]
    assert norms_left(fold_affine(model, TOKENS[0], shapes=False).module) == 1  # the rank of x
    with torch.no_grad():
        model.b.weight[1] = -0.7
        model.b.weight[2] = 0.0
    assert calls(fold_affine(model, TOKENS[0]).module) == ["sin", "addmm", "cos"]
    scaled = Lambda(lambda n, x: n.b(torch.addmm(n.c, x.sin(), n.w, beta=2.0)).cos(), b=norm(4),
                    w=weight(6, 4), c=weight(4))  # fmt: skip
    assert norms_left(fold_affine(ready(scaled), TOKENS[0]).module) == 1
    spread = Lambda(lambda n, x: n.b(torch.addmm(n.c, x.sin(), n.w)).cos(), b=norm(4),
                    w=weight(6, 4), c=weight(5, 4))  # fmt: skip
    assert norms_left(fold_affine(ready(spread), TOKENS[0]).module) == 1


def test_a_matrix_that_is_turned_takes_scales() -> None:
    model = ready(Lambda(lambda n, x: (torch.matmul(x, n.w.t()) * n.s).cos(), w=weight(4, 6),
                         s=weight(4, seed=1)))  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert calls(result.module) == ["t", "matmul", "cos"]
    assert "mul: scale into parameter 'w'" in result.changes[0].what.replace(" 'mul'", "")


def test_a_product_with_a_matrix_for_every_head() -> None:
    model = ready(
        Lambda(lambda n, x: n.head((torch.bmm(x, n.w) * n.s).tanh()), w=weight(2, 6, 4),
               s=values(4, seed=1), head=nn.Linear(4, 2))
    )  # fmt: skip
    assert calls(fold_affine(model, TOKENS).module) == ["bmm", "tanh", "Linear"]


# --- tensors that are added, multiplied, joined -------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 6), (5, 6), (2, 5, 6), (1, 1, 6), (6,)])
def test_a_position_table_is_scaled_with_what_it_is_added_to(shape: tuple[int, ...]) -> None:
    model = ready(Lambda(lambda n, x: turned(n.bn, n.fc(x) + n.pos).sin(), fc=nn.Linear(6, 6),
                         pos=weight(*shape), bn=norm()))  # fmt: skip
    with torch.no_grad():
        model.bn.weight[2] = 0.0
        model.bn.weight[3] = -0.7
    result = fold_affine(model, TOKENS)
    assert norms_left(result.module) == 0
    assert result.skipped == ()
    assert ("pos" in result.module.state_dict()) == (len(shape) > 1 and shape[-2] > 1)


def test_a_class_token_and_positions() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        token = n.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, n.fc(x), n.last.repeat(x.shape[0], 1, 1)], 1)
        return turned(n.bn, x - n.pos[:, : x.shape[1]]).sin()

    model = ready(Lambda(forward, fc=nn.Linear(6, 6), token=weight(1, 1, 6), last=weight(1, 1, 6),
                         pos=weight(1, 9, 6), bn=norm()))  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert norms_left(result.module) == 0
    assert result.skipped == ()
    parts = ("parameter 'pos'", "Linear 'fc'", "parameter 'token'", "parameter 'last'")
    assert all(part in result.changes[0].what for part in parts)


def test_a_shift_goes_into_what_is_added() -> None:
    """Nothing else can take it: the layer before ends in an activation."""
    model = ready(Lambda(lambda n, x: (x.tanh() + n.pos - n.b).sin(), pos=values(5, 6),
                         b=weight(6)))  # fmt: skip
    assert calls(fold_affine(model, TOKENS).module) == ["tanh", "add", "sin"]


def test_a_gain_of_every_entry_takes_a_scale() -> None:
    model = ready(Lambda(lambda n, x: turned(n.bn, x.tanh() * n.gain).sin(), gain=weight(5, 6),
                         bn=norm()))  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert calls(result.module) == [
        "tanh", "mul", "transpose", "ChannelShift", "transpose", "sin",
    ]  # fmt: skip


NEAR: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "broadcast": (
        lambda n, x: n.rows.unsqueeze(0).repeat(2, 1, 1),
        "broadcasts the channels' axis",
    ),
    "read twice": (lambda n, x: n.pos + n.pos.sigmoid(), "takes neither"),
    "at two paths": (lambda n, x: n.pos * n.again.cos(), "cos"),
    "a layer's": (lambda n, x: n.fc.weight, "also read by"),
    "spread over new channels": (lambda n, x: n.rows.expand(6, 6), "may repeat the channels"),
    "written": (lambda n, x: n.count.relu_(), "written"),
    "whole numbers": (lambda n, x: n.whole, "does not hold floating-point values"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    """The layer takes the shift; the scale would have to go into what is added, too."""
    forward, reason = NEAR[name]
    pos = weight(6, 6)
    model = Lambda(
        lambda n, x: turned(n.bn, n.fc(x) + forward(n, x)).sin(), fc=nn.Linear(6, 6), bn=norm(),
        pos=pos, again=pos, rows=weight(6, 1), count=values(6, 6),
        whole=torch.arange(36).view(6, 6),
    )  # fmt: skip
    ready(model)
    if name == "written":  # the network has a state, which every run changes
        result = ds.apply(model, ds.FoldAffine(), example_inputs=(SQUARE,))
    else:
        result = fold_affine(model, SQUARE)
    assert norms_left(result.module) == ("ChannelScale" not in calls(result.module))
    assert any(part in reasons(result) for part in reason.split("|"))


def test_a_table_takes_maps_of_one_axis_only() -> None:
    """Rows first, columns then: two vectors, and one place for a vector."""
    model = ready(
        Lambda(lambda n, x: (n.a(n.fc(x) + n.pos).transpose(1, 2), n.b(n.pos.sin()[None]))[0],
               fc=nn.Linear(6, 6), pos=weight(6, 6), a=norm(), b=norm())
    )  # fmt: skip
    assert norms_left(fold_affine(model, SQUARE).module) == 1


def test_half_precision_tables_hold_what_they_take() -> None:
    model = ready(Lambda(lambda n, x: (n.e(x) * n.s).sin(), e=nn.Embedding(9, 6), s=values(6)))
    model.half()
    with torch.no_grad():
        model.e.weight.mul_(100.0)
        model.s[1] = 6.0e4
    result = ds.apply(model, ds.FoldAffine(), example_inputs=(IDS,))
    assert calls(result.module) == ["Embedding", "mul", "sin"]
    with torch.no_grad():
        model.s[1] = 3.0
    module = ds.apply(model, ds.FoldAffine(), example_inputs=(IDS,)).module
    assert calls(module) == ["Embedding", "sin"]
    assert torch.equal(module.e.weight, (model.e.weight.double() * model.s.double()).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_product_is_rounded_once(dtype: torch.dtype) -> None:
    """To one of the two numbers next to what float64 gives, as every folded layer is."""
    model = ready(
        Lambda(lambda n, x: ((x.sin() * n.s) @ n.w * n.t + n.b).cos(), w=weight(6, 7),
               s=weight(6, seed=1), t=weight(7, seed=2), b=weight(7, seed=3))
    ).to(dtype)  # fmt: skip
    module = ds.apply(model, ds.FoldAffine(), example_inputs=(TOKENS.to(dtype),)).module
    assert calls(module) == ["sin", "Linear", "cos"]
    exact = (model.s.double()[:, None] * model.w.double() * model.t.double()).t()
    gap = torch.finfo(dtype).eps * exact.abs()
    assert bool(((module.w_linear.weight.double() - exact).abs() <= gap).all())
    assert torch.equal(module.w_linear.bias, model.b)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "large"])
def test_tables_of_any_layout(layout: str) -> None:
    table = {
        "transposed": lambda: values(6, 9).t(),
        "expanded": lambda: values(1, 6).expand(9, 6),
        "large": lambda: values(90_000, 6),
    }[layout]()
    model = Lambda(lambda n, x: turned(n.bn, F.embedding(x, n.e)).sin(), e=table, bn=norm())
    model.double().eval()
    with torch.no_grad():
        model.bn.running_mean += 0.3
        model.bn.weight *= 0.7
    model.e.copy_(table) if layout == "large" else None
    result = fold_affine(model, IDS)
    assert norms_left(result.module) == 0
    assert "e" in dict(result.module.named_buffers())


# --- attention ---------------------------------------------------------------------------------


def test_attention_hands_on_its_values_columns() -> None:
    def forward(n: Any, x: Tensor, **how: Any) -> Tensor:
        y = F.scaled_dot_product_attention(n.q(x), n.k(x), n.v(x), **how)
        return turned(n.bn, y).sin()

    layers = {"q": nn.Linear(6, 6), "k": nn.Linear(6, 6), "v": nn.Linear(6, 6), "bn": norm()}
    model = ready(Lambda(forward, **layers))
    result = fold_affine(model, TOKENS)
    assert norms_left(result.module) == 0
    assert "ChannelShift" not in calls(result.module)
    causal = ready(Lambda(lambda n, x: forward(n, x, is_causal=True), **layers))
    assert norms_left(fold_affine(causal, TOKENS).module) == 0
    # A row without any open entry is zero: the shift stays.
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    masked = ready(Lambda(lambda n, x: forward(n, x, attn_mask=n.mask), mask=mask, **layers))
    result = fold_affine(masked, TOKENS)
    assert norms_left(result.module) == 0
    assert calls(result.module).count("ChannelShift") == 1


def test_attention_that_mixes_the_mapped_axis() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        return n.bn(F.scaled_dot_product_attention(n.q(x), n.q(x), n.v(x))).sin()

    model = Lambda(forward, q=nn.Linear(6, 6), v=nn.Linear(6, 6), bn=norm())
    result = fold_affine(ready(model), SQUARE)
    assert norms_left(result.module) == 1
    assert "attends over other axes" in reasons(result)
    same = Lambda(
        lambda n, x: turned(n.bn, F.scaled_dot_product_attention(y := n.v(x), y, y)).sin(),
        v=nn.Linear(6, 6), bn=norm(),
    )  # fmt: skip
    result = fold_affine(ready(same), TOKENS)
    assert norms_left(result.module) == 1
    assert "reads it as query or key, too" in reasons(result)
    # The query is no mean of anything.
    query = Lambda(lambda n, x: F.scaled_dot_product_attention(turned(n.bn, x.sin()), x, x).sin(),
                   bn=norm())  # fmt: skip
    assert "reads it as query" in reasons(fold_affine(ready(query), TOKENS))


def test_a_gate_hands_a_scale_to_one_of_its_operands() -> None:
    model = ready(Chain(conv=nn.Linear(6, 6), gate=_Gate(), bn=_Turned(norm())))
    result = fold_affine(model, TOKENS)
    assert norms_left(result.module) == 0
    assert calls(result.module).count("ChannelShift") == 1


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gate(x).sigmoid()


class _Turned(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return turned(self.layer, x)
