"""What runs an operation here: the reference, Triton, or the CUDA library; and how a Triton kernel is launched.

Without Triton or a GPU everything still works by the references. `forced` and `recorded` are for tests, benchmarks and
the compile report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from . import cuda

try:
    import triton
    import triton.language as tl
except ImportError:  # the extra [triton], or a CUDA build of PyTorch, brings it
    triton = tl = None

# Read inside kernels, once: whether Triton's interpreter runs them.
INTERPRETED = triton is not None and tl.constexpr(triton.knobs.runtime.interpret)
Implementation = Callable[..., Any]
IMPLEMENTATIONS = ("ref", "triton", "cuda")

_library = torch.library.Library("runtime", "FRAGMENT")
_forced: ContextVar[str | None] = ContextVar("forced", default=None)
_recorder: ContextVar[list[Launch] | None] = ContextVar("recorder", default=None)
_capability: ContextVar[tuple[int, int] | None] = ContextVar("capability", default=None)


def jit(function: Callable[..., Any]) -> Any:
    """Make a Triton kernel of a function, where Triton is installed."""
    return function if triton is None else triton.jit(function)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Let every operation inside take one implementation: "ref", "triton" or "cuda"; ValueError where it has none."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; legal: {', '.join(IMPLEMENTATIONS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Tell whether an implementation is forced, so that defaults of an operation's own do not apply."""
    return _forced.get() is not None


def is_opaque() -> bool:
    """Tell whether a tracer runs that shall see one node per operation.

    Under `forced("ref")` torch.export sees the definition's own steps instead; Dynamo cannot read a context variable.
    """
    return torch.compiler.is_compiling() and (torch.compiler.is_dynamo_compiling() or not is_forced())


def pick(
    tensor: torch.Tensor, settings: Mapping[str, Any] | None = None, **implementations: Implementation | None
) -> Implementation:
    """Return the implementation for a tensor: the forced one, Triton on an NVIDIA GPU, else the reference.

    Keywords are `ref`, `triton`, `cuda`; None stands for one that this operation or this machine does not have. On a
    GPU `settings`, as `tuning.tuned` returns them, may name another than Triton, which is taken where it is there.
    """
    name = _forced.get()
    if name is not None:
        found = implementations.get(name)
        if found is None:
            raise ValueError(f"this operation has no implementation {name!r} here")
        return found
    if tensor.device.type == "cuda":
        if (settings or {}).get("implementation") == "cuda" and cuda.available(tensor):
            assert implementations["cuda"] is not None
            return implementations["cuda"]
        fast = implementations.get("triton") if triton is not None else None
        if fast is not None:
            return fast
        _warn_once()
    reference = implementations["ref"]
    assert reference is not None
    return reference


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned and triton is None:
        _warned = True
        warnings.warn(
            "Triton is not installed, so GPU tensors take the slow references; install the extra [triton]",
            stacklevel=4,
        )


@dataclass(frozen=True)
class Launch:
    """One recorded launch: enough to compile the kernel for any GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # run-time arguments by name: tensors, ints, floats
    constants: dict[str, Any]  # tl.constexpr arguments by name
    options: dict[str, int]  # num_warps, num_stages, enable_fp_fusion


@contextmanager
def recorded(capability: tuple[int, int] | None = None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as for a GPU of this compute capability; tensors may be on meta."""
    launches: list[Launch] = []
    recorder, target = _recorder.set(launches), _capability.set(capability)
    try:
        yield launches
    finally:
        _recorder.reset(recorder)
        _capability.reset(target)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's compute capability, or the one that is recorded for; None for other devices."""
    if (target := _capability.get()) is not None:
        return target
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_fp8(device: torch.device) -> bool:
    """Tell whether Triton can make e4m3 numbers for a device: GPUs before sm_89 cannot."""
    return triton is not None and (capability_of(device) or (8, 9)) >= (8, 9)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Run a Triton kernel over a grid, on the device of its first tensor; a None argument is passed as a constant."""
    constants = constants | {name: None for name, value in arguments.items() if value is None}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}  # its default has changed
    if (launches := _recorder.get()) is not None:
        launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    if first.device.type == "cuda":
        with torch.cuda.device(first.device):
            kernel[grid](**arguments, **constants, **options)
    else:  # the interpreter
        kernel[grid](**arguments, **constants)


def register(schema: str, implementation: Implementation, fake: Implementation) -> None:
    """Make `torch.ops.runtime.<name>`, so that torch.compile and torch.export see the operation as one node.

    `fake` returns outputs of the right shape, dtype and strides without computing them; no output may share memory
    with an input, and an input that is written is marked in the schema, as in "add_(Tensor(a!) x, Tensor y) -> ()".
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"runtime::{name}", fake, lib=_library)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
