"""All of dropsurgery on a small network: train, retrofit, fine-tune, slim, export, verify."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, DropsurgeryError
from dropsurgery.report import (
    Census,
    Report,
    Table,
    census,
    environment,
    medians_in_turns,
    onnx_census,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from dropsurgery.verify import Verdict

FINAL_SURVIVAL = 0.8
BATCH = 64
TEST_IMAGES = 400
VALIDATION_IMAGES = 300


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, as in the CIFAR networks of the ResNet paper."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A CIFAR-style ResNet for 16x16 grey images: three stages, dropout before the head.

    Args:
        depth: residual blocks in each stage (3 makes the 20 layers of ResNet-20).
        width: channels of the first stage; the next two have twice and four times as many.
        dropout: probability of the dropout before the last layer.
    """

    def __init__(self, depth: int = 3, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to class scores (N, 10)."""
        y = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return self.head(self.dropout(y))


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 16, 16), zero mean and unit variance over the training split; labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits, split by class."""

    train: Split
    validation: Split
    test: Split


def load_digits(seed: int = 0) -> Digits:
    """Load and split the digits; 8x8 pixels are scaled up to 16x16.

    Raises:
        DropsurgeryError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise DropsurgeryError(
            "the demo needs scikit-learn for its images", fix="pip install 'dropsurgery[demo]'"
        ) from error
    pixels, classes = datasets.load_digits(return_X_y=True)
    rest, test = model_selection.train_test_split(
        range(len(classes)), test_size=TEST_IMAGES, stratify=classes, random_state=seed
    )
    train, validation = model_selection.train_test_split(
        rest, test_size=VALIDATION_IMAGES, stratify=classes[rest], random_state=seed
    )
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    images = functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    images = (images - images[train].mean()) / images[train].std()
    labels = torch.from_numpy(classes).long()
    return Digits(*(Split(images[part], labels[part]) for part in (train, validation, test)))


def run_demo(
    folder: Path,
    *,
    epochs: int = 30,
    depth: int = 3,
    seed: int = 0,
    console: Console | None = None,
) -> tuple[Report, bool]:
    """Run the demo and leave `model.onnx`, `report.md` and `report.json` in `folder`.

    Args:
        folder: made where it does not exist. Nothing is left behind if the demo fails.
        epochs: the most epochs of training, and of fine-tuning; early stopping ends both sooner.
        depth: residual blocks in each of the three stages.
        seed: of the split, the weights, the order of batches and every drop.
        console: where progress goes; None for none.

    Returns:
        The report, and whether the exported network was verified as equal to the fine-tuned one.

    Raises:
        ArgumentError: `epochs` or `depth` is below 1.
        DropsurgeryError: scikit-learn is missing or `folder` cannot be written.
    """
    if epochs < 1 or depth < 1:
        raise ArgumentError(f"epochs and depth are at least 1, got {epochs} and {depth}")
    with _output_folder(folder) as scratch, torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        with _steps(console) as steps:
            report, ok = _operate(steps, load_digits(seed), scratch, epochs, depth)
        report.write(scratch)
        for name in ("model.onnx", "report.md", "report.json"):
            (scratch / name).replace(folder / name)
    return report, ok


def _operate(
    steps: _Steps, digits: Digits, scratch: Path, epochs: int, depth: int
) -> tuple[Report, bool]:
    model = DigitsResNet(depth)
    trained = steps.fit("train", model, digits, epochs=epochs, rate=0.05)
    original = copy.deepcopy(model)  # retrofit shares parameters, and fine-tuning changes them

    steps.say("retrofit")
    net = ds.retrofit(model, final_survival=FINAL_SURVIVAL)
    images = digits.test.images
    with torch.no_grad():
        identical = torch.equal(net.eval()(images), original(images))
    rows = [_Stage("original", census(ds.trace(original)), correct(original, digits.test))]
    rows.append(_Stage("retrofitted", census(net), correct(net, digits.test)))

    tuned = steps.fit("fine-tune", net, digits, epochs=epochs, rate=0.01)
    control = copy.deepcopy(original)
    steps.fit("control", control, digits, epochs=epochs, rate=0.01)
    rows.append(_Stage("fine-tuned", census(net), correct(net, digits.test)))

    steps.say("slim")
    slim = ds.slim(net)
    rows.append(_Stage("slim", census(slim), correct(slim, digits.test)))

    steps.say("export")
    whole_file, slim_file = scratch / "original.onnx", scratch / "model.onnx"
    ds.export_onnx(original, whole_file, (images[:2],))
    ds.export_onnx(slim, slim_file, (images[:2],))
    session = _session(slim_file)
    rows.append(_Stage("model.onnx", onnx_census(slim_file), correct(session, digits.test)))

    steps.say("verify")
    verdict = ds.verify(net, slim_file)
    steps.say("measure")
    cost = measure(original, slim, whole_file, slim_file, images[:1])
    found = _Found(
        stages=tuple(rows),
        control=correct(control, digits.test),
        cost=cost,
        trained=trained,
        tuned=tuned,
        identical=identical,
        verdict=verdict,
    )
    return _report(found), verdict.ok


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How a training run ended: epochs run, and the epoch whose weights were kept (from 1)."""

    epochs: int
    best: int
    seconds: float


def fit(
    model: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    rate: float,
    patience: int = 8,
    tick: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> Fit:
    """Train in place with SGD and a cosine rate, and keep the epoch of the best validation loss.

    Stops when the validation loss has not fallen for `patience` epochs. `tick` is called after each
    epoch with its number and the validation accuracy. The model is left in eval mode.
    """
    began = time.perf_counter()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    least, best, kept = float("inf"), 0, model.state_dict()
    for epoch in range(1, epochs + 1):
        _train_epoch(model, digits.train, optimizer)
        schedule.step()
        with torch.no_grad():
            scores = model.eval()(digits.validation.images)
            loss = functional.cross_entropy(scores, digits.validation.labels).item()
            right = (scores.argmax(1) == digits.validation.labels).float().mean().item()
        if loss < least:
            least, best = loss, epoch
            kept = {key: value.clone() for key, value in model.state_dict().items()}
        tick(epoch, right)
        if epoch - best >= patience:
            break
    model.load_state_dict(kept)
    return Fit(epoch, best, time.perf_counter() - began)


def _train_epoch(model: nn.Module, split: Split, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for batch in torch.randperm(len(split.labels)).split(BATCH):
        loss = functional.cross_entropy(model(split.images[batch]), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def correct(network: Callable[[Tensor], Tensor], split: Split) -> int:
    """Return how many images of `split` a network (in the mode it is in) classifies rightly."""
    with torch.no_grad():
        return int((network(split.images).argmax(1) == split.labels).sum())


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Medians for one image, in milliseconds, and file sizes, in bytes: original and slim."""

    torch_ms: tuple[float, float]
    onnxruntime_ms: tuple[float, float]
    file_bytes: tuple[int, int]
    nodes: tuple[int, int]
    repeats: int


def measure(
    original: nn.Module,
    slim: nn.Module,
    original_file: Path,
    slim_file: Path,
    image: Tensor,
    repeats: int = 200,
) -> Cost:
    """Time both networks side by side, in turns, so that a busy machine is unfair to neither."""
    before, after = _session(original_file), _session(slim_file)
    with torch.no_grad():
        eager = medians_in_turns(lambda: original(image), lambda: slim(image), repeats)
    exported = medians_in_turns(lambda: before(image), lambda: after(image), repeats)
    files = (original_file, slim_file)
    sizes = tuple(path.stat().st_size for path in files)
    nodes = tuple(onnx_census(path).nodes for path in files)
    return Cost(eager, exported, (sizes[0], sizes[1]), (nodes[0], nodes[1]), repeats)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # the same for both runtimes
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# --- telling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    name: str
    census: Census
    correct: int


@dataclass(frozen=True)
class _Found:
    stages: tuple[_Stage, ...]
    control: int
    cost: Cost
    trained: Fit
    tuned: Fit
    identical: bool
    verdict: Verdict


def _report(found: _Found) -> Report:
    verdict, trained, tuned = found.verdict, found.trained, found.tuned
    verified = "equal to" if verdict.ok else "NOT equal to"
    summary = (
        f"A ResNet with {found.stages[0].census.batch_norms} BatchNorms was trained on handwritten "
        f"digits and fine-tuned with drop path (survival 1 to {FINAL_SURVIVAL}, linear rule). "
        f"Weights kept: epoch {trained.best} of {trained.epochs}, then {tuned.best} of "
        f"{tuned.epochs}. The exported model.onnx was verified as {verified} the fine-tuned "
        f"network."
    )
    facts = {
        "ok": verdict.ok,
        "stages": [
            {"step": s.name, "correct": s.correct, "images": TEST_IMAGES, **vars(s.census)}
            for s in found.stages
        ],
        "control_correct": found.control,
        "bit_identical_after_retrofit": found.identical,
        "cost": vars(found.cost),
        "training": vars(trained),
        "fine_tuning": vars(tuned),
        "verdict": verdict.to_json(),
        "environment": environment(),
    }
    tables = (_step_table(found), _cost_table(found.cost))
    return Report("dropsurgery demo", summary, tables, facts, appendix=str(verdict))


def _step_table(found: _Found) -> Table:
    rows = [
        (
            stage.name,
            f"{stage.correct / TEST_IMAGES:.2%}",
            f"{stage.correct} / {TEST_IMAGES}",
            stage.census.nodes,
            stage.census.batch_norms,
            stage.census.dropouts,
            stage.census.drop_paths,
        )
        for stage in found.stages
    ]
    return Table(
        "What each step did",
        ("step", "accuracy", "test images", "nodes", "BatchNorms", "dropouts", "drop paths"),
        tuple(rows),
        f"Retrofitting left the outputs {'bit-identical' if found.identical else 'DIFFERENT'}. "
        "Nodes are those of the torch.fx graph, and of the ONNX graph in the last row. The same "
        f"fine-tuning without drop path gets {found.control} images right; one image is "
        f"{1 / TEST_IMAGES:.2%}, so one small run cannot tell them apart.",
    )


def _cost_table(cost: Cost) -> Table:
    return Table(
        "What a prediction costs",
        ("", "original", "slim", "ratio"),
        (
            _ratio("torch, eager (ms)", cost.torch_ms, "{:.3f}"),
            _ratio("onnxruntime (ms)", cost.onnxruntime_ms, "{:.3f}"),
            _ratio("ONNX nodes", cost.nodes, "{}"),
            _ratio("ONNX file (bytes)", cost.file_bytes, "{}"),
        ),
        f"One image on one thread of the CPU: medians of {cost.repeats} runs taken in turns. "
        "torch.onnx.export folds a BatchNorm that follows a convolution by itself, so the two ONNX "
        "files of this network are alike; what slim saves here shows in torch.",
    )


def _ratio(name: str, pair: tuple[float, float], form: str) -> tuple[str, str, str, str]:
    return name, form.format(pair[0]), form.format(pair[1]), f"{pair[1] / pair[0]:.2f}"


class _Steps:
    """One line of progress for each step."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def say(self, what: str) -> None:
        self._finish()
        if self.progress is not None:
            self.progress.add_task(what, total=1, note="")

    def fit(self, what: str, model: nn.Module, digits: Digits, *, epochs: int, rate: float) -> Fit:
        self._finish()
        progress = self.progress
        task = progress.add_task(what, total=epochs, note="") if progress is not None else None

        def tick(epoch: int, accuracy: float) -> None:
            if progress is not None and task is not None:
                note = f"epoch {epoch}, validation accuracy {accuracy:.1%}"
                progress.update(task, completed=epoch, note=note)

        return fit(model, digits, epochs=epochs, rate=rate, tick=tick)

    def _finish(self) -> None:
        if self.progress is not None:
            for task in self.progress.tasks:
                self.progress.update(task.id, total=task.total, completed=task.total)


@contextmanager
def _steps(console: Console | None) -> Iterator[_Steps]:
    if console is None:
        yield _Steps(None)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        steps = _Steps(progress)
        yield steps
        steps._finish()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: layers this small wait for a second one longer than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _output_folder(folder: Path) -> Iterator[Path]:
    """Make `folder` and a scratch folder in it; if the work fails, leave things as they were."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder))
    except OSError as error:
        raise DropsurgeryError(
            f"{folder} cannot be written: {error.strerror}", fix="--out with another folder"
        ) from error
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(missing[-1] if missing else scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch)
