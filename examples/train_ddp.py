"""Fine-tune a retrofitted ResNet on handwritten digits with several processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py --epochs 3 --checkpoint run.pt

Started again with the same arguments and more epochs, it goes on from the checkpoint and ends bit
for bit where one run in a piece would have ended.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dropsurgery as ds
from dropsurgery.demo import Digits, load_digits
from dropsurgery.models import load_model


def network(name: str, final_survival: float, mode: Any) -> nn.Module:
    """Return a network with drop path on every residual branch, alike on every process."""
    torch.manual_seed(0)
    return ds.retrofit(load_model(name).module, final_survival=final_survival, mode=mode)


def images_of(split: Tensor) -> Tensor:
    """Return digits (N, 1, 16, 16) as what torchvision's networks take, (N, 3, 32, 32)."""
    return F.interpolate(split, size=(32, 32)).expand(-1, 3, -1, -1).contiguous()


def batches(digits: Digits, epoch: int, size: int) -> list[Tensor]:
    """Return this rank's batches of an epoch, as indices: the same split after a restart."""
    order = torch.randperm(len(digits.train.labels), generator=torch.Generator().manual_seed(epoch))
    mine = order[dist.get_rank() :: dist.get_world_size()]
    return [batch for batch in mine.split(size) if len(batch) == size]


def fingerprint(net: nn.Module) -> str:
    """Return a short digest of all weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Run the example on one rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--mode", default="subset", choices=["row", "subset", "batch"])
    parser.add_argument("--final-survival", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ramp", type=int, default=20, help="steps until the rates are full")
    parser.add_argument("--batch", type=int, default=64, help="images of each process")
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many an epoch")
    parser.add_argument("--checkpoint", type=Path, help="written after each epoch, and resumed")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    net = network(options.model, options.final_survival, options.mode).to(device)
    draws = ds.seed_drop_paths(net, 0, per_rank=True)  # each rank drops other samples
    ddp = DistributedDataParallel(net, **ds.ddp_options(net))
    ds.check_distributed(ddp)
    schedule = ds.SurvivalSchedule(ddp, ds.ramps.linear(options.ramp))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)

    first = 0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        draws.load_state_dict(state["draws"])
        first = state["epoch"] + 1

    digits = load_digits()
    images, labels = images_of(digits.train.images).to(device), digits.train.labels.to(device)
    for epoch in range(first, options.epochs):
        ddp.train()
        for batch in batches(digits, epoch, options.batch)[: options.steps]:
            batch = batch.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            draws.advance()
        net.eval()
        if dist.get_rank() == 0:
            with torch.no_grad():
                scores = net(images_of(digits.validation.images).to(device))
            right = (scores.argmax(1).cpu() == digits.validation.labels).float().mean()
            print(f"epoch {epoch}: loss {loss:.3f}, validation accuracy {right:.3f}", flush=True)
            if options.checkpoint:
                # Buffers are rank 0's on every rank (DistributedDataParallel broadcasts them), and
                # the draws of a rank follow from seed, step and rank: one file serves all.
                state = {
                    "epoch": epoch,
                    "net": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "draws": draws.state_dict(),
                }
                partial = options.checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(options.checkpoint)
    if dist.get_rank() == 0:
        print(f"step {draws.step}, weights {fingerprint(net)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
