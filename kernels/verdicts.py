"""Judging an implementation at a case: one way for tests, benchmarks and tuning."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import cuda
from .backend import forced
from .cases import Arguments, Case, Maker
from .tolerance import Verdict, judge

EIGHT_BITS = {"linear_fp8", "attention_fp8"}  # judged as float8, whatever the dtype of their outputs
# The reference computes what 8-bit products would, some queries at a time: to judge by, not to time.
SIMULATED = {"attention_fp8"}
HALVES = (torch.float16, torch.bfloat16)


def public(operation: str) -> Callable[..., Any]:
    """Return an operation's public function."""
    return getattr(sys.modules[__package__], operation)


def module_of(operation: str) -> ModuleType:
    """Return the file of an operation; it may hold several."""
    return sys.modules[public(operation).__module__]


def implementations(operation: str) -> list[str]:
    """Return which implementations an operation has besides the reference; this machine may lack them."""
    places = {"triton": module_of(operation), "cuda": cuda}
    return [name for name, place in places.items() if hasattr(place, f"{operation}_{name}")]


def reference_call(operation: str, arguments: Arguments) -> tuple[Callable[..., Any], list[Any]]:
    """Return an operation's `_ref` function and its arguments in order, for torch.compile to see inside."""
    reference = getattr(module_of(operation), f"{operation}_ref")
    defaults = inspect.signature(public(operation)).parameters
    names = inspect.signature(reference).parameters
    return reference, [arguments[name] if name in arguments else defaults[name].default for name in names]


def made(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Arguments:
    """Return a case's arguments, the same each time."""
    return case.make(Maker(torch.device(device), dtype, seed))


def run(operation: str, implementation: str | None, arguments: Arguments) -> list[torch.Tensor]:
    """Return an operation's outputs as a list; implementation None leaves the choice to the operation."""
    with torch.no_grad(), forced(implementation) if implementation else nullcontext():
        return tensors(public(operation)(**arguments))


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return all tensors of nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def copied(arguments: Arguments, *, wide: bool = False) -> Arguments:
    """Return copies of the arguments; with `wide`, those in half precision, and the dtypes themselves, as float32."""

    def copy(value: torch.Tensor | torch.dtype) -> torch.Tensor | torch.dtype:
        if isinstance(value, torch.dtype):
            return torch.float32 if wide and value in HALVES else value
        return value.float() if wide and value.dtype in HALVES else value.clone()

    return pytree.tree_map_only((torch.Tensor, torch.dtype), copy, arguments)


def kind_of(operation: str, dtype: torch.dtype, output: torch.Tensor) -> str:
    """Return the row of BOUNDS that an output of an operation on inputs of `dtype` is judged by."""
    if output.dtype == torch.float8_e4m3fn:
        return "float8_e4m3fn"
    return "float8" if operation in EIGHT_BITS else str(dtype).removeprefix("torch.")


class Standard:
    """What a case's outputs must be near to: the reference on float32 inputs, and on the case's own."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        self.operation, self.dtype = case.operation, dtype
        self.exact = run(case.operation, "ref", copied(made(case, dtype, device), wide=True))
        self.same_precision = run(case.operation, "ref", made(case, dtype, device))

    def judge(self, outputs: list[torch.Tensor]) -> list[Verdict]:
        """Return a verdict per output."""
        pairs = zip(outputs, self.exact, self.same_precision, strict=True)
        return [judge(out, exact, same, kind_of(self.operation, self.dtype, out)) for out, exact, same in pairs]
