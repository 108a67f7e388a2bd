"""The one rule for "correct", used by tests and benchmarks alike.

An implementation may be at most twice as far from the float32 reference as plain PyTorch in the same precision is, plus
a floor for rounding; and its root mean square error stays below a bound per dtype. No test has a tolerance of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# dtype name -> (floor, bound on the root mean square error), both relative: to the largest value, to the RMS.
# float8 is of products; the codes themselves may be one step apart, 32 at 448, where a number lies between two.
BOUNDS = {
    "float32": (1e-5, 1e-5), "float16": (2e-3, 1e-3), "bfloat16": (8e-3, 5e-3), "float8": (6e-2, 4e-2),
    "float8_e4m3fn": (32.5 / 448, 4e-2),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the reference, and whether that is correct."""

    largest: float  # largest absolute error
    allowed: float
    rms: float  # root mean square error over the reference's
    bound: float
    missing: int  # NaN or infinity where the reference is finite

    @property
    def correct(self) -> bool:
        """Tell whether the rule holds."""
        return self.missing == 0 and self.largest <= self.allowed and self.rms <= self.bound

    def __str__(self) -> str:
        return (
            f"largest error {self.largest:.3g} (allowed {self.allowed:.3g}), RMS ratio {self.rms:.3g} "
            f"(bound {self.bound:.3g}), {self.missing} not finite"
        )


def judge(
    output: torch.Tensor, exact: torch.Tensor, same_precision: torch.Tensor | None = None, kind: str | None = None
) -> Verdict:
    """Compare an output with the float32 reference, and with plain PyTorch in the output's own precision.

    `exact` is the reference on float32 inputs, `same_precision` the reference on the output's own inputs (None: not
    asked); `kind` names a row of BOUNDS, the output's dtype where None. Shapes must agree.
    """
    if output.shape != exact.shape:
        raise ValueError(f"output has shape {list(output.shape)}; expected {list(exact.shape)}")
    floor, bound = BOUNDS[kind or str(output.dtype).removeprefix("torch.")]
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, bound, 0)
    exact = exact.float()
    error = output.float() - exact
    missing = int((~torch.isfinite(error) & torch.isfinite(exact)).sum())
    error = error.nan_to_num(nan=torch.inf)
    slack = 0.0 if same_precision is None else float((same_precision.float() - exact).abs().max())
    scale = float(exact.pow(2).mean().sqrt())
    return Verdict(
        largest=float(error.abs().max()),
        allowed=2 * slack + floor * float(exact.abs().max()),
        rms=float(error.pow(2).mean().sqrt()) / max(scale, 1e-30),
        bound=bound,
        missing=missing,
    )
