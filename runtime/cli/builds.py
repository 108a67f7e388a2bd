"""The build verb: engines made ahead of time, and the store they are in: what it holds and whether it is whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from runtime.denoising import prepare_context
from runtime.engines import builder, inductor, packages
from runtime.engines.store import Entry, Store, architecture
from runtime.model import Loading, Model, load
from runtime.models.spec import ModelSpec
from runtime.request import Request

BUILDABLE = ("inductor", "tensorrt")


def build(
    name: str, sizes: Sequence[tuple[int, int]], frames: int | None, *,
    engine: str, gpu: str | None, options: builder.Options, how: Loading, package: str | None = None,
) -> list[str]:  # fmt: skip
    """Make the engines of a model for sizes (width, height) in pixels and up to `frames` frames; return what was made.

    Sizes and frames are the model's defaults where they are not given. `package` is a folder for what programs without
    Python run, `how` says dtype and LoRAs of the model. Raises ValueError for what is not legal.
    """
    if engine not in BUILDABLE:
        raise ValueError(f"engine is {engine!r}; what can be built ahead: {', '.join(BUILDABLE)}")
    if package is not None:
        if engine != "inductor":
            raise ValueError(f"engine is {engine!r}; packages for programs without Python are written by inductor")
        return write_packages(load(name, **how), sizes, frames, Path(package))
    if engine == "inductor":
        if gpu is not None:
            raise ValueError("engine 'inductor' compiles for the device that the model is on; leave --gpu out")
        return [f"compiled for {compile_blocks(load(name, **how))}"]
    gpu = gpu or this_gpu()
    builder.library(gpu)  # before any weights are read
    if how.get("dtype", "auto") == "auto":
        how = {**how, "dtype": "bfloat16"}
    model = load(name, **how)
    if not options.stream and outgrown(model):
        options = replace(options, stream=True)
    own = model.spec.defaults
    profiles = [profile_of(model.spec, size, frames) for size in sizes or [(own.width, own.height)]]
    made = []
    for expert, network in enumerate(model.transformers):
        began = time.perf_counter()
        folder = builder.build_engine(
            network, model.spec, profiles, gpu, f"{model.fingerprint} expert {expert}", options
        )
        size = (folder / builder.ENGINE).stat().st_size
        made.append(f"{folder}: {size / 2**20:.0f} MiB for {gpu} in {time.perf_counter() - began:.0f} s")
    return made


def outgrown(model: Model) -> bool:
    """Tell whether an expert's weights are more than the GPU of this machine has room for, so that they must stream."""
    if not torch.cuda.is_available():
        return False
    _, total = torch.cuda.mem_get_info()
    return model.costs.transformer.bytes(model.dtype.itemsize) > builder.SPARE * total


def write_packages(model: Model, sizes: Sequence[tuple[int, int]], frames: int | None, folder: Path) -> list[str]:
    """Write the packages of one size and number of frames into a folder; ValueError for several sizes."""
    if len(sizes) > 1:
        raise ValueError(f"{len(sizes)} sizes are given; a folder of packages is for one size")
    own = model.spec.defaults
    width, height = sizes[0] if sizes else (own.width, own.height)
    request = Request(prompt="any", width=width, height=height, num_frames=frames).resolved(model.spec)
    assert request.num_frames
    shape = model.spec.latent_shape(request.num_frames, height, width)
    vae = model.autoencoder(model.device, torch.float32)
    files = packages.write_packages(model.transformers, vae, model.spec, shape, folder)
    return [f"{file}: {file.stat().st_size / 2**20:.1f} MiB" for file in files]


def this_gpu() -> str:
    """Return the architecture of the machine's GPU; ValueError where it has none."""
    if not torch.cuda.is_available():
        raise ValueError("this machine has no NVIDIA GPU to build for; say which it will be, such as --gpu sm89")
    return architecture(torch.device("cuda"))


def profile_of(spec: ModelSpec, size: tuple[int, int], frames: int | None) -> builder.Profile:
    """Return the profile of a size and a number of frames that the model makes; ValueError for any other."""
    request = Request(prompt="any", width=size[0], height=size[1], num_frames=frames).resolved(spec)
    assert request.width and request.height and request.num_frames
    return builder.make_profile(spec, request.width, request.height, request.num_frames)


@torch.inference_mode()
def compile_blocks(model: Model) -> str:
    """Compile every kind of block that a request with or without guidance meets, for any size; return for what."""
    t, h, w = (4 * patch for patch in model.spec.patch)
    shape = (model.spec.latent_channels, t, h, w)
    x = torch.zeros(1, *shape, device=model.device)
    for rows in (1, 2):
        texts = [torch.zeros(3 + row, model.transformers[0].text_dim) for row in range(rows)]
        context = prepare_context(model, texts, shape)
        for expert, network in enumerate(model.transformers):
            inductor.build(network, expert)(x, torch.tensor([0.5], dtype=torch.float64), context)
    kinds = {str(parameter.dtype) for parameter in cast(nn.Module, model.transformers[0]).parameters()}
    return f"{architecture(model.device)} in {', '.join(sorted(kind.removeprefix('torch.') for kind in kinds))}"


def listing() -> list[str]:
    """Describe what the store holds, the most recently used first."""
    store = Store()
    entries = store.entries()
    lines = [f"{store.folder}: {len(entries)} entries, {sum(entry.bytes for entry in entries) / 2**20:.1f} MiB"]
    return lines + [describe(entry) for entry in entries]


def describe(entry: Entry) -> str:
    """Describe one entry in one line."""
    parts = entry.key.parts
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    what = parts.get("shapes", "")
    if entry.key.kind == builder.KIND:
        what = "; ".join(profile.name for profile in builder.read_profiles(what))
    facts = ", ".join(filter(None, (parts.get("gpu"), parts.get("dtype"), parts.get("libraries"), what)))
    return f"{entry.name}  {entry.bytes / 2**20:.1f} MiB, used {used}: {facts}"


def check() -> list[str]:
    """Read every entry; return a line for each. Raises ValueError with the lines where one is damaged."""
    verdicts = Store().check()
    if damaged := [f"{name} {wrong}" for name, wrong in verdicts.items() if wrong]:
        raise ValueError(
            f"{len(damaged)} of {len(verdicts)} entries are damaged: {'; '.join(damaged)}. They are made again when "
            "needed; --prune removes them"
        )
    return [f"{name}: whole" for name in verdicts] or ["the store is empty"]


def prune(keep: float | None) -> list[str]:
    """Remove what is damaged, and the least recently used beyond `keep` GiB (None: the store's own limit)."""
    if keep is not None and not 0 <= keep < 2**20:
        raise ValueError(f"--keep is {keep:g}; legal: GiB, 0 or more")
    store = Store()
    removed = [name for name, wrong in store.check().items() if wrong and store.remove(name)]
    removed += store.prune(None if keep is None else int(keep * 2**30))
    return [f"removed {name}" for name in removed] or ["nothing to remove"]
