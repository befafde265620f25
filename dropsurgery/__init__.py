"""Model surgery and verified inference export for PyTorch.

The way through the package: a network is **traced** into a graph whose modules are clones and
whose tensors are the network's own (`graph/trace.py`); **analyses** read the graph and never change
it (`graph/residual.py`: which adds join a branch to a skip); **passes** are frozen dataclasses that
plan on an analysis and then edit the graph in a straight line (`passes/`); **verbs** are presets of
passes (`surgery.py`); the result is **exported** (`export.py`) and **verified** against the network
it came from, in multiples of that network's own rounding error (`verify/`).

Imports point one way: errors, tables, survival ← layers ← graph ← passes ← surgery, store ← export
← verify ← testing ← report ← cli. Importing the package loads torch and nothing heavier.

What surgery looks like, on the smallest residual network there is::

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return x + torch.relu(self.norm(self.conv(x)))

    >>> print(ds.trace(Block()).code)
    def forward(self, x):
        conv = self.conv(x)
        norm = self.norm(conv);  conv = None
        relu = torch.relu(norm);  norm = None
        add = x + relu;  x = relu = None
        return add

    >>> print(ds.retrofit(Block(), final_survival=0.5).code)
    def forward(self, x):
        conv = self.conv(x)
        norm = self.norm(conv);  conv = None
        relu = torch.relu(norm);  norm = None
        drop_path = self.drop_path(relu);  relu = None
        add = x + drop_path;  x = drop_path = None
        return add

    >>> print(ds.slim(ds.retrofit(Block(), final_survival=0.5)).code)
    def forward(self, x):
        conv = self.conv(x)
        relu = torch.relu(conv);  conv = None
        add = x + relu;  x = relu = None
        return add
"""

from dropsurgery import errors, layers, ramps, survival
from dropsurgery.compute import expected_compute
from dropsurgery.distributed import check_distributed, ddp_options
from dropsurgery.errors import DropsurgeryError
from dropsurgery.export import export_onnx
from dropsurgery.graph.inventory import find_drops
from dropsurgery.graph.residual import find_residuals
from dropsurgery.graph.trace import trace
from dropsurgery.layers import DropPath
from dropsurgery.monte_carlo import draw_masks, mc_predict
from dropsurgery.passes.base import apply
from dropsurgery.passes.drop_path import InsertDropPath, RemoveDropPath
from dropsurgery.passes.dropout import ConvertDropout
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from dropsurgery.passes.insert_cutout import InsertCutout
from dropsurgery.passes.insert_drop_block import InsertDropBlock
from dropsurgery.passes.insert_drop_connect import InsertDropConnect
from dropsurgery.passes.insert_dropout import InsertDropout
from dropsurgery.passes.insert_weighted_channel_dropout import InsertWeightedChannelDropout
from dropsurgery.passes.move_dropout import MoveDropoutAfterLastNorm
from dropsurgery.passes.remove_drops import RemoveDrops
from dropsurgery.passes.tap import tap
from dropsurgery.provenance import check_record, hash_weights, record
from dropsurgery.rates import RateSchedule
from dropsurgery.recalibrate import recalibrate_batchnorm
from dropsurgery.scale import L1Penalty, find_scale_invariant, weight_decay_groups
from dropsurgery.schedule import SurvivalSchedule, seed_drop_paths, set_survival
from dropsurgery.store import load, save
from dropsurgery.surgery import retrofit, slim
from dropsurgery.variance_shift import find_variance_shift
from dropsurgery.verify import locate, verify, write_repro

# After `verify`, so that the name is the function and not the package it lives in.
from dropsurgery import testing  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "ConvertDropout",
    "DropPath",
    "DropsurgeryError",
    "FoldBatchNorm",
    "InsertCutout",
    "InsertDropBlock",
    "InsertDropConnect",
    "InsertDropPath",
    "InsertDropout",
    "InsertWeightedChannelDropout",
    "L1Penalty",
    "MoveDropoutAfterLastNorm",
    "RateSchedule",
    "RemoveDropPath",
    "RemoveDrops",
    "SurvivalSchedule",
    "apply",
    "check_distributed",
    "check_record",
    "ddp_options",
    "draw_masks",
    "errors",
    "expected_compute",
    "export_onnx",
    "find_drops",
    "find_residuals",
    "find_scale_invariant",
    "find_variance_shift",
    "hash_weights",
    "layers",
    "load",
    "locate",
    "mc_predict",
    "ramps",
    "recalibrate_batchnorm",
    "record",
    "retrofit",
    "save",
    "seed_drop_paths",
    "set_survival",
    "slim",
    "survival",
    "tap",
    "testing",
    "trace",
    "verify",
    "weight_decay_groups",
    "write_repro",
]
