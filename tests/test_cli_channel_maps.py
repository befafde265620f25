"""How the command line writes the shifts that `slim` leaves."""

from __future__ import annotations

from pathlib import Path

from tests.test_channel_maps_export import operations
from tests.test_cli import Cli, run

__all__ = ["run"]  # the fixture

NETWORK = """
from tests.test_channel_maps_export import PreActivation
"""


def test_as_convolutions_or_as_they_are(run: Cli) -> None:
    Path("pre.py").write_text(NETWORK)
    words = ("export", "pre.py:PreActivation", "--input", "3x9x9", "-o", "m.onnx")
    assert run(*words).code == 0
    convolutions = operations(Path("m.onnx"))
    assert run(*words, "--channel-maps", "elementwise", "--no-verify").code == 0
    plain = operations(Path("m.onnx"))
    assert "BatchNormalization" not in plain
    assert plain["Add"] > convolutions["Add"]
    assert plain["Add"] - convolutions["Add"] == convolutions["Conv"] - plain["Conv"]
