"""Is an ONNX file, or another module, still the network that it was made from?"""

from __future__ import annotations

from dropsurgery.verify.compare import verify
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.verdict import OutputVerdict, Verdict

__all__ = ["Gate", "OutputVerdict", "Verdict", "verify"]
