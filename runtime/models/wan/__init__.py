"""Wan 2.1 and 2.2: text to video, pictures to video (I2V, FLF2V), and control (VACE)."""

from pathlib import Path

from runtime.models.spec import Checkpoint
from runtime.models.wan.layouts import open_diffusers
from runtime.models.wan.original import EXPERT_FOLDERS, TEXT_ENCODER, VAES, open_original
from runtime.models.wan.published import NETWORKS, published
from runtime.models.wan.specs import REPOSITORIES
from runtime.weights import read_json

PUBLISHED_NAMES = tuple(NETWORKS)

__all__ = ["PUBLISHED_NAMES", "REPOSITORIES", "open_checkpoint", "published", "recognise"]


def recognise(folder: Path) -> bool:
    """Tell whether a folder holds a Wan model in the diffusers or the original layout."""
    index = folder / "model_index.json"
    if index.exists():
        return "Wan" in str(read_json(index).get("_class_name", ""))
    config = folder / "config.json"
    if config.exists() and "WanModel" in str(read_json(config).get("_class_name", "")):
        return True
    return any((folder / name).exists() for name in (*VAES.values(), TEXT_ENCODER, *EXPERT_FOLDERS))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Describe a Wan checkpoint; ValueError for pipelines and settings that are not supported."""
    return open_diffusers(folder) if (folder / "model_index.json").exists() else open_original(folder)
