"""The inductor engine: each kind of block compiled ahead of time by PyTorch's compiler and kept in the store.

A transformer's blocks differ in their weights alone, so the weights are arguments of the compiled code: one small
package serves all blocks, both experts and every checkpoint of the same shape, for any number of tokens and text keys.
A process that finds it in the store starts without compiling.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call

from runtime.engines.export import MOST_KEYS, MOST_TOKENS
from runtime.engines.store import Damaged, Key, Store, architecture, code_hash
from runtime.kernels.backend import forced
from runtime.models.layers import in_8_bits
from runtime.models.spec import Context, Denoiser, Transformer
from runtime.trace import note, span

PACKAGE = "block.pt2"
BOUNDS = {"L": MOST_TOKENS, "S": MOST_KEYS}

_compiled: WeakKeyDictionary[nn.Module, Compiled] = WeakKeyDictionary()


def build(transformer: Transformer, expert: int, weights: str = "") -> Denoiser:
    """Return a Denoiser that runs the transformer with compiled blocks; they are compiled, or loaded, when first met.

    Raises ValueError where there is no C++ compiler and no package in the store.
    """
    module = cast(nn.Module, transformer)
    blocks = _compiled.setdefault(module, Compiled(repr(transformer.config)))

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        return transformer(x, sigma, context.experts[expert], blocks.run)

    return denoise


class Compiled:
    """The compiled kinds of blocks of one transformer."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.kinds: dict[Any, Callable[..., torch.Tensor]] = {}

    def run(self, block: nn.Module, *arguments: torch.Tensor | None) -> torch.Tensor:
        """Call a block by its kind's compiled code."""
        sizes, narrow = pattern(block, arguments), narrow_layers(block)
        if (call := self.kinds.get((sizes, narrow))) is None:
            with span("denoise/compile"):
                call = self.kinds[sizes, narrow] = self.load(block, arguments, sizes)
        return call(list(block.parameters()), *arguments)

    def load(self, block: nn.Module, arguments: tuple, sizes: tuple[str, ...]) -> Callable[..., torch.Tensor]:
        """Return compiled code from the store, made now where it is not there."""
        device = next(block.parameters()).device
        parts = {
            "weights": "any",
            "network": f"{type(block).__qualname__} {self.network}",
            "code": code_hash(),
            "shapes": "; ".join(sizes),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in block.parameters()})),
            "gpu": architecture(device),
            "libraries": f"torch {torch.__version__}",
        }
        if narrow := narrow_layers(block):
            parts["fp8"] = ", ".join(narrow)
        try:
            return Store().fetch(
                Key("inductor", parts), lambda folder: package(block, arguments, folder / PACKAGE), load_package
            )
        except CannotPackage as error:
            note(f"no compiled package could be made ({error}); each block is compiled in this process instead")
            compiled = torch.compile(functional(block), dynamic=True)
            return lambda parameters, *given: compiled(parameters, *given)


def narrow_layers(block: nn.Module) -> tuple[str, ...]:
    """Return the names of a block's layers in 8 bits: with others so it is another kind."""
    return tuple(name for name, module in block.named_modules() if in_8_bits(module))


class CannotPackage(Exception):
    """Ahead-of-time compilation failed, in the compiler's own words."""


def pattern(block: nn.Module, arguments: tuple[torch.Tensor | None, ...]) -> tuple[str, ...]:
    """Return what compiled code is bound to, per argument of a block: its dtype and sizes, L and S left open."""
    free = free_axes(block, arguments)
    return tuple(
        "none"
        if tensor is None
        else f"{str(tensor.dtype).removeprefix('torch.')} "
        + " ".join(axes.get(axis, str(size)) for axis, size in enumerate(tensor.shape))
        for tensor, axes in zip(arguments, free, strict=True)
    )


def free_axes(block: nn.Module, arguments: tuple[torch.Tensor | None, ...]) -> list[dict[int, str]]:
    """Return per argument which axes are L or S, from the shapes that the block's class declares.

    With one modulation vector per several tokens (M > 1) L is a multiple of M, and is fixed.
    """
    shapes = [axes.split() for axes in block.shapes[: len(arguments)]]  # type: ignore[index]
    groups = max(
        tensor.shape[axes.index("M")]
        for tensor, axes in zip(arguments, shapes, strict=True)
        if tensor is not None and "M" in axes
    )
    letters = "S" if groups > 1 else "LS"
    return [
        {axis: letter for axis, letter in enumerate(axes) if letter in letters and tensor is not None}
        for tensor, axes in zip(arguments, shapes, strict=True)
    ]


def functional(block: nn.Module) -> nn.Module:
    """Return a module without parameters: (the block's parameters, *its arguments) -> its result."""
    names = [name for name, _ in block.named_parameters()]

    class Functional(nn.Module):
        def forward(self, parameters: list[torch.Tensor], *arguments: torch.Tensor | None) -> torch.Tensor:
            return functional_call(block, dict(zip(names, parameters, strict=True)), arguments)

    return Functional().eval()


def package(block: nn.Module, arguments: tuple[torch.Tensor | None, ...], file: Path) -> None:
    """Compile a block into a package; ValueError without a C++ compiler, CannotPackage where compiling fails.

    On a CPU our operations are traced into, so that their passes are fused; on a GPU they stay the nodes they are,
    which run our own kernels.
    """
    expect_compiler()
    parameters = [parameter.detach() for parameter in block.parameters()]
    sizes = {letter: torch.export.Dim(letter, min=2, max=most) for letter, most in BOUNDS.items()}
    free = [{axis: sizes[letter] for axis, letter in axes.items()} or None for axes in free_axes(block, arguments)]
    decomposed = forced("ref") if parameters[0].device.type == "cpu" else contextlib.nullcontext()
    try:
        with decomposed, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = (parameters, *(None if a is None else a.detach().clone() for a in arguments))
            shapes = ([None] * len(parameters), tuple(free))
            program = torch.export.export(functional(block), given, dynamic_shapes=shapes, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    except OSError:
        raise
    except Exception as error:  # of a compiler, whatever it is
        raise CannotPackage((str(error).splitlines() or [""])[0] or type(error).__name__) from error


def expect_compiler() -> None:
    """ValueError where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("engine 'inductor' compiles C++ and finds no compiler; install g++, or take eager") from error


def load_package(folder: Path) -> Callable[..., torch.Tensor]:
    """Load a package; Damaged where PyTorch refuses it."""
    try:
        return torch._inductor.aoti_load_package(str(folder / PACKAGE))
    except RuntimeError as error:
        raise Damaged(f"is refused by PyTorch ({str(error).splitlines()[0]})") from error
