"""One family per folder; `open_checkpoint` asks each in turn whether a folder is its own."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from runtime.models.costs import Costs
from runtime.models.spec import Checkpoint, Defaults, ModelSpec

FAMILIES = ("wan",)


OWN_SETTINGS = {"name", "text_length", "captions", "expansion"}  # what runtime.json may say besides defaults


def families() -> list[ModuleType]:
    """Return the family packages.

    Each has `recognise(folder)`, `open_checkpoint(folder)`, `REPOSITORIES`, `published(name)`, `PUBLISHED_NAMES`.
    """
    return [import_module(f"{__name__}.{name}") for name in FAMILIES]


def repository(name: str) -> str:
    """Return the repository id of a published model's short name, or the name itself."""
    return next((f.REPOSITORIES[name] for f in families() if name in f.REPOSITORIES), name)


def published(name: str) -> tuple[ModelSpec, Costs] | None:
    """Return the facts and formulas of a published model, from its name in lower case alone; None for other names."""
    return next((found for family in families() if (found := family.published(name.lower()))), None)


def published_names() -> list[str]:
    """Return the names that `published` knows."""
    return [name for family in families() for name in family.PUBLISHED_NAMES]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Describe the checkpoint in a folder from its configs alone.

    ValueError where no family knows it, and where a link in it leads out of it.
    """
    for family in families():
        if family.recognise(folder):
            _check_links(folder)
            return _with_own_settings(family.open_checkpoint(folder))
    raise ValueError(
        f"{folder} is not a model of a known family ({', '.join(FAMILIES)}): expected model_index.json of a supported "
        "diffusers pipeline, or the original repository's files. Check the path, or convert the model with diffusers"
    )


def _check_links(folder: Path) -> None:
    """ValueError for a link that leads out of a folder; those of the Hugging Face cache may lead to its blobs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [Path(HF_HUB_CACHE), folder]
    if folder.absolute().parent.name == "snapshots":
        roots.append(folder.absolute().parent.parent)
    legal = [Path(os.path.realpath(root)) for root in roots]
    for place, folders, files in os.walk(folder):
        for link in (Path(place, name) for name in (*folders, *files)):
            target = Path(os.path.realpath(link))
            if link.is_symlink() and not any(target.is_relative_to(root) for root in legal):
                raise ValueError(
                    f"{link} is a link to {target}, outside the model's folder; legal: files within it, and links of "
                    "the Hugging Face cache. Copy or move what it leads to into the folder"
                )


def _with_own_settings(checkpoint: Checkpoint) -> Checkpoint:
    """Apply the folder's runtime.json, if there is one: {"name", "defaults": {...}, ...}."""
    file = checkpoint.folder / "runtime.json"
    if not file.exists():
        return checkpoint
    from runtime.weights import read_json  # not above: facts about a model are known without torch

    settings = read_json(file)
    own = settings.pop("defaults", {})
    known = {f.name for f in fields(Defaults)}
    if unknown := sorted(settings.keys() - OWN_SETTINGS) + sorted(own.keys() - known):
        raise ValueError(
            f"{file} has keys that are not known: {', '.join(unknown)}; legal: {', '.join(sorted(OWN_SETTINGS))}, and "
            f"in defaults {', '.join(sorted(known))}"
        )
    spec = checkpoint.spec
    return replace(checkpoint, spec=replace(spec, **settings, defaults=replace(spec.defaults, **own)))
