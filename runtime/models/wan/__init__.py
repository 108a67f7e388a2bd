"""Wan 2.1 and 2.2, text to video."""

from runtime.models.wan.layouts import open_checkpoint, recognise
from runtime.models.wan.specs import REPOSITORIES

__all__ = ["REPOSITORIES", "open_checkpoint", "recognise"]
