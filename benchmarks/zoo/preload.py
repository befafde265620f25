"""Imported once by the server process, so that a model's process starts with everything loaded."""

from dropsurgery.models import import_timm

import_timm()
