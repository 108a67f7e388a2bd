"""norm_silu and the causal_conv3d that reads it, as a video decoder runs them, beside cuDNN with separate passes.

They stay two operations (kernels/causal_conv3d.py tells why); what is judged here is the time of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines import causal_conv3d
from runtime import kernels
from runtime.kernels.backend import forced
from runtime.kernels.cases import Arguments, Case, Maker, cases
from runtime.kernels.tolerance import judge
from runtime.kernels.verdicts import copied, made

PAIR = "norm_silu + causal_conv3d"
DECODER = "wan-vae 480p "  # Wan 2.1's


def pair_cases() -> list[Case]:
    """Return Wan 2.1's convolutions that read normed frames: those over 3x3x3 but the first, which reads latents."""
    return [
        paired(case)
        for case in cases("causal_conv3d", real=True)
        if case.name.startswith(DECODER)
        and made(case, torch.bfloat16, "meta")["weight"].shape[2:] == (3, 3, 3)
        and made(case, torch.bfloat16, "meta")["x"].shape[1] >= 96
    ]


def paired(case: Case) -> Case:
    """Return a convolution's case with the norm's weights; at the least, normed frames would never be written."""

    def make(m: Maker) -> Arguments:
        given = case.make(m)
        return given | {"gamma": m.gain(given["x"].shape[1], 1, 1, 1)}

    return Case(PAIR, case.name, make, real=True, bytes=case.bytes, flops=case.flops)


def pair(x: torch.Tensor, gamma: torch.Tensor, **others: Any) -> torch.Tensor:
    """Both operations; the history holds normed frames."""
    return kernels.causal_conv3d(kernels.norm_silu(x, gamma), **others)


def run(version: str, arguments: Arguments) -> torch.Tensor:
    """Run one of our versions: "ref", or "picked" as the operations choose."""
    with torch.no_grad():
        if version == "picked":
            return pair(**arguments)
        with forced(version):
            return pair(**arguments)


def rivals(arguments: Arguments) -> dict[str, Callable[[], torch.Tensor]]:
    """Return cuDNN in both memory layouts, after PyTorch's own norm and SiLU, with cat, bias and residual apart."""
    gamma = arguments["gamma"].to(arguments["x"].dtype)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma)

    return {each.name: each.call for each in causal_conv3d(arguments, normed)}


def measure(
    case: Case, device: torch.device, timed: Callable[[dict[str, Callable[[], Any]]], dict[str, list[float]]]
) -> dict[str, Any]:
    """Judge the pair and its rivals, and time those that are correct; nothing where ours is not."""
    found: dict[str, Any] = {"verdicts": {}, "wrong": [], "seconds": {}, "skipped": {}, "parts": []}
    exact = run("ref", copied(made(case, torch.bfloat16, device), wide=True))
    same = run("ref", made(case, torch.bfloat16, device))
    arguments = made(case, torch.bfloat16, device)
    calls: dict[str, Callable[[], Any]] = {"picked": partial(run, "picked", arguments), **rivals(arguments)}
    for name, call in [*calls.items()]:
        try:
            verdict = judge(call(), exact, same)
        except (RuntimeError, ValueError) as error:  # a library that takes no such call, or not so much memory
            found["skipped"][name] = str(error).partition("\n")[0]
            del calls[name]
            continue
        if name == "picked":
            found["verdicts"][name] = [str(verdict)]
        if not verdict.correct:
            found["wrong" if name == "picked" else "skipped"] = [name] if name == "picked" else {name: "not correct"}
            del calls[name]
    del exact, same
    if "picked" in calls:
        found["seconds"] = timed(calls)
    return found
