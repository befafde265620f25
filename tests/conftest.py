"""Runs before any test module is imported, so that each can just `import torchvision`."""

from __future__ import annotations

from dropsurgery.models import import_torchvision

import_torchvision()
