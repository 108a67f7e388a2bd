"""mlp: the feed-forward of a block.

    out = GELU_tanh(x @ w_in.T + b_in) @ w_out.T + b_out

x [B, L, D]; w_in [E, D], b_in [E]; w_out [D', E], b_out [D'] (E the inner width); returns [B, L, D'] in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import expect_floating, expect_shape


def mlp_ref(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor
) -> torch.Tensor:
    """The definition, in x's dtype with the matrix products' own accumulation."""
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)


def mlp_onednn(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor
) -> torch.Tensor:
    """The same on a CPU: GELU in the first product's epilogue, a third off that product against a pass of its own."""
    inner = torch.ops.mkldnn._linear_pointwise(x, w_in, b_in, "gelu", [], "tanh")
    return F.linear(inner, w_out, b_out)


def mlp(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor
) -> torch.Tensor:
    """Return the feed-forward of x, [B, L, D']; ValueError for shapes that do not fit together."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    expect_shape("w_in", w_in, (None, x.shape[2]))
    expect_shape("b_in", b_in, (w_in.shape[0],))
    expect_shape("w_out", w_out, (None, w_in.shape[0]))
    expect_shape("b_out", b_out, (w_out.shape[0],))
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and torch.backends.mkldnn.is_available():
        return mlp_onednn(x, w_in, b_in, w_out, b_out)
    return mlp_ref(x, w_in, b_in, w_out, b_out)
