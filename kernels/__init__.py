"""Fused operations, one file each: the definition in plain PyTorch and the function that picks an implementation.

Dimension key: B batch, L video tokens, S text tokens, D width, N heads, K head size, M modulation groups
(L is a multiple of M; consecutive L/M tokens share one modulation vector), C channels, T H W time, height, width.
"""

# From the repository's root a library that looks for the published package `kernels` finds this folder: it gets an
# empty module, and nothing is registered twice.
if __name__ != "kernels":
    from .attention import attention
    from .attention_fp8 import attention_fp8
    from .causal_conv3d import causal_conv3d
    from .gate_residual import gate_residual, gate_residual_modulate, gate_residual_modulate_fp8
    from .linear_fp8 import linear_fp8
    from .mlp import mlp
    from .modulate import modulate, modulate_fp8
    from .norm_silu import norm_silu
    from .qk_norm_rope import AxisTables, qk_norm_rope
    from .quantise_rows import quantise_rows

__all__ = [
    "AxisTables",
    "attention",
    "attention_fp8",
    "causal_conv3d",
    "gate_residual",
    "gate_residual_modulate",
    "gate_residual_modulate_fp8",
    "linear_fp8",
    "mlp",
    "modulate",
    "modulate_fp8",
    "norm_silu",
    "qk_norm_rope",
    "quantise_rows",
]
