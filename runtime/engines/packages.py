"""Packages for programs without Python: one step of a transformer and one chunk of the decoder, weights included, as
PyTorch's ahead-of-time compiler writes them (.pt2) and `dit_runtime::Engine` of csrc/embed runs them.

    step-1.pt2         x [1, C, T, H, W], sigma [1], text [1, S, text_dim] -> velocity [1, C, T, H, W]
    decode-first.pt2   latent [1, C, 1, H, W], kept.0, ... (zeros) -> pixels [1, 3, F, height, width], kept.0, ...
    decode-next.pt2    the same for each next latent frame

A second expert's step is step-2.pt2. `text` is zero behind the prompt's tokens, as the published models have it. Our
fused operations are decomposed to their definitions, which the compiler fuses in its own way. All sizes are fixed, and
all tensors contiguous.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from runtime.engines.inductor import expect_compiler
from runtime.kernels.backend import forced
from runtime.models.spec import Autoencoder, ModelSpec, Transformer

FORMAT = "1"

Tensors = dict[str, torch.Tensor]


class Step(nn.Module):
    """One velocity for one prompt."""

    def __init__(self, network: Transformer, text_length: int) -> None:
        super().__init__()
        self.network, self.text_length = network, text_length

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the velocity; the text is projected anew each time, a thousandth of a step at usual sizes."""
        t, h, w = x.shape[2:]
        return self.network(x, sigma, self.network.project(text.unbind(0), self.text_length, (t, h, w)))


class Chunk(nn.Module):
    """The pixels of one latent frame, and what the next one needs to remember."""

    def __init__(self, network: Autoencoder, first: bool) -> None:
        super().__init__()
        self.network, self.first = network, first

    def forward(self, latent: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels, remembered = self.network.decode_chunk(latent, kept, self.first)
        return pixels, *remembered


def write_packages(
    transformers: Sequence[Transformer],
    vae: Autoencoder,
    spec: ModelSpec,
    shape: tuple[int, int, int, int],
    folder: Path,
) -> list[Path]:
    """Write the packages of a model for latents of `shape` [C, T, H, W] and return their files.

    Raises ValueError for a model whose steps take more than text, and without a C++ compiler.
    """
    if spec.conditioning in ("channels", "control"):
        raise ValueError(
            f"{spec.name} takes pictures or clips as inputs of its own, for which no package is written yet; take a "
            "text-to-video model"
        )
    expect_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    device = next(nn.Module.parameters(vae)).device  # type: ignore[arg-type]
    x = torch.zeros(1, *shape, device=device)
    files = []
    for expert, network in enumerate(transformers, 1):
        text = torch.zeros(1, spec.text_length, network.text_dim, device=device)
        given = {"x": x, "sigma": torch.full((1,), 0.5, dtype=torch.float64, device=device), "text": text}
        facts = {"part": "step", "expert": str(expert), "model": spec.name}
        if spec.boundary is not None:
            facts["boundary"] = str(spec.boundary)
        module = Step(network, spec.text_length).eval()
        files.append(write(module, given, ["velocity"], facts, folder / f"step-{expert}.pt2"))
    kept = {f"kept.{index}": each for index, each in enumerate(vae.kept_at_first(x[:, :, :1]))}
    for name in ("first", "next"):
        facts = {"part": f"decode_{name}", "model": spec.name}
        chunk = Chunk(vae, name == "first").eval()
        files.append(
            write(chunk, {"latent": x[:, :, :1]} | kept, ["pixels", *kept], facts, folder / f"decode-{name}.pt2")
        )
    return files


def write(module: nn.Module, given: Tensors, results: Sequence[str], facts: Mapping[str, str], file: Path) -> Path:
    """Compile a module for example inputs into a file, which is there whole or not at all."""
    given = {name: each.contiguous() for name, each in given.items()}  # compiled code is bound to strides, unchecked
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.pt2")  # the compiler insists on the suffix
    try:
        with forced("ref"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, tuple(given.values()), strict=False)
            found = [node.meta["val"] for node in program.graph.output_node().args[0]]
            ports = {"inputs": ports_of(given), "outputs": ports_of(dict(zip(results, found, strict=True)))}
            noted = {"dit_runtime": FORMAT, "torch": torch.__version__, **ports, **facts}
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(unfinished), inductor_configs={"aot_inductor.metadata": noted}
            )
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def ports_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return what a package says of its inputs or outputs: "x float32 1 4 2 4 6; sigma float64 1"."""
    return "; ".join(
        " ".join([name, str(each.dtype).removeprefix("torch."), *map(str, each.shape)])
        for name, each in tensors.items()
    )
