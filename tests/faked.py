"""A GPU that is not there: tensors on "cuda:0" without numbers, CPU tensors with theirs, kernels that are only noted.

PyTorch's fake tensors refuse operations over two devices, and asking them for a number fails; so what passes here
neither mixes devices nor waits for the GPU in a step. CPU builds have no device guard for "cuda", hence the detours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # FakeTensorMode imports it, which must not see the patches below
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels import backend

GPU = torch.device("cuda", 0)
H200 = (9, 0)
aten = torch.ops.aten


def on_gpu(tree: Any) -> bool:
    """Tell whether anything in it is a fake tensor, or names the GPU."""
    leaves = pytree.tree_leaves(tree)
    return any(
        isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda") for leaf in leaves
    )


class RealOnCpu(TorchDispatchMode):
    """Computes what is on the CPU, leaves the rest to the fake mode, and notes copies over the bus."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not on_gpu((args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in (aten._to_copy, aten.to) and not isinstance(args[0], FakeTensor):
            leaves = pytree.tree_leaves((args[1:], kwargs))
            dtype = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), args[0].dtype)
            self.copies.append("blocks" if not kwargs.get("non_blocking") else "goes on")
            return aten.empty_strided.default(args[0].shape, args[0].stride(), dtype=dtype, device=GPU)
        return func(*args, **kwargs)


class WithoutGuards(TorchFunctionMode):
    """Methods whose Python bindings want a device guard, by operators that do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous:
            layout = kwargs.get("memory_format", args[1] if len(args) > 1 else torch.contiguous_format)
            dense = args[0].is_contiguous(memory_format=layout)
            return args[0] if dense else aten.clone(args[0], memory_format=layout)
        if func is torch.Tensor.copy_:
            return aten.copy_(*args, kwargs.get("non_blocking", False))
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            place, value = indexed(*args[:2]), args[2]
            return aten.copy_(place, value) if isinstance(value, torch.Tensor) else place.fill_(value)
        return func(*args, **kwargs)


def indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    """Return x[index], for numbers, slices, None, ... and lists."""
    index = index if isinstance(index, tuple) else (index,)
    axis = 0
    for position, each in enumerate(index):
        if each is Ellipsis:
            axis = x.dim() - sum(other is not None for other in index[position + 1 :])
        elif each is None:
            x, axis = aten.unsqueeze(x, axis), axis + 1
        elif isinstance(each, slice):
            start, stop, step = each.indices(x.shape[axis])
            x, axis = aten.slice.Tensor(x, axis, start, stop, step), axis + 1
        elif isinstance(each, int):
            x = aten.select.int(x, axis, each)
        else:
            x, axis = aten.index.Tensor(x, [*[None] * axis, torch.as_tensor(each)]), axis + 1
    return x


@contextmanager
def fake_gpu() -> Iterator[tuple[list[backend.Launch], list[str]]]:
    """Let GPU tensors be fake ones; yields the kernels' launches and the copies from the CPU ("blocks", "goes on")."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls)

    real = torch.isfinite
    with ExitStack() as stack:
        for name, replacement in {
            "torch.cuda.get_device_capability": lambda device=None: H200,
            "torch.cuda.get_device_name": lambda device=None: "NVIDIA H200",
            "torch.Generator": Generator,
            "torch.isfinite": lambda x: real(torch.zeros(1)) if isinstance(x, FakeTensor) else real(x),
        }.items():
            stack.enter_context(mock.patch(name, replacement))
        launches = stack.enter_context(backend.recorded(H200))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        crossing = stack.enter_context(RealOnCpu())
        stack.enter_context(WithoutGuards())
        stack.enter_context(torch.no_grad())
        yield launches, crossing.copies
