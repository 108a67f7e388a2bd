"""What an operation is measured beside: the best that libraries offer for the same result, and the bar it must meet.

A baseline takes the operation's own arguments; what it needs prepared (a weight in another layout) is not timed. The
bars and their sources: flashinfer, sglang, cuDNN and sgl-kernel figures published for the same operations and GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime import kernels
from runtime.kernels.attention_fp8 import attention_fp8_fa3
from runtime.kernels.gate_residual import gate_residual_ref

Call = Callable[[], Any]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A library's way; `whole` is false for a part of the work, such as the bare products: its result is not judged."""

    name: str
    call: Call
    whole: bool = True


@dataclass(frozen=True)
class Bar:
    """What the best of our versions must reach: a rate, or a ratio to the library baseline `over`."""

    rate: float = 0.0  # bytes or FLOPs per second
    over: str = ""
    ratio: float = 0.0  # our time over the baseline's, at most

    def met(self, seconds: float, work: float, baselines: dict[str, float]) -> bool | None:
        """Tell whether a time meets the bar for so many bytes or FLOPs; None where the baseline was not measured."""
        if self.over:
            theirs = baselines.get(self.over)
            return None if theirs is None else seconds <= self.ratio * theirs
        return work / seconds >= self.rate

    def __str__(self) -> str:
        if self.over:
            return f"{self.ratio:g} x {self.over}"
        return f"{self.rate / 1e12:g} {'TFLOP/s' if self.rate >= 1e13 else 'TB/s'}"


MEMORY = Bar(rate=3.7e12)  # cuDNN's RMS norm reaches 3.76 TB/s on H200
BARS = {
    "modulate": MEMORY,
    "modulate_fp8": MEMORY,
    "gate_residual": MEMORY,
    "gate_residual_modulate": MEMORY,
    "gate_residual_modulate_fp8": MEMORY,
    "quantise_rows": MEMORY,
    "qk_norm_rope": MEMORY,
    "norm_silu": MEMORY,
    "attention": Bar(rate=480e12),  # what a portable fallback must keep; Triton's tutorial reaches 477 on H100
    "attention_fp8": Bar(over="bf16 attention", ratio=1.0),  # or nobody takes it
    "mlp": Bar(over="bare GEMMs", ratio=1.02),
    "linear_fp8": Bar(over="bf16 linear", ratio=1 / 1.4),  # the published gain, quantisation included
    "causal_conv3d": Bar(rate=0.473 * 790e12),  # sglang's convolutions alone on H200
}


def baselines(operation: str, arguments: Arguments) -> list[Baseline]:
    """Return what there is to compare with; those that this machine lacks fail when they are called."""
    make = MAKERS.get(operation)
    return make(arguments) if make else []


def attention(a: Arguments) -> list[Baseline]:
    """Each of PyTorch's attention kernels."""
    q, k, v = (a[name].transpose(1, 2) for name in ("q", "k", "v"))

    def by(kernel: SDPBackend) -> Call:
        def run() -> torch.Tensor:
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=a.get("bias"))
            return out.transpose(1, 2).flatten(2)

        return run

    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
    return [Baseline(f"SDPA {name}", by(kernel)) for name, kernel in kinds.items()]


def attention_fp8(a: Arguments) -> list[Baseline]:
    """The attention that would be computed in 16 bits; FlashAttention-3 in 8, the quantiser included."""
    q, k, v = (a[name] for name in ("q", "k", "v"))
    return [
        Baseline("bf16 attention", lambda: kernels.attention(q, k, v), whole=False),
        Baseline("FA3 fp8", lambda: attention_fp8_fa3(q, k, v)),
    ]


def mlp(a: Arguments) -> list[Baseline]:
    """The two products alone, and cuBLASLt's GELU epilogue with the residual, if there is one, in separate passes."""
    x, w_in, b_in, w_out, b_out = (a[name] for name in ("x", "w_in", "b_in", "w_out", "b_out"))
    residual, gate = a.get("residual"), a.get("gate")
    flat = x.flatten(0, 1)
    inner = torch.empty(len(flat), len(w_in), dtype=x.dtype, device=x.device)
    out = torch.empty(len(flat), len(w_out), dtype=x.dtype, device=x.device)

    def bare() -> None:
        torch.mm(flat, w_in.T, out=inner)
        torch.mm(inner, w_out.T, out=out)

    def epilogue() -> torch.Tensor:
        hidden = torch._addmm_activation(b_in, flat, w_in.T, use_gelu=True)  # the tanh form, on CUDA only
        y = torch.addmm(b_out, hidden, w_out.T).unflatten(0, x.shape[:2])
        return y if residual is None else gate_residual_ref(residual, y, gate)

    return [Baseline("bare GEMMs", bare, whole=False), Baseline("cuBLASLt epilogue", epilogue)]


def linear_fp8(a: Arguments) -> list[Baseline]:
    """The same product in bfloat16."""
    x = a["x"]
    weight = a["weight_fp8"].to(x.dtype)
    return [Baseline("bf16 linear", lambda: F.linear(x, weight), whole=False)]


def causal_conv3d(a: Arguments, before: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> list[Baseline]:
    """cuDNN with separate cat, padding, bias and residual, in both memory layouts; `before` makes what it reads."""
    x, weight, bias, history, residual = (a.get(name) for name in ("x", "weight", "bias", "history", "residual"))
    assert x is not None and weight is not None
    stride = a.get("stride", 1)
    taps, rows, columns = weight.shape[2:]

    def by(layout: torch.memory_format) -> Call:
        frames, past = (None if t is None else t.contiguous(memory_format=layout) for t in (x, history))
        filters = weight.contiguous(memory_format=layout)
        shape = (1, -1, 1, 1, 1)

        def run() -> torch.Tensor:
            assert frames is not None
            made = before(frames)
            window = made if past is None else torch.cat([past, made], dim=2)
            missing = taps - stride - (window.shape[2] - frames.shape[2])
            if missing:
                window = F.pad(window, (0, 0, 0, 0, missing, 0))
            y = F.conv3d(window, filters, None, (stride, 1, 1), (0, rows // 2, columns // 2))
            y = y if bias is None else y.add_(bias.view(shape))
            return y if residual is None else y.add_(residual)

        return run

    return [Baseline("cuDNN", by(torch.contiguous_format)), Baseline("cuDNN channels_last", by(torch.channels_last_3d))]


def modulate(a: Arguments) -> list[Baseline]:
    """PyTorch's layer norm kernel with the modulation as its weights, which rounds them to x's dtype."""
    x, scale, shift = a["x"], a.get("scale"), a.get("shift")
    if scale is None or shift is None or scale.shape[:2] != (1, 1):
        return []
    weight, bias = (scale[0, 0] + 1).to(x.dtype), shift[0, 0].to(x.dtype)
    return [Baseline("F.layer_norm", lambda: F.layer_norm(x, x.shape[2:], weight, bias, a.get("eps", 1e-6)))]


MAKERS: dict[str, Callable[[Arguments], list[Baseline]]] = {
    "attention": attention,
    "attention_fp8": attention_fp8,
    "mlp": mlp,
    "linear_fp8": linear_fp8,
    "causal_conv3d": causal_conv3d,
    "modulate": modulate,
}
