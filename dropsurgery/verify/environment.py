"""What a comparison was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch


def environment(*, onnx_file: bool, device: torch.device) -> dict[str, str]:
    """Return the versions of everything that computed, by name.

    Args:
        onnx_file: whether onnxruntime ran the candidate.
        device: of the reference.
    """
    import dropsurgery

    found = {
        "dropsurgery": dropsurgery.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if onnx_file:
        import onnxruntime

        found["onnx"] = version("onnx")
        found["onnxruntime"] = onnxruntime.__version__
        if built_for := getattr(onnxruntime, "cuda_version", ""):
            found["onnxruntime's cuda"] = str(built_for)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version()
        found["cudnn"] = "none" if cudnn is None else str(cudnn)
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
