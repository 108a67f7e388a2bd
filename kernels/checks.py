"""Argument checks shared by the operations: each failure names the argument, what was given and what is expected."""

from __future__ import annotations

import torch


def expect_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has shape `expected`; None in `expected` stands for any extent."""
    given = tuple(tensor.shape)
    if len(given) != len(expected) or any(e is not None and g != e for g, e in zip(given, expected, strict=True)):
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise ValueError(f"{name} has shape {list(given)}; expected {wanted}")


def expect_some(name: str, tensor: torch.Tensor, *dims: int) -> None:
    """Raise ValueError where one of these dimensions is empty (none named: any), as only batch and tokens may be."""
    for dim in dims or range(tensor.dim()):
        if tensor.shape[dim] == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected at least 1 in dimension {dim}")


def expect_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def expect_device(like: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given are on the device of `like`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {like.device}, where the first tensor is")


def expect_groups(name: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    """Raise ValueError unless `vector` [1 or B, M, D] modulates `x` [B, L, D] in M equal groups of tokens."""
    rows, length, width = x.shape
    fits = vector.dim() == 3 and vector.shape[0] in (1, rows) and vector.shape[2] == width
    if not fits or vector.shape[1] == 0 or length % vector.shape[1]:
        raise ValueError(
            f"{name} has shape {list(vector.shape)}; expected [1 or {rows}, M, {width}] with M a divisor of {length}"
        )
