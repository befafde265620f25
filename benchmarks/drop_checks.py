"""What each method of the drop family does in five networks: every cell of a table is a check."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.graph.drops import is_drop_path, rate, set_rate
from dropsurgery.models import import_torchvision
from dropsurgery.passes.base import Pass
from dropsurgery.passes.insert_base import Insertion

COLUMNS = ("insert", "eval identity", "statistics", "compile", "export", "retune", "revert")
DRAWS = 300
YES, NO = "yes", "**no**"


class Classifier(nn.Module):
    """An LSTM classifier of token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (N, 5) from (N, L) token numbers."""
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(hidden[:, -1])


def networks() -> Iterator[tuple[str, nn.Module, Tensor, str]]:
    """Yield (name, network in eval mode with random statistics, input, layer to tap)."""
    models = import_torchvision().models
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for name, arguments, tap in (
        ("resnet50", {}, "layer4"),
        ("convnext_tiny", {"stochastic_depth_prob": 0.0}, "features.7"),
        ("vit_b_16", {"image_size": 64}, "encoder.layers.encoder_layer_11"),
        ("densenet121", {}, "features.denseblock4"),
    ):
        torch.manual_seed(0)
        yield name, _randomize(models.get_model(name, **arguments)), images, tap
    torch.manual_seed(0)
    yield "LSTM classifier", Classifier().eval(), torch.randint(50, (4, 12)), ""


def _randomize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm random statistics, and heads of zeros weights; both hide errors."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


# Statistics: (distance from theory in standard errors) of what an inserted layer does.

Statistic = Callable[[nn.Module, Tensor], float]


def _distance(samples: Tensor, expected: float) -> float:
    """Return how many standard errors a mean over independent draws is away from theory."""
    error = float(samples.std()) / math.sqrt(len(samples))
    gap = abs(float(samples.mean()) - expected)
    return gap / error if error > 1e-12 else (0.0 if gap < 1e-6 else math.inf)


def _draws(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    for _ in range(DRAWS):
        yield layer(x).double()


def _moments(layer: nn.Module, x: Tensor) -> float:
    """Compare mean and variance of the factor of every unit with those of inverted dropout."""
    ones = torch.ones_like(x)
    p = rate(layer)
    # Draws are independent; units that share one are not, so that each draw gives one number.
    values = [(y.mean(), (y - 1.0).square().mean()) for y in _draws(layer, ones)]
    mean, square = (torch.stack(column) for column in zip(*values, strict=True))
    return max(_distance(mean, 1.0), _distance(square, p / (1.0 - p)))


def _share(layer: nn.Module, x: Tensor) -> float:
    """Compare the share of units that are dropped with the rate, and the mean with the input."""
    ones = torch.ones_like(x)
    values = [((y == 0).double().mean(), y.mean()) for y in _draws(layer, ones)]
    dropped, mean = (torch.stack(column) for column in zip(*values, strict=True))
    return max(_distance(dropped, rate(layer)), _distance(mean, 1.0))


def _classic(layer: nn.Module, x: Tensor) -> float:
    """Compare training's mean with what eval returns."""
    ones = torch.ones_like(x)
    mean = torch.stack([y.mean() for y in _draws(layer, ones)])
    expected = float(copy.deepcopy(layer).eval()(ones).double().mean())
    return _distance(mean, expected)


def _weighted(layer: nn.Module, x: Tensor) -> float:
    """Compare the number of kept channels, and the sum of the scores, which is to stay."""
    x = x.relu() + 0.01
    kept = round((1.0 - rate(layer)) * x.shape[1])
    scores = x.double().flatten(2).mean(2).sum(1)
    worst = 0.0
    for y in _draws(layer, x):
        score = y.flatten(2).mean(2)
        exact = bool(((score > 0).sum(1) == kept).all())
        same = torch.allclose(score.sum(1), scores, rtol=1e-4)
        worst = max(worst, 0.0 if exact and same else math.inf)
    return worst


def _area(layer: nn.Module, x: Tensor) -> float:
    """Compare the mean area with its exact value."""
    ones = torch.ones_like(x)
    assert isinstance(layer, ds.layers.Cutout)
    area = torch.stack([(y[:, 0] == 0).sum((1, 2)).double().mean() for y in _draws(layer, ones)])
    return _distance(area, layer.mean_area(x.shape[2], x.shape[3]))


def _survival(layer: nn.Module, x: Tensor) -> float:
    """Compare the share of samples that are dropped with the rate, and the mean."""
    rows = torch.ones(64, *(1,) * (x.ndim - 1))
    return _share(layer, rows)


@dataclass(frozen=True)
class Method:
    """One row of the table: insertions to try in turn, and how its layer is judged."""

    name: str
    tries: tuple[Pass, ...]
    statistic: Statistic
    removal: Pass = field(default_factory=ds.RemoveDrops)
    scales_in_eval: bool = False


METHODS = (
    Method("Dropout", (ds.InsertDropout(0.3, before="Linear"),), _moments),
    Method(
        "Spatial dropout",
        (
            ds.InsertDropout(0.3, after="activation", dims=2),
            ds.InsertDropout(0.3, after="conv", dims=2),
            ds.InsertDropout(0.3, after="LSTM", dims=1),
        ),
        _moments,
    ),
    Method(
        "Classic dropout",
        (ds.InsertDropout(0.3, kind="classic", before="Linear"),),
        _classic,
        scales_in_eval=True,
    ),
    Method(
        "Gaussian dropout", (ds.InsertDropout(0.3, kind="gaussian", before="Linear"),), _moments
    ),
    Method("Uniform dropout", (ds.InsertDropout(0.3, kind="uniform", before="Linear"),), _moments),
    Method(
        "DropPath",
        (ds.InsertDropPath(ds.survival.constant(0.7)),),
        _survival,
        removal=ds.RemoveDropPath(),
    ),
    Method(
        "DropBlock", (ds.InsertDropBlock(0.1, 3), ds.InsertDropBlock(0.1, 3, after="conv")), _share
    ),
    Method("DropConnect", (ds.InsertDropConnect(0.3),), _moments),
    Method(
        "DropConnect, per sample",
        (ds.InsertDropConnect(0.3, per_sample=True, of="Linear"),),
        _moments,
    ),
    Method("Weighted Channel Dropout", (ds.InsertWeightedChannelDropout(0.3),), _weighted),
    Method("Cutout", (ds.InsertCutout(16),), _area),
)


class Bench:
    """One network, and the checks on it.

    Args:
        model: the network, in eval mode.
        x: its input.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.code = ds.trace(model, example_inputs=x).code
        self.paths = [path for path, _ in ds.trace(model).named_modules()]
        self.keys = list(model.state_dict())
        with torch.no_grad():
            self.output = model(x)
        self.operations = self._exported(ds.trace(model))

    def cells(self, method: Method) -> list[str]:
        """Return the cells of a method's row; where it cannot be inserted, the reason."""
        reasons = []
        for insertion in method.tries:
            try:
                result = ds.apply(self.model, insertion, example_inputs=self.x)
            except ds.DropsurgeryError as error:
                reasons.append(_reason(error))
                continue
            if result.changes:
                return self._checked(method, insertion, result)
            reasons.append(result.skipped[-1].reason)
        reason = "; ".join(dict.fromkeys(reasons))
        return [f"- ({reason})", *["-"] * (len(COLUMNS) - 1)]

    def _checked(self, method: Method, insertion: Pass, result: ds.passes.base.Result) -> list[str]:
        module = result.module
        place = ""
        if isinstance(insertion, Insertion):
            kinds = insertion.before or insertion.kinds
            kinds = kinds if isinstance(kinds, str) else ", ".join(kinds or ())
            side = "before" if insertion.before else "after"
            side = "of" if isinstance(insertion, ds.InsertDropConnect) else side
            place = f" {side} {kinds}"
        distance = self._statistic(method, module)
        back = ds.apply(module, method.removal).module
        reverts = back.code == self.code and [p for p, _ in back.named_modules()] == self.paths
        keys = list(module.state_dict()) == self.keys
        return [
            f"{len(result.changes)}{place}" if keys else f"{NO}: keys",
            self._eval(method, module),
            f"{YES} ({distance:.1f})" if distance <= 4.0 else f"{NO} ({distance:.1f})",
            self._compiles(module),
            self._exports(method, module),
            self._retunes(module),
            YES if reverts and torch.equal(self._run(back), self.output) else NO,
        ]

    def _run(self, module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(self.x)

    def _eval(self, method: Method, module: nn.Module) -> str:
        same = torch.equal(self._run(module), self.output)
        if method.scales_in_eval:
            return "scales by 1 - p, as defined" if not same else NO
        return YES if same else NO

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the inserted layers; where a network has drop paths of its own, those."""
        layers = dict(module.named_modules())
        new = {path: layer for path, layer in layers.items() if path not in self.paths}
        return new or {path: layer for path, layer in layers.items() if is_drop_path(layer)}

    def _statistic(self, method: Method, module: nn.Module) -> float:
        """Judge the first inserted layer on the values that it meets in this network."""
        layer = next(iter(self._layers(module).values()))
        seen: list[tuple[Tensor, ...]] = []
        handle = layer.register_forward_pre_hook(lambda _, values: seen.append(values))
        self._run(module)
        handle.remove()
        torch.manual_seed(2)
        twin = copy.deepcopy(layer).train()
        first, *others = seen[0]
        if isinstance(layer, ds.layers.DropConnect):
            first = first[:32]  # some rows of the weight
        with torch.no_grad():
            if others:
                mask = _WithSamples(twin, *others)
                return method.statistic(mask, first)
            return method.statistic(twin, first)

    def _compiles(self, module: nn.Module) -> str:
        """Compile a training step of the whole network, without a break in the graph."""
        torch._dynamo.reset()
        twin = copy.deepcopy(module).train()
        try:
            # torch.compile takes recurrent layers only if it is told to.
            with torch._dynamo.config.patch(allow_rnn=True):
                compiled = torch.compile(twin, fullgraph=True, backend="eager")
                compiled(self.x).sum().backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            return f"{NO}: {str(error).splitlines()[0]}"
        return YES

    def _exported(self, module: nn.Module) -> list[str]:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (self.x,))
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    def _exports(self, method: Method, module: nn.Module) -> str:
        found = self._exported(copy.deepcopy(module))
        if method.scales_in_eval:
            extra = len(found) - len(self.operations)
            return f"one factor a layer ({extra})" if extra == len(self._layers(module)) else NO
        return YES if found == self.operations else NO

    def _retunes(self, module: nn.Module) -> str:
        """At rate 0 training is that of the plain network; at another rate it is not."""
        results = []
        for p in (0.0, None):
            twin = copy.deepcopy(module).train()
            for layer in self._layers(twin).values():
                set_rate(layer, rate(layer) if p is None else p)
            torch.manual_seed(3)
            results.append(self._run(twin))
        torch.manual_seed(3)
        plain = self._run(copy.deepcopy(ds.trace(self.model)).train())
        works = torch.equal(results[0], plain) and not torch.equal(results[1], plain)
        return YES if works else NO

    def together(self, methods: tuple[Method, ...]) -> str:
        """Insert all methods that fit, and say what their ONNX is, node by node, and computes."""
        import onnx

        fitting = []
        for method in methods:
            for insertion in method.tries if not method.scales_in_eval else ():
                try:
                    if ds.apply(self.model, insertion, example_inputs=self.x).changes:
                        fitting.append(insertion)
                        break
                except ds.DropsurgeryError:
                    continue
        module: nn.Module = self.model
        inserted = 0
        for insertion in fitting:
            try:
                result = ds.apply(module, insertion, example_inputs=self.x)
            except ds.errors.PassError:
                continue  # another method has opened those layers already
            module, inserted = result.module, inserted + len(result.changes)
        with tempfile.TemporaryDirectory() as folder:
            nodes = []
            for name, network in (("plain", self.model), ("drops", module)):
                path = Path(folder) / f"{name}.onnx"
                ds.export_onnx(network, path, example_inputs=(self.x,))
                graph = onnx.load(path, load_external_data=False).graph
                nodes.append(sorted(node.op_type for node in graph.node))
            ds.verify(self.model, Path(folder) / "drops.onnx", (self.x,))
        same = "the same nodes as" if nodes[0] == nodes[1] else f"{NO}: other nodes than"
        return f"{inserted} layers at once: {same} in the plain network's ONNX ({len(nodes[0])})"


class _WithSamples(nn.Module):
    """A layer that takes more than the tensor it drops, as one that does not."""

    def __init__(self, layer: nn.Module, *others: Tensor) -> None:
        super().__init__()
        self.layer, self.others = layer, others
        self.p = rate(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer."""
        return self.layer(x, *self.others)


def _reason(error: ds.DropsurgeryError) -> str:
    """Return why nothing could be inserted, in one line."""
    if error.where and "can use none" in error.problem:
        return error.where
    return error.problem


def attentive_cells(model: nn.Module, x: Tensor, tap: str) -> list[str]:
    """Return the row of Attentive CutMix, which is no layer of the network it looks through."""
    if not tap:
        return ["- (its input is no image)", *["-"] * (len(COLUMNS) - 1)]
    attention = ds.tap(model, tap)
    mix = ds.layers.AttentiveCutMix(attention, generator=torch.Generator().manual_seed(4))
    mixed = mix(x)
    area = mixed.mask.flatten(1).double().mean(1)
    exact = torch.equal(area.float(), mixed.lam)
    pasted = torch.where(mixed.mask, x[mixed.source], x)
    right = exact and torch.equal(mixed.images, pasted)
    mix.generator = None
    torch._dynamo.reset()
    try:
        torch.compile(mix, fullgraph=True, backend="eager")(x)
        compiles = YES
    except torch._dynamo.exc.TorchDynamoException as error:
        compiles = f"{NO}: {str(error).splitlines()[0]}"
    return [
        f"taps '{tap}'",
        YES if mix.eval()(x).images is x else NO,
        f"{YES} (exact)" if right else NO,
        compiles,
        "- (works on batches, outside the network)",
        "- (its count of cells is no rate)",
        "- (the network is not changed)",
    ]
