"""SiLU and GELU inside a kernel, in the fewest instructions that keep float32's precision."""

from __future__ import annotations

from .backend import jit, tl


@jit
def over_power(x, exponent):
    """x / (1 + 2^exponent): five instructions; a division, or Triton's own sigmoid, takes over twice as many."""
    root = tl.rsqrt(1.0 + tl.exp2(exponent))
    return x * root * root


@jit
def silu(x):
    """x sigmoid(x)."""
    return over_power(x, -1.4426950408889634 * x)  # log2(e)


@jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return over_power(
        x, x * (-2.302208198144325 - 0.1029432389 * x * x)
    )  # 2 sqrt(2 / pi) log2(e), and that times 0.044715
