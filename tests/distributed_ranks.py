"""What two processes do in test_distributed.py: each case runs on both, and returns a report."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dropsurgery as ds

MODES = ("row", "subset", "batch")
RANKS = 2


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def network(mode: str) -> Any:
    """Return the same float64 network on every rank, dropping about half."""
    torch.manual_seed(0)
    return ds.retrofit(Net().double(), 0.5, rule="constant", mode=mode).train()


def batch(step: int, rank: int) -> Tensor:
    """Return the inputs of a step on a rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def loss_of(net: nn.Module, step: int, rank: int) -> Tensor:
    return net(batch(step, rank)).square().mean()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return each parameter's full gradient, zero where there is none."""
    found = {}
    for name, parameter in net.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        full = getattr(gradient, "full_tensor", None)
        found[name] = (full() if full else gradient).detach().clone()
    return found


def averaged(mode: str, step: int, per_rank: bool) -> dict[str, Tensor]:
    """Return the mean of the gradients that each rank has alone, reckoned without a wrapper."""
    rank, net = dist.get_rank(), network(mode)
    draws = ds.seed_drop_paths(net, 5, per_rank=per_rank)
    for _ in range(step):
        draws.advance()
    loss_of(net, step, rank).backward()
    found = gradients(net)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= RANKS
    return found


def shard(net: nn.Module, how: str) -> nn.Module:
    """Shard a network whole, layer by layer, or its blocks' layers as groups."""
    if how == "layers":
        for module in list(net.modules()):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                fully_shard(module)
    elif how == "groups":
        for block in net.blocks:  # type: ignore[union-attr]
            fully_shard([block.norm, block.up, block.down])
    elif how == "blocks":
        for block in net.blocks:  # type: ignore[union-attr]
            fully_shard(block)
    fully_shard(net)
    return net


def wrapped_gradients(mode: str, wrapper: str, per_rank: bool) -> dict[str, Any]:
    """Train three steps; return the largest error of a gradient, and which steps dropped what."""
    rank, net = dist.get_rank(), network(mode)
    draws = ds.seed_drop_paths(net, 5, per_rank=per_rank)
    if wrapper == "ddp":
        wrapped: nn.Module = DistributedDataParallel(net, **ds.ddp_options(net))
    else:
        wrapped = shard(net, wrapper)
    ds.check_distributed(wrapped)
    errors, missing = [], []
    for step in range(4):
        wrapped.zero_grad()
        loss_of(wrapped, step, rank).backward()
        missing.append(sum(p.grad is None for p in net.parameters()))
        found = gradients(net)
        expected = averaged(mode, step, per_rank)
        # The network alone gives other gradients than the average: the comparison can fail.
        errors.append(max(float((found[n] - expected[n]).abs().max()) for n in expected))
        draws.advance()
    return {"error": max(errors), "missing": missing, "scale": float(expected["head.bias"].norm())}


def alone_differs(mode: str) -> float:
    """Return how far a rank's own gradient is from the average."""
    net = network(mode)
    ds.seed_drop_paths(net, 5, per_rank=True)
    loss_of(net, 0, dist.get_rank()).backward()
    own, mean = gradients(net), averaged(mode, 0, True)
    return max(float((own[n] - mean[n]).abs().max()) for n in own)


def masks(mode: str, per_rank: bool) -> list[Any]:
    """Return what the drop paths draw over some steps."""
    net = network(mode)
    draws = ds.seed_drop_paths(net, 5, per_rank=per_rank)
    layers = [m for m in net.modules() if isinstance(m, ds.DropPath)]
    drawn: list[Any] = []
    for _ in range(8):
        for layer in layers:
            if mode == "batch":
                drawn.append(layer.survives())
                continue
            rows = layer.rows(torch.zeros(5, 2))
            assert rows is not None
            drawn += [v.tolist() if isinstance(v, Tensor) else v for v in rows]
        draws.advance()
    return drawn


class Run:
    """A training run with everything that a checkpoint has to hold."""

    def __init__(self, mode: str, seeded: bool) -> None:
        self.net = network(mode)
        self.draws = ds.seed_drop_paths(self.net, 5, per_rank=True) if seeded else None
        self.ddp = DistributedDataParallel(self.net, **ds.ddp_options(self.net))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.schedule = ds.SurvivalSchedule(self.ddp, ds.ramps.linear(6))
        torch.manual_seed(40 + dist.get_rank())

    def train(self, start: int, end: int) -> None:
        for step in range(start, end):
            self.optimizer.zero_grad()
            loss_of(self.ddp, step, dist.get_rank()).backward()
            self.optimizer.step()
            self.schedule.step()
            if self.draws is not None:
                self.draws.advance()

    def save(self, path: Path, rng: bool) -> None:
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "draws": self.draws.state_dict() if self.draws is not None else None,
            "rng": torch.get_rng_state() if rng else None,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.draws is not None:
            self.draws.load_state_dict(state["draws"])
        if state["rng"] is not None:
            torch.set_rng_state(state["rng"])


def resumed(mode: str, seeded: bool, rng: bool) -> bool:
    """Say whether a run that is cut in two ends bit for bit where one in a piece does."""
    whole = Run(mode, seeded)
    whole.train(0, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        first = Run(mode, seeded)
        first.train(0, 5)
        first.save(path, rng)
        second = Run(mode, seeded)
        second.load(path)
        second.train(5, 8)
    pairs = zip(whole.net.parameters(), second.net.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def second_step_without_options() -> str:
    """Return the error of DistributedDataParallel that was not told of mode "batch"."""
    net = network("batch")
    ds.seed_drop_paths(net, 5)
    ddp = DistributedDataParallel(net)
    try:
        for step in range(3):
            loss_of(ddp, step, dist.get_rank()).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def refused(mode: str, wrapper: str, **options: Any) -> str:
    """Return what `check_distributed` says of a wrapped network."""
    net = network(mode)
    if "seed" in options:
        ds.seed_drop_paths(net, options.pop("seed"), per_rank=options.pop("per_rank", False))
    wrapped = DistributedDataParallel(net, **options) if wrapper == "ddp" else shard(net, wrapper)
    try:
        ds.check_distributed(nn.Sequential(wrapped))
    except ds.errors.PassError as error:
        return str(error)
    return ""


def sharded_container_fails() -> str:
    """Return what happens where a block is sharded that nothing calls."""
    net = shard(network("row"), "blocks")
    try:
        loss_of(net, 0, dist.get_rank())
    except RuntimeError as error:
        return str(error)
    return ""


CASES: dict[str, Callable[[], Any]] = {
    **{
        f"gradients {mode} {wrapper} per_rank={per_rank}": (
            lambda m=mode, w=wrapper, p=per_rank: wrapped_gradients(m, w, p)  # type: ignore[misc]
        )
        for mode in MODES
        for wrapper in ("ddp", "whole", "layers", "groups")
        for per_rank in (False, True)
        if mode != "batch" or wrapper == "ddp" or not per_rank
    },
    **{f"alone {m}": lambda m=m: alone_differs(m) for m in MODES},  # type: ignore[misc]
    **{
        f"masks {mode} per_rank={p}": lambda m=mode, p=p: masks(m, p)  # type: ignore[misc]
        for mode in MODES
        for p in (False, True)
    },
    **{
        f"resume {mode} {kind}": lambda m=mode, k=kind: resumed(  # type: ignore[misc]
            m, k == "seeded", k == "global"
        )
        for mode in MODES
        for kind in ("seeded", "global", "forgotten")
    },
    "unused": second_step_without_options,
    "refused ddp": lambda: refused("batch", "ddp"),
    "refused static": lambda: refused("batch", "ddp", static_graph=True),
    "refused blocks": lambda: refused("row", "blocks"),
    "refused unseeded": lambda: refused("batch", "whole"),
    "refused per rank": lambda: refused("batch", "layers", seed=3, per_rank=True),
    "fine": lambda: refused("batch", "groups", seed=3) + refused("subset", "ddp"),
    "container": sharded_container_fails,
}


def run_cases() -> list[dict[str, Any]]:
    """Run every case on two processes; return the reports of each rank by case."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=RANKS)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # DistributedDataParallel logs that a step had nothing unused; it is meant to happen.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    reports: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, case in CASES.items():
            try:
                reports[name] = case()
            except Exception:
                reports[name] = traceback.format_exc()
            dist.barrier()
    torch.save(reports, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
