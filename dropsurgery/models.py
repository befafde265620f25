"""Model names from the command line: `torchvision:NAME`, `timm:NAME`, `FILE.py:FACTORY`."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

from dropsurgery.errors import ModelLoadError

# torchvision registers shape functions for these two whether or not its compiled ops are there, and
# fails where they are not. A schema is all that the registration asks for.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# An operator lives as long as the library object that declared it.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled ops are missing, and return it.

    The package from PyPI next to a CPU build of torch has no compiled ops, and its import fails
    with "operator torchvision::nms does not exist". Only after it has failed that way are the
    missing ones of the two schemas declared and the import tried again: models work, detection ops
    raise when they are called. A torchvision that imports is never touched.

    Raises:
        ModelLoadError: torchvision is not installed, or cannot be imported for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not re.search(r"operator torchvision::q?nms does not exist", str(error)):
            raise _broken("torchvision", error) from error
    except ImportError as error:
        raise _absent("torchvision", error) from error
    for name in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise _broken("torchvision", error) from error


def import_timm() -> ModuleType:
    """Import timm, which needs torchvision (see `import_torchvision`), and return it.

    Raises:
        ModelLoadError: timm or torchvision is not installed or cannot be imported.
    """
    import_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise _absent("timm", error) from error


def _absent(package: str, error: ImportError) -> ModelLoadError:
    if getattr(error, "name", None) != package:
        return _broken(package, error)
    return ModelLoadError(
        f"{package} is not installed", fix="pip install 'dropsurgery[models]', or name a FILE.py"
    )


def _broken(package: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{package} cannot be imported: {error}",
        fix=f"install builds of torch and {package} that belong together",
    )
