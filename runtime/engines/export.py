"""A transformer as one graph of standard operations, for libraries that are not PyTorch: what lies between `patchify`
and `unpatchify`, with the projected text and the rotary table as inputs, any number of tokens L and text keys S.

Our fused operations are decomposed to their definitions, in real arithmetic.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.kernels.backend import forced
from runtime.models.spec import ModelSpec, Projected, Transformer

OPSET = 23  # the first with an Attention operation, which libraries compute without the L x L scores in memory
OUTPUT = "velocity"
MASKED = -30000.0  # the bias of a key that weighs nothing, finite in every dtype
MOST_TOKENS, MOST_KEYS = 1 << 20, 1 << 14  # bounds of the graph; an engine's profiles are narrower
# The dimensions that vary, by the field of Projected or the input; the same name means the same number.
VARYING: dict[str, dict[int, str]] = {
    "tokens": {1: "L"}, "rope": {0: "L"}, "keys": {1: "S"}, "values": {1: "S"}, "bias": {3: "S"},
}  # fmt: skip


class Graph(nn.Module):
    """The transformer's `flow` as a function of tensors in the order of `names`, as `graph_inputs` gives them."""

    def __init__(self, network: Transformer, names: list[str]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return the velocity's tokens [R, L, C]."""
        given = dict(zip(self.names, tensors, strict=True))
        return self.network.flow(given.pop("tokens"), given.pop("time"), projected_from(given))


def graph_inputs(network: Transformer, x: torch.Tensor, sigma: torch.Tensor, projected: Projected) -> dict[str, Any]:
    """Return the graph's inputs by name for a Denoiser's arguments: tokens, time, keys.0, ..., bias, rope.

    They have the dtypes of the network; a missing bias is zeros, and what it masks out is finite.
    """
    dtype = projected.keys[0].dtype
    given: dict[str, Any] = {"tokens": network.patchify(x.to(dtype)), "time": network.times(sigma)}
    for field in fields(projected):
        value = getattr(projected, field.name)
        if isinstance(value, tuple):
            given |= {f"{field.name}.{index}": each for index, each in enumerate(value)}
        elif value is not None:
            given[field.name] = value
    if projected.bias is None:
        rows, keys = projected.keys[0].shape[:2]
        given["bias"] = projected.keys[0].new_zeros(rows, 1, 1, keys)
    given["bias"] = given["bias"].clamp(min=MASKED)  # the same weight, 0, and no library meets inf - inf
    return given


def projected_from(given: Mapping[str, torch.Tensor]) -> Projected:
    """Undo `graph_inputs` for the fields of Projected."""
    found: dict[str, Any] = {}
    for name, tensor in given.items():
        field, _, index = name.partition(".")
        found[field] = (*found.get(field, ()), tensor) if index else tensor
    return Projected(**found)


def varying(name: str) -> dict[int, str]:
    """Return which dimensions of an input vary, and what they are called."""
    return VARYING.get(name.partition(".")[0], {})


def export(network: Transformer, inputs: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """Trace the transformer on example inputs from `graph_inputs`; L and S stay free."""
    graph = Graph(network, list(inputs)).eval()
    with forced("ref"), torch.no_grad():
        return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=free_sizes(inputs), strict=False)


def free_sizes(inputs: Iterable[str]) -> tuple[tuple[dict[int, torch.export.Dim], ...]]:
    """Return which dimensions of the inputs vary, as torch.export takes it."""
    bounds = {"L": MOST_TOKENS, "S": MOST_KEYS}
    sizes = {called: torch.export.Dim(called, min=2, max=most) for called, most in bounds.items()}
    return (tuple({axis: sizes[called] for axis, called in varying(name).items()} for name in inputs),)


def write_onnx(network: Transformer, inputs: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write the transformer as ONNX, weights beside it in `file`.data, and check it.

    Raises ValueError where the packages of the extra [onnx] are not installed.
    """
    onnx = required("onnx", "onnx")
    required("onnxscript", "onnx")
    exported = export(network, inputs)
    with warnings.catch_warnings(), unlogged("torch.onnx._internal.exporter._registration"):
        warnings.simplefilter("ignore")  # of names that it chose; ours are checked by the tests
        # Not optimised: the libraries do that themselves, and every weight keeps its name, by which it is refitted.
        program = torch.onnx.export(
            exported, opset_version=OPSET, input_names=list(inputs), output_names=[OUTPUT],
            dynamic_shapes=free_sizes(inputs), optimize=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(file, external_data=True)
    onnx.checker.check_model(str(file))


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Let a library's log be silent below errors: this one tells of packages that it could make use of."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def example(network: Transformer, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the graph's inputs for one short prompt and few tokens, on the network's device in its dtypes."""
    shape = [count * patch for count, patch in zip((2, 4, 6), spec.patch, strict=True)]
    text = torch.zeros(3, network.text_dim)
    projected = network.project([text], spec.text_length, (shape[0], shape[1], shape[2]))
    x = torch.zeros(1, spec.latent_channels, *shape, device=projected.rope.device)
    return graph_inputs(network, x, torch.tensor([0.5], dtype=torch.float64), projected)


def required(module: str, extra: str) -> Any:
    """Import an optional package; ValueError says which extra brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this needs the package {module}, which cannot be imported ({error}); install the extra: "
            f"pip install 'dit-runtime[{extra}]'"
        ) from error
