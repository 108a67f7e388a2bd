"""The operations made of matrix products: their Triton kernels; which core computes attention; 8 bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from runtime import kernels
from runtime.kernels import backend, linear_fp8, quantise_rows, tuning
from runtime.kernels.cases import Case, Maker, attention_cases, linear_fp8_cases, mlp_cases
from runtime.kernels.quantise_rows import quantise_rows_ref, quantise_rows_triton
from runtime.kernels.tolerance import judge
from runtime.kernels.verdicts import copied

pytest.importorskip("triton")

ATTENTION, MLP, LINEAR_FP8 = (sys.modules[f"runtime.kernels.{name}"] for name in ("attention", "mlp", "linear_fp8"))
PUBLIC = {"attention": kernels.attention, "mlp": kernels.mlp, "linear_fp8": linear_fp8}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [case for make in (attention_cases, mlp_cases, linear_fp8_cases) for case in make() if not case.real]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory with NaN where it is allocated, so that a number that is never written shows."""
    plain = torch.empty

    def empty(*given: object, **more: object) -> torch.Tensor:
        made = plain(*given, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def run(case: Case, implementation: str, dtype: torch.dtype, wide: bool = False) -> torch.Tensor:
    """Run a case whose numbers are of `dtype`, in float32 where `wide`."""
    with backend.forced(implementation):
        return PUBLIC[case.operation](**copied(case.make(Maker(DEVICE, dtype)), wide=wide))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter's dot is wrong in bfloat16
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.operation} {case.name}")
def test_kernel_is_its_reference(case: Case, dtype: torch.dtype) -> None:
    ours = run(case, "triton", dtype)
    assert ours.dtype == dtype
    kind = "float8" if case.operation == "linear_fp8" else None
    verdict = judge(ours, run(case, "ref", dtype, wide=True), run(case, "ref", dtype), kind)
    assert verdict.correct, str(verdict)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", [case for case in SMALL if case.operation == "attention"], ids=lambda case: case.name)
def test_attention_with_scores_ahead(case: Case) -> None:
    """Fewer keys than a tile, whole tiles alone, and both."""
    with tuning.trial("attention_triton", {"ahead": True, "block_s": 32}):
        ours = run(case, "triton", torch.float32)
    verdict = judge(ours, run(case, "ref", torch.float32))
    assert verdict.correct, str(verdict)


# 8 bits.


@pytest.mark.parametrize("gelu", [False, True])
def test_eight_bits_are_near_the_exact_product(gelu: bool) -> None:
    """Against the product that was never quantised: the bound for float8."""
    x, weight, bias = numbers(3, 50, 256), numbers(130, 256, seed=1), numbers(130, seed=2)
    exact = F.linear(F.gelu(x, approximate="tanh") if gelu else x, weight, bias)
    for implementation in ("ref", "triton"):
        with backend.forced(implementation):
            verdict = judge(linear_fp8(x, *quantise_rows(weight), bias, gelu=gelu), exact, kind="float8")
        assert verdict.correct, str(verdict)


def test_quantiser_is_exact() -> None:
    """The reference's numbers: every e4m3 number, the ties between neighbours, subnormals, a row of zeros."""
    grid = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    ties = (grid[1:] + grid[:-1]) / 2
    row = torch.cat([grid, ties, ties * (1 + 1e-6), ties * (1 - 1e-6)])
    x = torch.stack([row, -row, row / 3, torch.zeros_like(row), row * 1e30, row * 1e-30, numbers(row.numel())])
    for rows in (x, x[:, ::2], x.to(torch.float16)[3:4], x[:0]):
        ours, scale = quantise_rows_triton(rows, False) if rows.numel() else quantise_rows(rows)
        theirs, their_scale = quantise_rows_ref(rows, False) if rows.numel() else (ours, scale)
        assert torch.equal(ours.float(), theirs.float())
        assert torch.equal(scale, their_scale)
        assert torch.isfinite(scale).all()
    assert torch.equal(quantise_rows_ref(x, False)[0][0, : grid.numel()].float(), grid)


def test_no_eight_bits_before_sm_89(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "capability_of", lambda device: (8, 0))
    given, x = linear_case(), numbers(1, 6, 24)
    for call in (
        lambda: linear_fp8(**given), lambda: quantise_rows(x[0]), lambda: kernels.modulate_fp8(x),
        lambda: kernels.gate_residual_modulate_fp8(x, x), lambda: kernels.attention_fp8(*[x[..., None]] * 3),
    ):  # fmt: skip
        with backend.forced("triton"), pytest.raises(ValueError, match="no implementation 'triton' here"):
            call()
        call()


def linear_case() -> dict:
    return next(linear_fp8_cases()).make(Maker(torch.device("cpu"), torch.float32))


# What is called where there is a GPU, by stand-ins.


def test_library_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of cublasLt's epilogue and of the row-wise product: their operands, as those functions define them."""

    def addmm_activation(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, use_gelu: bool) -> torch.Tensor:
        assert use_gelu
        assert x.dim() == 2
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    def scaled_mm(
        x: torch.Tensor, weight: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, *,
        bias: torch.Tensor | None, out_dtype: torch.dtype, use_fast_accum: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert use_fast_accum
        assert x.is_contiguous() and weight.stride(0) == 1  # row-major times column-major
        assert (scale_a.shape, scale_b.shape) == ((x.shape[0], 1), (1, weight.shape[1]))
        out = (x.float() * scale_a) @ (weight.float() * scale_b)
        return (out if bias is None else out + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_addmm_activation", addmm_activation)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for case in mlp_cases():
        if not case.real and not case.name.startswith("0x"):
            given = {"residual": None, "gate": None} | case.make(Maker(torch.device("cpu"), torch.float32))
            verdict = judge(MLP.mlp_cublas(**given), MLP.mlp_ref(**given))
            assert verdict.correct, str(verdict)
    given = linear_case()
    exact = linear_fp8(**given)
    codes, scale = quantise_rows(given["x"].flatten(0, 1))
    in_8_bits = given | {"x": codes.view(given["x"].shape), "x_scale": scale.view(1, -1), "dtype": torch.float32}
    for each in (given | {"x_scale": None, "dtype": torch.float32}, in_8_bits):
        assert torch.equal(linear_fp8(**each), exact)
        verdict = judge(LINEAR_FP8.linear_fp8_cutlass(**each), exact)
        assert verdict.correct, str(verdict)


# Which core computes attention.

TAKEN: list[str] = []


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The table with every core's own conditions, each only noting that it was called; all packages importable."""
    TAKEN.clear()

    def noting(name: str) -> object:
        return lambda q, k, v, bias: TAKEN.append(name) or ATTENTION.attention_ref(q, k, v, bias)

    fakes = {name: ATTENTION.Core(noting(name), core.can, core.package) for name, core in ATTENTION.CORES.items()}
    monkeypatch.setattr(ATTENTION, "CORES", fakes)
    monkeypatch.setattr(ATTENTION, "why_absent", lambda package: None)
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.table.cache_clear()
    yield ATTENTION
    tuning.table.cache_clear()


def call(
    capability: tuple[int, int] = (9, 0), size: int = 128, dtype: torch.dtype = torch.bfloat16, biased: bool = False
) -> object:
    return ATTENTION.Call(1, 32760, 300 if biased else 32760, 12, size, dtype, biased, capability)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (call((9, 0)), "cudnn"),
        (call((10, 0)), "cudnn"),
        (call((8, 0)), "flash"),
        (call((8, 9)), "flash"),
        (call((12, 0)), "flash"),
        (call((9, 0), dtype=torch.float16, size=64), "cudnn"),
        (call((9, 0), size=256), "fa3"),  # wider than cuDNN takes
        (call((10, 0), size=256), "flash"),
        (call((9, 0), dtype=torch.float32), "efficient"),
        (call((7, 5), dtype=torch.float16), "efficient"),
        (call((9, 0), size=12), "math"),
        (call((9, 0), size=12, biased=True), "math"),
        *[(call(capability, biased=True), "efficient") for capability in ((8, 0), (9, 0), (10, 0), (12, 0))],
    ],
)
def test_order(cores: ModuleType, given: object, expected: str) -> None:
    assert cores.choose(given, "h200") == expected


def test_bias_goes_to_cores_that_take_it(cores: ModuleType) -> None:
    takers = {name for name, core in cores.CORES.items() if core.can(call(biased=True))}
    assert takers == {"efficient", "triton", "math"}


def test_absent_cores_are_passed_over(cores: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "why_absent", lambda package: "ImportError: none")
    assert cores.choose(call(size=256), "h200") == "flash"
    (tuning.TUNED / "h200.json").write_text(json.dumps({"attention": {call().key: {"core": "fa3"}}}))
    assert cores.choose(call(), "h200") == "cudnn"
    with pytest.raises(ValueError, match=r"core 'fa3' needs the package flash_attn_interface.*ImportError: none"):
        cores.named("fa3", call())


def test_tuned_file_wins(cores: ModuleType) -> None:
    assert call().key == "128 bfloat16 plain 32768 32768"
    assert call(biased=True).key == "128 bfloat16 biased 32768 512"
    cores_by_key = {call().key: "triton", call(biased=True).key: "flash", call(size=64).key: "nonesuch"}
    table = {key: {"core": core} for key, core in cores_by_key.items()}
    (tuning.TUNED / "h200.json").write_text(json.dumps({"attention": table}))
    assert cores.choose(call(), "h200") == "triton"
    assert cores.choose(call(), "h100-80gb-hbm3") == "cudnn"
    assert cores.choose(call(biased=True), "h200") == "efficient"  # flash takes no bias
    with pytest.raises(ValueError, match=r"h200.json names the core 'nonesuch'; legal: cudnn, "):
        cores.choose(call(size=64), "h200")


def test_core_by_name(cores: ModuleType) -> None:
    q = numbers(1, 5, 2, 12)
    expected = kernels.attention(q, q, q)
    assert TAKEN == []
    assert torch.equal(kernels.attention(q, q, q, core="math"), expected)
    assert TAKEN == ["math"]
    with pytest.raises(ValueError, match="core is 'fastest'; legal: cudnn, flash, "):
        kernels.attention(q, q, q, core="fastest")
    with pytest.raises(ValueError, match="core 'cudnn' does not take this call"):
        kernels.attention(q, q, q, core="cudnn")


def test_package_that_is_not_there_is_absent() -> None:
    assert "ModuleNotFoundError" in ATTENTION.why_absent("flash_attn_interface_of_nobody")
    assert ATTENTION.why_absent("torch") is None


def test_packaged_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of packages take and return [B, L, N, K]; some return more."""
    package = ModuleType("packaged_attention")
    package.attend = lambda q, k, v, twice: (q * twice, None)
    monkeypatch.setitem(sys.modules, "packaged_attention", package)
    q = numbers(1, 5, 2, 12)
    assert torch.equal(ATTENTION.packaged("packaged_attention", "attend", twice=2)(q, q, q, None), 2 * q.flatten(2))


# What is refused.

X, GATE, W8, SCALE = numbers(1, 4, 16), torch.ones(1, 1, 16), numbers(8, 16).to(torch.float8_e4m3fn), torch.ones(8)
X8, ROWS = X.to(torch.float8_e4m3fn), torch.ones(1, 4)
Q = numbers(1, 4, 2, 96)
MATRICES = numbers(8, 16), numbers(8), numbers(16, 8), numbers(16)


def forced_attention() -> None:
    with backend.forced("triton"):
        kernels.attention(Q, Q, Q)


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (forced_attention, "q has head size 96; the Triton version takes 64 and 128"),
        (lambda: kernels.attention(Q, Q.half(), Q), "k has dtype torch.float16; expected q's, torch.float32"),
        (lambda: kernels.mlp(X, *MATRICES, gate=GATE), "gate is given without residual"),
        (lambda: kernels.mlp(X, *MATRICES, residual=X[:, :3]), r"residual has shape \[1, 3, 16\]; expected \[1, 4"),
        (lambda: kernels.mlp(X, *MATRICES, residual=X, gate=GATE.expand(1, 3, 16)), "M a divisor of 4"),
        (lambda: kernels.mlp(X, *MATRICES, residual=X, gate=GATE.half()), "gate has dtype torch.float16"),
        (lambda: kernels.mlp(X.half(), *MATRICES), "w_in has dtype torch.float32; expected x's, torch.float16"),
        (lambda: linear_fp8(X, W8.float(), SCALE), "weight_fp8 has dtype torch.float32; expected torch.float8_e4m3fn"),
        (lambda: linear_fp8(X, W8, SCALE.half()), "weight_scale has dtype torch.float16; expected torch.float32"),
        (lambda: linear_fp8(X, W8, SCALE[:7]), r"weight_scale has shape \[7\]; expected \[8\]"),
        (lambda: linear_fp8(X[..., :15], W8, SCALE), r"weight_fp8 has shape \[8, 16\]; expected \[any, 15\]"),
        (lambda: linear_fp8(X, W8, SCALE, SCALE.half()), "bias has dtype torch.float16; expected torch.float32"),
        (lambda: linear_fp8(X8, W8, SCALE), "x is in 8 bits without x_scale"),
        (lambda: linear_fp8(X, W8, SCALE, x_scale=ROWS), "x has dtype torch.float32; expected torch.float8_e4m3fn"),
        (lambda: linear_fp8(X8, W8, SCALE, x_scale=ROWS), "expected no gelu, .* and an output dtype"),
        (lambda: linear_fp8(X8, W8, SCALE, gelu=True, x_scale=ROWS, dtype=torch.float32), "expected no gelu"),
        (lambda: linear_fp8(X8, W8, SCALE, x_scale=ROWS[:, :3], dtype=torch.half), r"x_scale has shape \[1, 3\]"),
        (lambda: linear_fp8(X8, W8, SCALE, x_scale=ROWS.half(), dtype=torch.half), "x_scale has dtype torch.float16"),
        (lambda: quantise_rows(X), r"x has shape \[1, 4, 16\]; expected \[any, any\]"),
    ],
)
def test_refused(refused: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        refused()
