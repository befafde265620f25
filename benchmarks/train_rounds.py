"""Rounds of training steps, and the file that their results are written to."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_networks import Step

RESULTS = Path("docs/train_step.json")
# Its sections of compiled steps.
COMPILED, AS_IT_IS = "compiled", "compiled, malloc as it is"
FINAL = (0.5, 0.8)
# At these batch sizes both rates are measured, at the others p_L = 0.5 alone.
BOTH_RATES = (16, 64)
# So many steps share the plain ones before and after them.
TOGETHER = 3
# What tells glibc to keep freed memory, and oneDNN to keep what it compiled for each shape: it does
# for 1,024 of them, which one network with a subset stays below and ten of them do not.
KEEPS = "MALLOC_TRIM_THRESHOLD_"
KEEP_FREED = {
    KEEPS: "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
    # Huge pages, or it hangs on what ran before whether a network's memory is in some.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def one_round(
    plain: Step, steps: dict[str, Step], tight: bool = False
) -> tuple[float, dict[str, float]]:
    """Run every step; return the plain one's seconds, and each over the plain ones around it.

    Args:
        plain: the step to compare with.
        steps: the others.
        tight: give memory back after each step, or so many of them together do not fit.
    """

    def run(step: Step) -> float:
        seconds = step()
        if tight:
            step.optimizer.zero_grad()
            ctypes.CDLL(None).malloc_trim(0)
        return seconds

    ratios = {}
    keys, before = list(steps), run(plain)
    for start in range(0, len(keys), TOGETHER):
        seconds = {key: run(steps[key]) for key in keys[start : start + TOGETHER]}
        after = run(plain)
        ratios.update({key: 2.0 * own / (before + after) for key, own in seconds.items()})
        before = after
    return before, ratios


def several_rounds(
    plain: Step, steps: dict[str, Step], rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the plain step's seconds and each other one's ratios, round by round."""
    seconds: list[float] = []
    ratios: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        own, of_round = one_round(plain, steps)
        seconds.append(own)
        for key, ratio in of_round.items():
            ratios[key].append(ratio)
    return seconds, ratios


def figures(ratios: list[float]) -> dict[str, float]:
    """Return the median of some ratios, and their ends."""
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def results() -> dict[str, Any]:
    """Return what was measured so far."""
    document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return document


def keep(section: str, key: str, value: Any) -> None:
    """Write one result into the file of results."""
    document = results()
    document.setdefault(section, {})[key] = value
    document["about"] = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        "one thread, float32"
    )
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def keep_freed() -> None:
    """Start this process anew so that the C library keeps freed memory, unless it does.

    Or it gives it back, when depends on what ran before, and every page of it costs a fault: up to
    a third of a step of the plain ResNet-110, or nothing.
    """
    if not os.environ.get(KEEPS):
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_FREED}
        )
