"""Tracing keeps keys, flags, hooks and both modes, and never touches the model it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, TraceError
from dropsurgery.graph.module import graphs, module_path
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.layers import FollowTraining, ScaledDotProductAttention
from tests.helpers import randomize

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def same_in_both_modes(model: nn.Module, traced: nn.Module, *inputs: Tensor) -> None:
    """Compare eval and, under one seed, training outputs bit by bit, on copies."""
    for training in (False, True):
        theirs, ours = copy.deepcopy(model), copy.deepcopy(traced)
        theirs.train(training)
        ours.train(training)
        torch.manual_seed(3)
        expected = theirs(*inputs)
        torch.manual_seed(3)
        actual = ours(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        actual = actual if isinstance(actual, tuple) else (actual,)
        assert len(expected) == len(actual)
        for left, right in zip(expected, actual, strict=True):
            assert torch.equal(left, right), f"training={training}"


def networks() -> dict[str, Callable[[], nn.Module]]:
    get = torchvision.models.get_model
    return {
        "resnet18": lambda: get("resnet18"),
        "googlenet": lambda: get("googlenet", init_weights=False),
        "densenet121 with dropout": lambda: get("densenet121", drop_rate=0.2),
        "efficientnet_b0": lambda: get("efficientnet_b0"),
        "convnext_tiny": lambda: get("convnext_tiny"),
        "swin_t with dropout": lambda: get("swin_t", attention_dropout=0.1, dropout=0.1),
        "mobilenet_v3_small": lambda: get("mobilenet_v3_small"),
        "timm resnet18": lambda: timm.create_model("resnet18", drop_rate=0.3, drop_path_rate=0.2),
        "timm resnetv2_50": lambda: timm.create_model("resnetv2_50", drop_path_rate=0.1),
        "timm convnext_atto": lambda: timm.create_model("convnext_atto", drop_path_rate=0.2),
    }


@pytest.mark.parametrize("name", networks())
def test_networks_keep_keys_modes_and_numbers(name: str) -> None:
    model = randomize(networks()[name]()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced = ds.trace(model)
    assert list(traced.state_dict()) == list(before)
    for (path, clone), (_, original) in zip(
        traced.named_parameters(), model.named_parameters(), strict=True
    ):
        assert clone is original, path
    same_in_both_modes(model, traced, X)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_vision_transformer_with_attention_dropout_is_one_graph() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, attn_drop_rate=0.3, proj_drop_rate=0.1, depth=2
    )
    traced = ds.trace(model)
    assert not isinstance(traced, TwoModeGraphModule)
    layers = [m for m in traced.modules() if isinstance(m, ScaledDotProductAttention)]
    assert [layer.dropout_p for layer in layers] == [0.3, 0.3]
    assert list(traced.state_dict()) == list(model.state_dict())
    same_in_both_modes(model, traced, X)


def test_modules_are_clones_and_tensors_are_shared() -> None:
    model = torchvision.models.resnet18().eval()
    traced = ds.trace(model)
    traced.train()
    assert not any(module.training for module in model.modules())
    clones = dict(traced.named_modules())
    for path, module in model.named_modules():
        assert clones[path] is not module
        assert path == "" or type(clones[path]) is type(module)
    assert traced.bn1.running_mean is model.bn1.running_mean


def test_every_training_flag_is_kept() -> None:
    model = torchvision.models.resnet18().train()
    model.layer2.eval()
    model.bn1.eval()
    traced = ds.trace(model)
    flags = {path: module.training for path, module in traced.named_modules()}
    assert flags == {path: module.training for path, module in model.named_modules()}


def test_one_object_at_two_paths_stays_one_object() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    traced = ds.trace(Shared())
    assert traced.first is traced.second
    assert list(traced.state_dict()) == list(Shared().state_dict())


def test_unused_submodules_and_parameters_are_kept() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.used = nn.Linear(4, 4)
            self.loose = nn.Parameter(torch.zeros(3))
            self.register_buffer("step", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    traced = ds.trace(model)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert list(copy.deepcopy(traced).state_dict()) == list(model.state_dict())


def test_functional_dropout_becomes_modules() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout2d(self.conv(x), 0.4, self.training)
            x = F.dropout(x, p=0.2, training=self.training)
            x = torch.dropout(x, 0.1, self.training)
            return F.alpha_dropout(x, 0.1, self.training)

    model = Functional()
    traced = ds.trace(model)
    names = [type(module).__name__ for _, module in traced.named_children()]
    assert names == ["Conv2d", "Dropout2d", "Dropout", "Dropout", "AlphaDropout"]
    assert list(traced.state_dict()) == list(model.state_dict())
    same_in_both_modes(model, traced, X)


def test_always_on_dropout_stays_on() -> None:
    class AlwaysOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    traced = ds.trace(AlwaysOn().eval())
    assert (traced(torch.ones(1000)) == 0).any()
    same_in_both_modes(AlwaysOn(), traced, X)


def test_a_function_with_a_training_flag_follows_the_mode() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((3,), 0.3))
            self.register_buffer("var", torch.full((3,), 2.0))
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
            return F.rrelu(x, training=self.training)

    model = Custom()
    traced = ds.trace(model)
    assert sum(isinstance(m, FollowTraining) for m in traced.modules()) == 2
    before = model.mean.clone()
    same_in_both_modes(model, traced, X)
    assert torch.equal(model.mean, before)


def test_a_branch_on_training_gives_two_graphs_over_one_set_of_parameters() -> None:
    model = torchvision.models.googlenet(init_weights=False)
    traced = ds.trace(model)
    assert isinstance(traced, TwoModeGraphModule)
    assert len(graphs(traced)) == 2
    assert traced.train_graph is not None
    assert len(traced.train_graph.nodes) > len(traced.graph.nodes)
    assert "# in training" in traced.code
    keep_eval(traced)
    assert graphs(traced) == (traced.graph,)
    assert torch.equal(traced.eval()(X), model.eval()(X))
    assert torch.equal(traced.train()(X[:0]), traced.eval()(X[:0]))


def test_a_two_mode_module_copies_and_refuses_pickle() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x) * 2 if self.training else self.scale(x)

    model = Branches()
    traced = copy.deepcopy(ds.trace(model))
    assert traced.scale.weight is not model.scale.weight
    same_in_both_modes(model, ds.trace(traced), torch.randn(2, 3))
    with pytest.raises(TraceError, match="cannot be pickled"):
        traced.__reduce__()


def test_a_layer_that_branches_and_holds_nothing_stays_whole() -> None:
    class MyDropPath(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p

        def forward(self, x: Tensor) -> Tensor:
            if not self.training or self.p == 0.0:
                return x
            return x * torch.rand(x.shape[0], *[1] * (x.ndim - 1)).gt(self.p)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.drop = MyDropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.conv(x))

    traced = ds.trace(Net())
    assert not isinstance(traced, TwoModeGraphModule)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["conv", "drop"]
    same_in_both_modes(Net(), ds.trace(Net()), X[:0])


def test_an_untraceable_training_forward_is_an_error_only_in_training() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if self.training and x.sum() > 0:
                return x * 2
            return x

    traced = ds.trace(Loss())
    x = torch.randn(2, 3)
    assert torch.equal(traced.eval()(x), traced.linear(x))
    with pytest.raises(TraceError, match="training mode"):
        traced.train()(x)


class Scale(nn.Module):
    """A parameter and a forward of one's own; for what a module may do to its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean", torch.zeros(()))


def test_training_compared_by_identity() -> None:
    class Is(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if self.training is True else x

    class IsNot(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training is not False else x * self.weight

    for make in (Is, IsNot):
        same_in_both_modes(make(), ds.trace(make()), torch.randn(3))
        nested = nn.Sequential(make(), nn.Identity())
        same_in_both_modes(nested, ds.trace(nested), torch.randn(3))


def test_training_as_a_number_or_a_tensor() -> None:
    class Number(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.training) * torch.tensor(float(self.training) + 1)

    class AsTensor(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.tensor(self.training), x * self.weight, x)

    for make in (Number, AsTensor):
        same_in_both_modes(make(), ds.trace(make()), torch.randn(3))


def test_a_branching_module_in_another_mode_than_the_root_is_refused() -> None:
    class Branches(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if self.training else x

    traced = ds.trace(nn.Sequential(Branches(), nn.Identity()))
    traced.train()
    traced.get_submodule("0").eval()
    with pytest.raises(TraceError, match="the network is in training mode and '0'"):
        traced(torch.ones(2))
    assert torch.equal(traced.eval()(torch.ones(2)), torch.ones(2))


def test_a_root_that_keeps_its_batchnorm_frozen_still_does() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = Frozen().train()
    for traced in (ds.trace(model), ds.trace(ds.trace(model)), copy.deepcopy(ds.trace(model))):
        assert traced.train() is traced
        assert traced.training
        assert not traced.norm.training
    assert ds.trace(model).train(False).training is False


def test_an_autograd_function_keeps_its_backward() -> None:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return -grad

    class Net(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return Reverse.apply(x * self.weight) * 2

    model = Net()
    traced = ds.trace(model)
    traced(torch.ones(1)).sum().backward()
    assert model.weight.grad == -2
    assert list(traced.state_dict()) == ["weight", "mean"]
    assert Reverse.apply(torch.ones(1)) == 1


@pytest.mark.parametrize("region", [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)])
def test_regions_of_other_modes_stay_whole_or_are_refused(region: Callable[[], object]) -> None:
    class Region(Scale):
        def forward(self, x: Tensor) -> Tensor:
            with region():  # type: ignore[attr-defined]
                y = x * self.weight
            return y + x

    model = nn.Sequential(Region(), nn.Identity())
    traced = ds.trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = torch.ones(2, requires_grad=True)
    traced(x).sum().backward()
    expected = torch.ones(2) * (1.0 if region is torch.no_grad else 4.0)
    assert torch.equal(x.grad, expected)
    with pytest.raises(TraceError, match="for a part of itself, which a graph cannot hold"):
        ds.trace(Region())
    with torch.no_grad():
        assert ds.trace(nn.Linear(2, 2)).code


def test_assigned_buffers_and_drawn_numbers_stay_whole_or_are_refused() -> None:
    class Assigns(Scale):
        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return x * self.weight - self.mean

    class Draws(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.randn(3)

    for make, message in ((Assigns, "assigns to a buffer"), (Draws, "draws random numbers")):
        state = torch.get_rng_state()
        model = nn.Sequential(make(), nn.Identity())
        traced = ds.trace(model)
        assert model[0].mean == 0
        assert torch.equal(torch.get_rng_state(), state)
        theirs = copy.deepcopy(model)
        for _ in range(2):
            torch.manual_seed(0)
            expected = theirs(torch.ones(3))
            torch.manual_seed(0)
            assert torch.equal(traced(torch.ones(3)), expected)
        with pytest.raises(TraceError, match=message):
            ds.trace(make())


def test_buffers_are_not_written_while_tracing() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * self.calls

    model = Counts()
    traced = ds.trace(model)
    assert model.calls == 0
    assert torch.equal(traced(torch.ones(2)), torch.ones(2))
    assert torch.equal(traced(torch.ones(2)), torch.full((2,), 2.0))


def test_python_that_reads_a_buffer_still_traces() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("times", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(self.times)):
                x = torch.relu(x) + 1
            return x

    same_in_both_modes(Reads(), ds.trace(Reads()), torch.randn(3))


def test_constants_made_in_forward_move_with_the_module_and_are_no_state() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0])

    traced = ds.trace(Makes())
    assert not traced.state_dict()
    assert [buffer.dtype for buffer in traced.double().buffers()] == [torch.float64]
    same_in_both_modes(Makes(), ds.trace(Makes()), torch.randn(2, 3))


def test_optional_arguments_keep_their_default_unless_an_example_gives_them() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
            return x * scale if mask is None else x * mask * scale

    x, mask = torch.randn(3), torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(ds.trace(Masked())(x), x * 2)
    assert torch.equal(ds.trace(Masked(), example_inputs=(x, mask))(x, mask), x * mask * 2)
    named = ds.trace(Masked(), example_inputs={"x": x, "mask": mask})
    assert torch.equal(named(x, mask), x * mask * 2)


def test_a_forward_of_any_number_of_inputs() -> None:
    class Star(nn.Module):
        def forward(self, *inputs: Tensor, scale: float = 2.0) -> Tensor:
            return torch.stack(inputs).sum(0) * scale

    x = torch.randn(3)
    assert torch.equal(ds.trace(Star())(x), x * 2)
    assert torch.equal(ds.trace(Star(), example_inputs=(x, x, x))(x, x, x), x * 6)


def test_shapes_of_a_batchnorm_between_a_transpose_and_a_view() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).view(x.size(0), -1)

    traced = ds.trace(View().eval(), example_inputs=torch.randn(2, 3, 4))
    assert tuple(list(traced.graph.nodes)[-2].meta["tensor_meta"].shape) == (2, 12)


def test_example_inputs_record_shapes_and_compute_nothing() -> None:
    model = torchvision.models.resnet18().train()
    mean = model.bn1.running_mean.clone()
    traced = ds.trace(model, example_inputs=X)
    shapes = {n.name: tuple(n.meta["tensor_meta"].shape) for n in traced.graph.nodes if n.users}
    assert shapes["layer4_1_bn2"] == (2, 512, 2, 2)
    assert torch.equal(model.bn1.running_mean, mean)


def test_every_node_names_its_module() -> None:
    traced = ds.trace(torchvision.models.resnet18())
    adds = [node for node in traced.graph.nodes if node.name.startswith("add")]
    assert module_path(adds[0]) == "layer1.0"
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target == "conv1"]
    assert module_path(calls[0]) == ""
    assert "conv1" in calls[0].meta["nn_module_stack"]


def test_leaf_modules_by_class_path_and_object() -> None:
    model = torchvision.models.resnet18()
    block = type(model.layer1[0])
    for leaves in (block, [block], "layer1.0", ["layer1.0"], model.layer1[0]):
        targets = {n.target for n in ds.trace(model, leaf_modules=leaves).graph.nodes}
        assert "layer1.0" in targets
        assert "layer1.0.conv1" not in targets


def test_a_traced_module_is_copied_and_not_traced_again() -> None:
    first = ds.trace(torchvision.models.resnet18())
    second = ds.trace(first)
    assert second is not first
    assert second.code == first.code
    assert second.layer1[0] is not first.layer1[0]
    assert second.conv1.weight is first.conv1.weight


def test_modules_in_lists_and_bound_methods_point_into_the_clone() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.order = [self.b, self.a]
            self.step = self.twice

        def twice(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x)
            return self.step(x)

    model = Hidden()
    same_in_both_modes(model, ds.trace(model), torch.randn(2, 3))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), _Control())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Control(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * self.weight
        return x


def test_what_cannot_be_traced_is_told_with_path_line_and_fix() -> None:
    with pytest.raises(TraceError) as caught:
        ds.trace(Untraceable())
    message = str(caught.value)
    assert "module 'inner.1' (_Control)" in message
    assert "test_trace.py" in message
    assert "if x.sum() > 0:" in message
    assert "leaf_modules" in message
    traced = ds.trace(Untraceable(), leaf_modules=["inner.1"])
    assert traced(torch.ones(1, 3)).shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear, ArgumentTypeError, "expected a torch.nn.Module, got type"),
        ({"weight": torch.zeros(1)}, ArgumentTypeError, "got dict"),
        (nn.LazyLinear(3), TraceError, "lazy module has no weights"),
        (torch.compile(nn.Linear(2, 2), backend="eager"), TraceError, "pass model._orig_mod"),
        (nn.DataParallel(nn.Linear(2, 2)), TraceError, "pass model.module"),
    ],
)
def test_what_is_no_traceable_model_is_refused(
    model: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ds.trace(model)  # type: ignore[arg-type]


def test_example_inputs_that_do_not_fit_are_told_with_the_node(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(TraceError, match="conv1") as caught:
        ds.trace(model, example_inputs=torch.randn(2, 4, 32, 32))
    assert "(2, 4, 32, 32)" in str(caught.value)
    assert "While executing" not in str(caught.value)
    assert not capsys.readouterr().err
    with pytest.raises(TraceError, match="holds 2 inputs, the network takes 1"):
        ds.trace(ds.trace(model), example_inputs=(X, X))
    with pytest.raises(TraceError, match=r"the network takes \['x'\]"):
        ds.trace(ds.trace(model), example_inputs={"image": X})
    with pytest.raises(ArgumentTypeError, match="tensor or a sequence"):
        ds.trace(model, example_inputs=3)


def test_a_module_with_hooks_stays_whole() -> None:
    model = torchvision.models.resnet18().eval()
    seen: list[int] = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    traced = ds.trace(model)
    assert not seen
    traced(X)
    assert seen == [2]
    assert "layer1" in {node.target for node in traced.graph.nodes}
    skipped = ds.find_residuals(traced).skipped
    assert "for its forward hooks" in skipped[0].reason


def test_a_layer_of_torchs_as_the_model_says_to_wrap_it() -> None:
    with pytest.raises(TraceError, match="wrap it in a"):
        ds.trace(nn.MultiheadAttention(4, 2))


def test_leaf_modules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no such module"):
        ds.trace(nn.Linear(2, 2), leaf_modules=["nowhere"])
    with pytest.raises(ArgumentTypeError, match="classes, paths and modules"):
        ds.trace(nn.Linear(2, 2), leaf_modules=[3])
    with pytest.raises(ArgumentTypeError, match="a sequence of modules, got 3"):
        ds.trace(nn.Linear(2, 2), leaf_modules=3)  # type: ignore[arg-type]


def shifted(sizes: list[int], by: int) -> list[int]:
    """A function that writes into its argument, as torchvision's 3-d Swin has one."""
    sizes[0] += by
    return sizes


fx.wrap("shifted")


def test_example_inputs_with_a_function_that_writes_into_a_list() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(shifted([0, 6], x.shape[0]))

    traced = ds.trace(Net(), example_inputs=(torch.randn(2, 3, 2),))
    (view,) = [node for node in traced.graph.nodes if node.target == "reshape"]
    assert view.meta["tensor_meta"].shape == (2, 6)
    assert traced(torch.randn(4, 6, 1)).shape == (4, 6)
