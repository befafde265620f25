"""Runs before any test module is imported, so that each can just `import torchvision`."""

from __future__ import annotations

from hypothesis import settings

from dropsurgery.models import import_torchvision

# `pytest --hypothesis-profile=thorough` tries thousands of random networks, new ones every time.
settings.register_profile("thorough", max_examples=2_000, deadline=None, print_blob=True)

import_torchvision()
