"""Every operation at every case, by the one rule: Triton in its interpreter here, all implementations on a GPU.

A new operation is tested as soon as it has cases; nothing in this file names its shapes, but for those beyond 2^31
elements.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree

from runtime import kernels
from runtime.kernels.cases import CASES, Case, Maker, cases
from runtime.kernels.tolerance import judge
from runtime.kernels.verdicts import Standard, copied, implementations, kind_of, made, run, tensors

# Operations with tl.dot, which the interpreter gets wrong in bfloat16.
MULTIPLYING = {"attention", "causal_conv3d", "linear_fp8", "mlp"}
# What an operation may write to, besides what its argument `inplace` says.
MAY_WRITE = {"qk_norm_rope": {"qkv"}}
BATCHED = ("x", "y", "q", "k", "v", "qkv", "history", "residual")  # arguments whose first dimension is always B
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

interpreted = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here: see -m gpu")


def named(case: Case) -> str:
    return f"{case.operation} {case.name}"


def dtypes(operation: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if dtype != torch.bfloat16 or operation not in MULTIPLYING]


def call(operation: str, implementation: str, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Run a public operation by one implementation, its outputs poisoned."""
    with poisoned():
        return run(operation, implementation, arguments)


@contextmanager
def poisoned() -> Iterator[None]:
    """Let fresh memory hold NaN, so that what a kernel does not write is seen."""

    def filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_filled(*arguments: Any, **options: Any) -> torch.Tensor:
            made = make(*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make_filled

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
    ):
        yield


def check(case: Case, implementation: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Judge one implementation at one case, twice: the second run must give the same bits."""
    operation = case.operation
    standard = Standard(case, dtype, device)
    arguments = made(case, dtype, device)
    before = copied(arguments)
    outputs = [out.clone() for out in call(operation, implementation, arguments)]
    assert [out.dtype for out in outputs] == [out.dtype for out in standard.same_precision]
    for index, verdict in enumerate(standard.judge(outputs)):
        assert verdict.correct, f"output {index}: {verdict}"
    written = MAY_WRITE.get(operation, set()) | ({"x"} if arguments.get("inplace") else set())
    for name in arguments.keys() - written:
        pairs = zip(tensors(arguments[name]), tensors(before[name]), strict=True)
        assert all(torch.equal(now, then) for now, then in pairs), f"{name} was written"
    again = call(operation, implementation, made(case, dtype, device))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)), "two runs differ"


SMALL = [case for case in cases(real=False) if "triton" in implementations(case.operation)]


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in SMALL for dtype in dtypes(case.operation)],
    ids=lambda value: named(value) if isinstance(value, Case) else str(value).removeprefix("torch."),
)
def test_triton_interpreted(case: Case, dtype: torch.dtype) -> None:
    check(case, "triton", dtype)


@interpreted
@pytest.mark.parametrize("operation", sorted({case.operation for case in SMALL}))
def test_empty_batch(operation: str) -> None:
    for case in [case for case in SMALL if case.operation == operation][:4]:
        arguments = emptied(made(case, torch.float32))
        ours, theirs = call(operation, "triton", arguments), call(operation, "ref", arguments)
        assert [out.shape for out in ours] == [out.shape for out in theirs]
        assert not any(out.numel() for out in ours)


def emptied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with no row in the batch; what is shared by all rows stays."""
    rows = next(arguments[name].shape[0] for name in BATCHED if name in arguments)
    per_row = ("scale", "shift", "gate", "bias")  # [1 or B, ...]

    def of_batch(name: str, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        return name in BATCHED or (name in per_row and value.dim() > 1 and value.shape[0] == rows != 1)

    return {name: value[:0] if of_batch(name, value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("operation", CASES)
def test_a_tensor_on_another_device_is_named(operation: str) -> None:
    moved: set[str] = set()
    for case in cases(operation, real=False):
        arguments = made(case, torch.float32)
        for name in [name for name in arguments if tensors(arguments[name])][1:]:
            away = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments[name])
            with pytest.raises(ValueError, match=rf"{name} is on meta; expected cpu"):
                run(operation, None, arguments | {name: away})
            moved.add(name)
    assert moved or operation == "quantise_rows"


ROW, CODES = torch.zeros(1, 3, 8), torch.zeros(6, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: kernels.modulate(ROW[..., :0]), r"x has shape \[1, 3, 0\]; expected at least 1 in dimension 2"),
        (lambda: kernels.gate_residual(ROW[..., :0], ROW[..., :0]), "x has shape"),
        (lambda: kernels.quantise_rows(ROW[0, :, :0]), "x has shape"),
        (lambda: kernels.linear_fp8(ROW[..., :0], CODES[:, :0], torch.ones(6)), "weight_fp8 has shape"),
        (lambda: kernels.mlp(ROW, *(torch.zeros(shape) for shape in ((0, 8), 0, (8, 0), 8))), "w_in has shape"),
        (lambda: kernels.attention(*[ROW.view(1, 3, 8, 1)[..., :0]] * 3), "q has shape"),
        (lambda: kernels.attention_fp8(*[ROW.view(1, 3, 8, 1)[..., :0]] * 3), "q has shape"),
        (lambda: kernels.norm_silu(ROW[:, :0], torch.zeros(0)), "x has shape"),
        (lambda: kernels.causal_conv3d(ROW.view(1, 1, 1, 3, 8)[..., :0], torch.zeros(2, 1, 3, 3, 3)), "x has shape"),
        (lambda: kernels.causal_conv3d(ROW.view(1, 1, 1, 3, 8), torch.zeros(0, 1, 3, 3, 3)), "weight has shape"),
    ],
)
def test_no_channels_is_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("operation", CASES)
def test_cases_cover(operation: str) -> None:
    """Each operation is asked for a non-contiguous input and for a published model at a published resolution."""
    small = tensors([made(case, torch.float32) for case in cases(operation, real=False)])
    assert any(not tensor.is_contiguous() for tensor in small), "no case is non-contiguous"
    real = cases(operation, real=True)
    assert real and all(case.bytes or case.flops for case in real), "a real case lacks its bytes or FLOPs"
    assert set(CASES) <= set(kernels.__all__)


# On a GPU.


@contextmanager
def built() -> Iterator[None]:
    """Skip the test where the implementation was not built here."""
    try:
        yield
    except ValueError as error:
        if "no implementation" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes test on the same GPU


def wait_for_room(count: int) -> None:
    """Wait until the other processes that test on this GPU leave so many bytes free, two minutes at most."""
    end = time.monotonic() + 120
    while torch.cuda.mem_get_info()[0] < count and time.monotonic() < end:
        time.sleep(0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "implementation", "dtype"),
    [
        (case, name, dtype)
        for case in cases()
        for name in implementations(case.operation)
        for dtype in (DTYPES if not case.real else [torch.bfloat16])
    ],
    ids=lambda value: named(value) if isinstance(value, Case) else str(value).removeprefix("torch."),
)
def test_on_gpu(case: Case, implementation: str, dtype: torch.dtype) -> None:
    if case.real:
        wait_for_room(16 * 2**30)
    with built():
        check(case, implementation, dtype, "cuda")


HUGE, SIDE = 2**31, 400
Huge = Callable[[Maker], tuple[dict[str, Any], Callable[[dict[str, Any], slice], dict[str, Any]], int]]


def cut(*names: str, dim: int = 1) -> Callable[[dict[str, Any], slice], dict[str, Any]]:
    """Return a function that cuts the named arguments to a part along `dim`."""

    def cutter(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
        index = (slice(None),) * dim + (part,)
        return {name: value[index].clone() if name in names else value for name, value in arguments.items()}

    return cutter


def huge_tokens(m: Maker, *names: str, width: int = 4096) -> tuple[dict[str, Any], Any, int]:
    shape = (1, HUGE // width + 9, width)
    vectors = {name: m.vector(1, 1, width) for name in ("gate", "scale", "shift")}
    return {name: m.tensor(*shape) for name in names} | vectors, cut(*names), 1


def huge_modulate(m: Maker) -> tuple[dict[str, Any], Any, int]:
    arguments, cutter, dim = huge_tokens(m, "x")
    return {name: value for name, value in arguments.items() if name != "gate"}, cutter, dim


def huge_gate_residual(m: Maker) -> tuple[dict[str, Any], Any, int]:
    arguments, cutter, dim = huge_tokens(m, "x", "y")
    return {name: arguments[name] for name in ("x", "y", "gate")}, cutter, dim


def huge_qk_norm_rope(m: Maker) -> tuple[dict[str, Any], Any, int]:
    length, width = HUGE // 4608 + 9, 1536
    arguments = {
        "qkv": m.tensor(1, length, 3 * width), "q_weight": m.gain(width), "k_weight": m.gain(width),
        "rope": m.turns(length, 64), "heads": 12,
    }  # fmt: skip
    by_token, by_position = cut("qkv"), cut("rope", dim=0)
    return arguments, lambda given, part: by_position(by_token(given, part), part), 1


def huge_norm_silu(m: Maker) -> tuple[dict[str, Any], Any, int]:
    return {"x": m.tensor(1, 96, 9, 1664, 1664), "gamma": m.gain(96)}, cut("x", dim=2), 2


def huge_causal_conv3d(m: Maker) -> tuple[dict[str, Any], Any, int]:
    """A part's history is the two frames before it."""

    def cutter(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
        x, before = arguments["x"], slice(part.start - 2, part.start)
        history = x[:, :, before] if part.start else arguments["history"]
        return arguments | {"x": x[:, :, part].clone(), "history": history.clone()}

    frames = HUGE // (96 * SIDE**2) + 9
    return {
        "x": m.tensor(1, frames, SIDE, SIDE, 96).movedim(-1, 1), "weight": m.tensor(96, 96, 3, 3, 3, scale=0.02),
        "bias": m.tensor(96), "history": m.tensor(1, 2, SIDE, SIDE, 96).movedim(-1, 1),
    }, cutter, 2  # fmt: skip


def huge_attention(m: Maker) -> tuple[dict[str, Any], Any, int]:
    """Views of one qkv; a few queries meet all keys."""
    length = HUGE // (3 * 40 * 128) + 9
    return dict(zip("qkv", m.tensor(1, length, 3, 40, 128).unbind(2), strict=True)), cut("q"), 1


def huge_attention_fp8(m: Maker) -> tuple[dict[str, Any], Any, int]:
    """The largest number of a head's queries is in either part, as their scale is of all."""
    arguments, cutter, dim = huge_attention(m)
    arguments["q"][:, 0, :, 0] = arguments["q"][:, -1, :, 0] = 8.0
    return arguments, cutter, dim


def huge_mlp(m: Maker) -> tuple[dict[str, Any], Any, int]:
    """The inner numbers are as many as the outer ones."""
    arguments, cutter, dim = huge_tokens(m, "x", "residual")
    width = arguments["x"].shape[2]
    weights = {name: m.tensor(width, width, scale=width**-0.5) for name in ("w_in", "w_out")}
    weights |= {name: m.tensor(width) for name in ("b_in", "b_out")}
    return {name: arguments[name] for name in ("x", "residual", "gate")} | weights, cutter, dim


def huge_linear_fp8(m: Maker) -> tuple[dict[str, Any], Any, int]:
    arguments, cutter, dim = huge_tokens(m, "x")
    width = arguments["x"].shape[2]
    weight = m.tensor(width, width, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = m.gain(width).abs() * (0.01 * width**-0.5)
    return {"x": arguments["x"], "weight_fp8": weight, "weight_scale": scale, "bias": m.tensor(width)}, cutter, dim


def huge_quantise_rows(m: Maker) -> tuple[dict[str, Any], Any, int]:
    return {"x": m.tensor(HUGE // 4096 + 9, 4096), "gelu": True}, cut("x", dim=0), 0


BEYOND: dict[str, Huge] = {
    "modulate": huge_modulate,
    "modulate_fp8": huge_modulate,
    "gate_residual": huge_gate_residual,
    "gate_residual_modulate": lambda m: huge_tokens(m, "x", "y"),
    "gate_residual_modulate_fp8": lambda m: huge_tokens(m, "x", "y"),
    "quantise_rows": huge_quantise_rows,
    "qk_norm_rope": huge_qk_norm_rope,
    "norm_silu": huge_norm_silu,
    "causal_conv3d": huge_causal_conv3d,
    "attention": huge_attention,
    "attention_fp8": huge_attention_fp8,
    "mlp": huge_mlp,
    "linear_fp8": huge_linear_fp8,
}


def test_all_are_asked_for_more_than_32_bits() -> None:
    assert set(BEYOND) == set(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "implementation"), [(op, name) for op in BEYOND for name in implementations(op)])
def test_beyond_32_bits(operation: str, implementation: str) -> None:
    """More elements than an int32 counts: the first and the last part are what the reference makes of them alone."""
    wait_for_room(40 * 2**30)
    arguments, cutter, dim = BEYOND[operation](Maker(torch.device("cuda"), torch.bfloat16))
    extent = next(arguments[name].shape[dim] for name in BATCHED if name in arguments)
    ends = [slice(0, min(8, extent // 2)), slice(extent - min(8, extent // 2), extent)]
    expected = [call(operation, "ref", copied(cutter(arguments, part), wide=True)) for part in ends]
    with built():
        outputs = call(operation, implementation, arguments)
    for part, wide in zip(ends, expected, strict=True):
        index = (slice(None),) * dim + (part,)
        for out, exact in zip(outputs, wide, strict=True):
            verdict = judge(out[index], exact, kind=kind_of(operation, torch.bfloat16, out))
            assert verdict.correct, str(verdict)


# One node in exported and compiled graphs.


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the calls of `torch.ops.runtime`."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(target).startswith("runtime."):
            self.calls.append((target, pytree.tree_map_only(torch.Tensor, torch.clone, args)))
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("operation", CASES)
def test_one_node(operation: str) -> None:
    """torch.compile sees each operation as one node, which gives the eager results and keeps PyTorch's contract."""
    for case in cases(operation, real=False)[:3] + cases(operation, real=False)[-2:]:
        recorders: list[Recorder] = []

        def record(graph: torch.fx.GraphModule, _: list[Any], kept: list[Recorder] = recorders) -> Callable[..., Any]:
            kept.append(Recorder(graph))
            return kept[-1].run

        torch._dynamo.reset()
        expected = run(operation, None, made(case, torch.float32))
        with torch.no_grad():
            compiled = torch.compile(getattr(kernels, operation), fullgraph=True, backend=record, dynamic=False)
            found = tensors(compiled(**made(case, torch.float32)))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5)
        (calls,) = [recorder.calls for recorder in recorders]
        ((target, arguments),) = calls
        assert str(target).split(".")[1].removesuffix("_") == operation
        # PyTorch's check of the schema multiplies each input, which float8 does not know.
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        checks += (
            [] if any(each.dtype == torch.float8_e4m3fn for each in tensors([arguments, found])) else ["test_schema"]
        )
        torch.library.opcheck(target, arguments, test_utils=checks)


def test_transformer_is_exported_whole() -> None:
    """A tiny transformer in torch.export and torch.compile: our operations are nodes, and the numbers are equal."""
    from runtime.models.wan.transformer import TransformerConfig, WanTransformer

    torch.manual_seed(0)
    config = TransformerConfig(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=2,
    )  # fmt: skip
    transformer = WanTransformer(config).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    projected = transformer.project([torch.randn(3, 16), torch.randn(5, 16)], 8, (2, 4, 6))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.transformer(x, sigma, projected)

    x, sigma = torch.randn(1, 4, 2, 4, 6), torch.tensor([0.7])
    with torch.no_grad():
        expected = Step()(x, sigma)
        exported = torch.export.export(Step(), (x, sigma))
        torch._dynamo.reset()
        compiled = torch.compile(Step(), fullgraph=True, backend="eager")
        for found in (exported.module()(x, sigma), compiled(x, sigma)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    nodes = [str(node.target).split(".")[1] for node in exported.graph.nodes if str(node.target).startswith("runtime.")]
    counted = {name: nodes.count(name) for name in nodes}
    assert counted == {  # per block, the text's query among them, and the head's modulate
        "modulate": 2 * 2 + 1, "gate_residual_modulate": 2 * 2, "qk_norm_rope_": 2,
        "attention": 2 * 2, "mlp": 2,
    }  # fmt: skip
