"""Residual sites: found by dataflow, near misses told apart, every other add with its reason."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError


class Net(nn.Module):
    """A module around a forward function of (self, x); four convolutions to use."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4)
        self.project = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def iadd(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


SITES: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "identity": (lambda n, x: x + F.relu(n.a(x)), "identity"),
    "branch first": (lambda n, x: F.relu(n.a(x)) + x, "identity"),
    "torch.add": (lambda n, x: torch.add(F.relu(n.a(x)), x), "identity"),
    "torch.add by keyword": (lambda n, x: torch.add(input=x, other=F.relu(n.a(x))), "identity"),
    "method": (lambda n, x: x.add(F.relu(n.a(x))), "identity"),
    "method in place": (lambda n, x: F.relu(n.a(x)).add_(x), "identity"),
    "iadd": (lambda n, x: iadd(F.relu(n.a(x)), x), "identity"),
    "relu after the add": (lambda n, x: n.act(n.b(F.relu(n.a(x))) + x), "identity"),
    "layer scale": (lambda n, x: x + n.scale * F.gelu(n.a(x)), "identity"),
    "gain": (lambda n, x: x + F.gelu(n.a(x)) * 0.2, "identity"),
    "projection": (lambda n, x: n.norm(n.project(x)) + F.relu(n.a(x)), "projection"),
    "pooled skip": (lambda n, x: n.pool(x) + F.relu(n.a(x)), "projection"),
    "subsampled skip": (
        lambda n, x: x[:, :, ::2, ::2] + F.relu(n.a(x))[:, :, ::2, ::2],
        "projection",
    ),
    "permuted skip": (
        lambda n, x: x.permute(0, 2, 3, 1) + F.relu(n.a(x)).permute(0, 2, 3, 1),
        "identity",
    ),
    "squeeze and excite": (
        lambda n, x: x + n.a(x) * torch.sigmoid(n.b(x).mean((2, 3), keepdim=True)),
        "identity",
    ),
    "self-gated branch": (lambda n, x: x + n.a(x) * n.b(x), "identity"),
    "dropout between": (lambda n, x: x + F.dropout(F.relu(n.a(x)), 0.1, n.training), "identity"),
    "sum of two branches": (lambda n, x: x + (F.relu(n.a(x)) + F.gelu(n.b(x))), "identity"),
    "branch reads sizes": (
        lambda n, x: x + F.interpolate(F.relu(n.a(x)), size=(x.shape[2], x.shape[3])),
        "identity",
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_sites(name: str) -> None:
    body, kind = SITES[name]
    found = ds.find_residuals(Net(body))
    assert [site.kind for site in found.sites] == [kind], str(found)
    site = found.sites[0]
    graph = {node.name: node for node in ds.trace(Net(body)).graph.nodes}
    operands = {node.name for node in graph[site.add].all_input_nodes}
    assert {site.branch, site.skip} == operands
    assert (site.block, site.module) == (1, "")


NO_SITES: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "bias": (lambda n, x: x + n.scale, "adds the constant 'scale'"),
    "number": (lambda n, x: F.relu(n.a(x)) + 1e-6, "adds a number"),
    "itself": (lambda n, x: x + x, "adds a tensor to itself"),
    "constants only": (lambda n, x: x * (n.scale + n.scale.abs()), "constant: no operand"),
    "two branches": (lambda n, x: F.relu(n.a(x)) + F.relu(n.b(x)), "neither operand is a skip"),
    "linear branch": (lambda n, x: x + n.a(x), "linear branch: 'a' is affine in 'x'"),
    "re-parameterisable": (lambda n, x: n.norm(n.a(x)) + n.project(x), "linear branch"),
    "linear with gain": (lambda n, x: x + n.scale * (n.pool(x) - x), "linear branch"),
    "res2net": (
        lambda n, x: _split_sum(n, F.relu(n.project(x))),
        "neither operand is a skip",
    ),
}


def _split_sum(net: Net, x: Tensor) -> Tensor:
    first, second = torch.split(x, 2, 1)
    return F.relu(net.norm.weight[:2].view(1, -1, 1, 1) * first.exp()) + second


@pytest.mark.parametrize("name", NO_SITES)
def test_near_misses(name: str) -> None:
    body, reason = NO_SITES[name]
    found = ds.find_residuals(Net(body))
    assert not found.sites
    assert any(skip.reason.startswith(reason) for skip in found.skipped), str(found)


def test_fused_adds_are_told() -> None:
    found = ds.find_residuals(Net(lambda n, x: torch.addcmul(x, n.scale, F.relu(n.a(x)))))
    assert not found.sites
    assert "adds and multiplies in one call" in found.skipped[0].reason


def test_a_class_token_and_pooled_patches_are_one_skip() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.pool = nn.Linear(4, 4), nn.MaxPool1d(2)

        def forward(self, x: Tensor) -> Tensor:
            first, rest = torch.tensor_split(x, (1,), 1)
            pooled = self.pool(rest.transpose(1, 2)).transpose(1, 2)
            branch = F.gelu(self.linear(x))[:, : pooled.shape[1] + 1]
            return torch.cat((first, pooled), 1) + branch

    found = ds.find_residuals(Tokens())
    assert [(s.kind, s.fork) for s in found.sites] == [("projection", "x")]


def test_include_finds_linear_and_nested_sites() -> None:
    def unet(n: Net, x: Tensor) -> Tensor:
        inner = n.a(x)
        inner = inner + F.relu(n.b(inner))
        return x + n.c(inner)

    kinds = [s.kind for s in ds.find_residuals(Net(unet), include=["nested"]).sites]
    assert kinds == ["identity", "nested"]
    pooled = ds.find_residuals(Net(lambda n, x: x + n.pool(x)), include="linear").sites
    assert [(s.kind, s.linear, s.branch) for s in pooled] == [("identity", True, "pool")]
    # Of a sum of convolutions neither is the skip; a BatchNorm is one.
    both = Net(lambda n, x: n.a(x) + n.b(x))
    assert not ds.find_residuals(both, include=["linear"]).sites
    normed = ds.find_residuals(Net(lambda n, x: n.a(x) + n.norm(x)), include=["linear"]).sites
    assert [s.branch for s in normed] == ["a"]
    with pytest.raises(ArgumentError, match="include names 'gates'"):
        ds.find_residuals(both, include=["gates"])


def test_gates_and_terms_inside_attention_are_none() -> None:
    gate = ds.find_residuals(Net(lambda n, x: x + x * torch.sigmoid(n.a(x))))
    assert gate.skipped[0].reason == "gate: the branch is 'x' times a function of it"
    term = ds.find_residuals(Net(lambda n, x: n.a(x) + (n.b(x) @ n.c(x)).softmax(-1) @ n.a(x)))
    assert term.skipped[0].reason.startswith("inside attention")


def test_queries_added_to_what_they_attend_to_are_inside_attention() -> None:
    def attend(n: Net, x: Tensor) -> Tensor:
        query, key = F.normalize(n.a(x), dim=1), F.normalize(n.b(x), dim=1)
        weights = (query * n.scale).sum(1, keepdim=True).softmax(-1)
        return x + n.c(n.project(weights * key) + query).relu()

    found = ds.find_residuals(Net(attend))
    assert [site.skip for site in found.sites] == ["x"]
    assert reasons(found, "inside attention: 'normalize' is the queries")

    def memory(n: Net, x: Tensor) -> Tensor:  # the same with x itself as queries is a block
        return n.project(F.relu(n.a(x)) * n.scale) + x

    assert len(ds.find_residuals(Net(memory)).sites) == 1


def test_residuals_in_a_gate_are_told_and_make_nothing_nested() -> None:
    def inner(n: Net, x: Tensor) -> Tensor:
        return x + F.relu(n.b(x))

    def gated(n: Net, x: Tensor) -> Tensor:
        y = F.relu(n.a(x))
        return x + n.norm(y * F.interpolate(inner(n, n.pool(y)), size=y.shape[2:]))

    found = ds.find_residuals(Net(gated))
    assert [(site.kind, site.skip) for site in found.sites] == [("identity", "x")]
    assert reasons(found, "in a gate: the sum only scales other values")

    def on_the_branch(n: Net, x: Tensor) -> Tensor:  # what is scaled itself is no gate
        return x + n.norm(inner(n, F.relu(n.a(x))) * torch.sigmoid(n.c(n.pool(x))))

    found = ds.find_residuals(Net(on_the_branch))
    assert len(found.sites) == 1
    assert reasons(found, "nested: the branch holds residual blocks")


@pytest.mark.parametrize(
    "number", [torch.sum, torch.mean, lambda x: x.amax(), lambda x: 0.5 * x.norm(), torch.max]
)
def test_a_branch_that_is_one_number_is_none(number: Callable[[Tensor], Tensor]) -> None:
    found = ds.find_residuals(Net(lambda n, x: x + number(F.relu(n.a(x)))))
    assert not found.sites
    assert reasons(found, "is one number, reduced over all axes")
    pooled = ds.find_residuals(Net(lambda n, x: x + F.relu(n.a(x)).sum((2, 3), keepdim=True)))
    assert len(pooled.sites) == 1


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        (lambda n, x: x + F.relu(n.a(x)), 0),
        (lambda n, x: n.a(x).permute(1, 0, 2, 3) + F.relu(n.a(x)).permute(1, 0, 2, 3), 1),
        (lambda n, x: rows(n.a(x)) + F.relu(rows(n.a(x))), None),
        (lambda n, x: n.a(x) + F.relu(n.a(x)).mean(0), None),
        (lambda n, x: x + torch.special.expit(n.a(x)), 0),
    ],
)
def test_the_batch_axis_of_a_branch(
    body: Callable[[Net, Tensor], Tensor], axis: int | None
) -> None:
    def shared(n: Net, x: Tensor) -> Tensor:
        return body(n, x)

    (site,) = ds.find_residuals(Net(shared)).sites
    assert site.batch_axis == axis


def rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, 4)


def reasons(found: ds.Residuals, text: str) -> list[str]:
    return [skip.reason for skip in found.skipped if text in skip.reason]


def test_parallel_branches_are_two_sites_of_one_stream() -> None:
    found = ds.find_residuals(Net(lambda n, x: x + F.relu(n.a(x)) + F.gelu(n.b(x))))
    assert [(s.branch, s.skip, s.fork) for s in found.sites] == [
        ("relu", "x", "x"),
        ("gelu", "add", "x"),
    ]


def test_a_long_skip_around_blocks_is_nested() -> None:
    def unet(n: Net, x: Tensor) -> Tensor:
        inner = n.a(x)
        inner = inner + F.relu(n.b(inner))
        return x + n.c(inner)

    found = ds.find_residuals(Net(unet))
    assert [site.add for site in found.sites] == ["add"]
    assert "nested: the branch holds residual blocks (first add 'add')" in found.skipped[0].reason


def test_masks_and_position_tables_do_not_confuse_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)
            self.table = nn.Parameter(torch.zeros(5, 5))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            scores = q @ k.transpose(1, 2) + self.table
            scores = scores + mask
            return x + self.out(scores.softmax(-1) @ v)

    found = ds.find_residuals(Attention())
    assert [(s.skip, s.branch, s.kind) for s in found.sites] == [("x", "out", "identity")]
    assert len(found.skipped) == 2


def test_sizes_are_not_data() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        height = operator.add(x.shape[2], 0)
        return F.relu(n.a(x)).reshape(x.size(0), 4, height, x.shape[3])

    found = ds.find_residuals(Net(body))
    assert not found.sites
    assert not found.skipped


def test_a_block_that_is_called_twice_is_two_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.linear(x))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    found = ds.find_residuals(Twice())
    assert [(s.block, s.module) for s in found.sites] == [(1, "block"), (2, "block")]


def test_residuals_inside_a_leaf_are_told() -> None:
    found = ds.find_residuals(nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True)))
    assert not found.sites
    assert "TransformerEncoderLayer is kept whole" in found.skipped[0].reason
    block = timm.create_model("resnet18")
    leaf = ds.trace(block, leaf_modules=["layer1.0"])
    assert any("BasicBlock is kept whole" in s.reason for s in ds.find_residuals(leaf).skipped)


def test_it_prints_as_a_table() -> None:
    found = ds.find_residuals(Net(lambda n, x: x + F.relu(n.a(x)) + n.scale))
    text = str(found)
    assert "1 residual sites in 1 blocks" in text
    assert "adds the constant 'scale'" in text
    assert str(ds.find_residuals(nn.Linear(2, 2))).startswith("0 residual sites in 0 blocks")


# name: (blocks, adds a block, projections), by each network's own architecture table.
TORCHVISION = {
    "resnet18": (8, 1, 3),
    "resnet50": (16, 1, 4),
    "resnet152": (50, 1, 4),
    "resnext50_32x4d": (16, 1, 4),
    "wide_resnet50_2": (16, 1, 4),
    "regnet_y_400mf": (16, 1, 4),
    "regnet_x_400mf": (22, 1, 4),
    "mobilenet_v2": (10, 1, 0),
    "mobilenet_v3_small": (6, 1, 0),
    "mobilenet_v3_large": (10, 1, 0),
    "mnasnet1_0": (10, 1, 0),
    "efficientnet_b0": (9, 1, 0),
    "efficientnet_v2_s": (35, 1, 0),
    "convnext_tiny": (18, 1, 0),
    "densenet121": (0, 1, 0),
    "shufflenet_v2_x1_0": (0, 1, 0),
    "vgg11_bn": (0, 1, 0),
    "vit_b_16": (12, 2, 0),
    "swin_t": (12, 2, 0),
    "swin_v2_t": (12, 2, 0),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    blocks, adds, projections = TORCHVISION[name]
    found = ds.find_residuals(torchvision.models.get_model(name))
    assert found.blocks == blocks
    assert len(found.sites) == blocks * adds
    assert Counter(site.kind for site in found.sites)["projection"] == projections
    assert sorted({site.block for site in found.sites}) == list(range(1, blocks + 1))


TIMM = {
    "resnet26": (8, 1),
    "resnetv2_50": (16, 1),
    "vit_tiny_patch16_224": (12, 2),
    "convnext_atto": (12, 1),
    "res2net50d": (16, 1),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    blocks, adds = TIMM[name]
    found = ds.find_residuals(timm.create_model(name))
    assert (found.blocks, len(found.sites)) == (blocks, blocks * adds)


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "efficientnet_b0", "swin_t", "swin_v2_t", "efficientnet_v2_s"]
)
def test_every_native_drop_and_no_other_site_is_found(name: str) -> None:
    module = ds.trace(torchvision.models.get_model(name))
    native = {
        node.name
        for node in module.graph.nodes
        if node.op == "call_module" and "stochastic_depth" in str(node.target)
    }
    assert {site.native for site in ds.find_residuals(module).sites} == native
