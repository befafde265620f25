"""Is an ONNX file, or another module, still the network that it was made from?"""

from __future__ import annotations

from dropsurgery.verify.compare import verify
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.locate import locate
from dropsurgery.verify.location import Location
from dropsurgery.verify.repro import write_repro
from dropsurgery.verify.verdict import OutputVerdict, Verdict

__all__ = ["Gate", "Location", "OutputVerdict", "Verdict", "locate", "verify", "write_repro"]
