"""Wan 2.1 and 2.2, text to video."""

from runtime.models.wan.layouts import open_checkpoint, recognise
from runtime.models.wan.published import NETWORKS, published
from runtime.models.wan.specs import REPOSITORIES

PUBLISHED_NAMES = tuple(NETWORKS)

__all__ = ["PUBLISHED_NAMES", "REPOSITORIES", "open_checkpoint", "published", "recognise"]
