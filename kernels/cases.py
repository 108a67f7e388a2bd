"""The shapes that matter, named once: tests, benchmarks, the compile report and tuning all draw from here.

A new operation is tested, timed and compiled ahead by adding its file and its cases. Small cases run in Triton's
interpreter on a CPU; real ones are a published model at a published resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .case import Arguments, Case, Maker
from .cases_decoder import causal_conv3d_cases, norm_silu_cases
from .cases_products import attention_cases, attention_fp8_cases, linear_fp8_cases, mlp_cases
from .cases_rows import (
    gate_residual_cases,
    gate_residual_modulate_cases,
    gate_residual_modulate_fp8_cases,
    modulate_cases,
    modulate_fp8_cases,
    qk_norm_rope_cases,
    quantise_rows_cases,
)

__all__ = ["CASES", "Arguments", "Case", "Maker", "cases"]

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "modulate": modulate_cases,
    "modulate_fp8": modulate_fp8_cases,
    "gate_residual": gate_residual_cases,
    "gate_residual_modulate": gate_residual_modulate_cases,
    "gate_residual_modulate_fp8": gate_residual_modulate_fp8_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "norm_silu": norm_silu_cases,
    "causal_conv3d": causal_conv3d_cases,
    "attention": attention_cases,
    "attention_fp8": attention_fp8_cases,
    "mlp": mlp_cases,
    "quantise_rows": quantise_rows_cases,
    "linear_fp8": linear_fp8_cases,
}


def cases(operation: str | None = None, *, real: bool | None = None) -> list[Case]:
    """Return the cases of an operation (of all where None), the small or the real ones (both where None)."""
    names = [operation] if operation else list(CASES)
    return [case for name in names for case in CASES[name]() if real is None or case.real == real]
