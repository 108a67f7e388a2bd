"""The memory-bound operations in Triton, against their references by the one rule for "correct"."""

from __future__ import annotations

import pytest
import torch

from runtime import kernels
from runtime.kernels import backend
from runtime.kernels.cases import Arguments, Case, Maker, cases
from runtime.kernels.qk_norm_rope import NORMS, PAIRINGS, AxisTables
from runtime.kernels.tolerance import judge

pytest.importorskip("triton")

OPERATIONS = ("modulate", "gate_residual", "gate_residual_modulate", "qk_norm_rope", "norm_silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [case for name in OPERATIONS for case in cases(name, real=False)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory with NaN where it is allocated, so that a number that is never written shows."""
    for module, name in ((torch, "empty"), (torch, "empty_like")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, plain=plain, **more: _filled(plain(*given, **more)))


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor


def outputs(operation: str, implementation: str, arguments: Arguments) -> list[torch.Tensor]:
    with backend.forced(implementation):
        result = getattr(kernels, operation)(**arguments)
    return list(result) if isinstance(result, tuple) else [result]


def compare(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Judge the kernel's outputs against the reference, on numbers of its own each time; return them."""

    def made(kind: torch.dtype) -> Arguments:
        return case.make(Maker(DEVICE, kind))

    ours = outputs(case.operation, "triton", made(dtype))
    exact = outputs(case.operation, "ref", made(torch.float32))
    same = outputs(case.operation, "ref", made(dtype))
    assert len(ours) == len(exact) == len(same)
    for each, wide, plain in zip(ours, exact, same, strict=True):
        assert each.dtype == plain.dtype == dtype
        verdict = judge(each, wide, plain)
        assert verdict.correct, str(verdict)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.operation} {case.name}")
def test_kernel_is_its_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("table", ["none", "dense", "axes"])
@pytest.mark.parametrize("skip", [(0, 0), (2, 1)])
def test_qk_norm_rope_in_all_its_forms(norm: str, pairing: str, table: str, skip: tuple[int, int]) -> None:
    grid, heads, size = (2, 1, 3), 3, 10

    def make(m: Maker) -> Arguments:
        gains = heads * size if norm == "rms" else size
        weights = {f"{name}_weight": None if norm == "none" else m.gain(gains) for name in "qk"}
        biases = {f"{name}_bias": m.vector(gains) if norm == "layer_head" else None for name in "qk"}
        axes = m.axes(grid, size // 2)
        rope = {"none": None, "dense": axes.dense(), "axes": axes}[table]
        qkv = m.tensor(1, 6 + sum(skip), 3 * heads * size)
        forms = {"heads": heads, "norm": norm, "pairing": pairing, "skip": skip}
        return {"qkv": qkv, "rope": rope} | forms | weights | biases

    compare(Case("qk_norm_rope", "a form", make), torch.float32)


def naive_qk_norm_rope(arguments: Arguments) -> list[torch.Tensor]:
    """Float64, token by token and pair by pair."""
    heads, norm, skip, rope = (arguments[name] for name in ("heads", "norm", "skip", "rope"))
    table = rope.dense() if isinstance(rope, AxisTables) else rope
    parts = arguments["qkv"].double().unflatten(2, (3, heads, -1)).unbind(2)
    turned = []
    for part, name in zip(parts[:2], "qk", strict=True):
        axes = (2, 3) if norm == "rms" else (3,)
        if norm == "layer_head":
            part = part - part.mean(3, keepdim=True)
        if norm != "none":
            part = part / (part.pow(2).mean(axes, keepdim=True) + 1e-6).sqrt()
        if (weight := arguments[f"{name}_weight"]) is not None:
            part = part * weight.double().view(-1, part.shape[3])
        if (bias := arguments[f"{name}_bias"]) is not None:
            part = part + bias.double()
        out, half = part.clone(), part.shape[3] // 2
        for token in range(skip[0], part.shape[1] - skip[1] if table is not None else 0):
            for pair, (cos, sin) in enumerate(table[token - skip[0]].tolist()):
                a, b = (2 * pair, 2 * pair + 1) if arguments["pairing"] == "interleaved" else (pair, pair + half)
                out[:, token, :, a] = part[:, token, :, a] * cos - part[:, token, :, b] * sin
                out[:, token, :, b] = part[:, token, :, a] * sin + part[:, token, :, b] * cos
        turned.append(out)
    return [*turned, parts[2]]


@pytest.mark.parametrize("case", cases("qk_norm_rope", real=False), ids=lambda case: case.name)
def test_qk_norm_rope_reference_is_its_formula(case: Case) -> None:
    given = case.make(Maker(torch.device("cpu"), torch.float32))
    before = given["qkv"].clone()
    exact = naive_qk_norm_rope(given)
    for ours, theirs in zip(outputs("qk_norm_rope", "ref", given), exact, strict=True):
        assert judge(ours, theirs).correct
    assert torch.equal(given["qkv"], before), "the reference leaves qkv alone"


def test_qk_norm_rope_writes_in_place() -> None:
    given = next(iter(cases("qk_norm_rope", real=False))).make(Maker(DEVICE, torch.float32))
    qkv = given["qkv"]
    before = qkv.clone()
    q, k, v = outputs("qk_norm_rope", "triton", given)
    assert q.data_ptr() == qkv.data_ptr()
    assert torch.equal(torch.cat([each.flatten(2) for each in (q, k, v)], dim=2), qkv)
    assert torch.equal(v.flatten(2), before.chunk(3, dim=2)[2])


def test_fused_is_one_after_the_other() -> None:
    m = Maker(DEVICE, torch.bfloat16)
    x, y, gate, scale, shift = m.tensor(2, 6, 50), m.tensor(2, 6, 50), m.vector(2, 3, 50), *(m.vector(1, 2, 50),) * 2
    with backend.forced("triton"):
        out, h = kernels.gate_residual_modulate(x, y, gate, scale, shift)
        assert torch.equal(out, kernels.gate_residual(x, y, gate))
        assert torch.equal(h, kernels.modulate(out, scale, shift))


@pytest.mark.parametrize("implementation", ["ref", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_8_bits_are_those_of_float32_numbers(implementation: str, dtype: torch.dtype) -> None:
    """The very codes and scales that the quantiser makes of what is never written; no rounding in between."""
    m = Maker(DEVICE, dtype)
    x, y, gate, scale, shift = m.tensor(2, 6, 50), m.tensor(2, 6, 50), m.vector(2, 3, 50), *(m.vector(1, 2, 50),) * 2
    weight, bias = m.gain(50), m.vector(50)
    with backend.forced(implementation):
        out, *fused = kernels.gate_residual_modulate_fp8(x, y, gate, scale, shift)
        assert torch.equal(out, kernels.gate_residual(x, y, gate))
        for (codes, rows), h in (
            (fused, kernels.modulate(out.float(), scale, shift)),
            (kernels.modulate_fp8(x, scale, shift), kernels.modulate(x.float(), scale, shift)),
            (kernels.modulate_fp8(x, weight=weight, bias=bias), kernels.modulate(x.float(), weight=weight, bias=bias)),
        ):
            their_codes, their_rows = kernels.quantise_rows(h.flatten(0, 1))
            assert torch.equal(codes.flatten(0, 1).float(), their_codes.float())
            assert torch.equal(rows.flatten(), their_rows)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("implementation", ["ref", "triton"])
def test_norm_silu_in_place(implementation: str, last: bool) -> None:
    m = Maker(DEVICE, torch.float32)
    x, gamma = m.tensor(2, 2, 3, 5, 12), m.gain(12)
    x = x.movedim(-1, 1) if last else x.movedim(-1, 1).contiguous()
    with backend.forced(implementation):
        expected = kernels.norm_silu(x, gamma)
        assert kernels.norm_silu(x, gamma, inplace=True) is x
    assert torch.equal(x, expected)


def test_norm_silu_upsamples_channels_last() -> None:
    m = Maker(DEVICE, torch.float32)
    x, gamma = m.tensor(1, 2, 3, 5, 8).movedim(-1, 1), m.gain(8)
    for implementation in ("ref", "triton"):
        with backend.forced(implementation):
            small, large = kernels.norm_silu(x, gamma), kernels.norm_silu(x, gamma, upsample=True)
        assert large.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(large, small.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


def test_offsets_pass_31_bits() -> None:
    """The second row stands 2^31 numbers behind the first, in memory that is never touched between them."""
    far = 2**31 + 64
    try:
        memory = torch.zeros(0, dtype=torch.float16).untyped_storage()
        memory.resize_(2 * (far + 200))
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GiB of addresses: {error}")
    m = Maker(torch.device("cpu"), torch.float16)

    def spread(*shape: int) -> torch.Tensor:
        x = torch.empty(0, dtype=torch.float16).set_(memory, 0, shape, (far, shape[-1], 1))
        return x.copy_(m.tensor(*shape))

    with backend.forced("triton"):
        x = spread(2, 2, 24)
        assert torch.equal(kernels.modulate(x), kernels.modulate(x.contiguous()))
        assert torch.equal(kernels.gate_residual(x, x), x + x)
        plain = x.contiguous()
        weight, rope = m.gain(8), m.turns(2, 2)
        for ours, theirs in zip(
            kernels.qk_norm_rope(x, weight, weight, rope, heads=2),
            kernels.qk_norm_rope(plain, weight, weight, rope, heads=2),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


QKV, GAIN = torch.zeros(2, 6, 24), torch.ones(8)
AXES = AxisTables(*(torch.zeros(n, 1, 2) for n in (1, 2, 3)))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"norm": "batch"}, "norm is 'batch'; legal: rms, rms_head, layer_head, none"),
        ({"pairing": "odd"}, "pairing is 'odd'; legal: interleaved, half"),
        ({"norm": "none"}, "q_weight is given, but norm 'none' has none"),
        ({"q_bias": GAIN}, "q_bias is given, but norm 'rms' has none"),
        ({"norm": "rms_head"}, r"q_weight has shape \[8\]; expected \[4\]"),
        ({"skip": (0, 2)}, r"rope has shape \[6, 2, 2\]; expected \[4, 2, 2\]"),
        ({"skip": (4, 3)}, r"skip is \(4, 3\); expected two counts that sum to at most 6 tokens"),
        ({"skip": (-1, 0)}, r"skip is \(-1, 0\)"),
        ({"rope": AXES}, "rope has 1 x 2 x 3 positions and 1 [+] 1 [+] 1 pairs; expected 6 tokens and 2 pairs"),
        ({"rope": AXES._replace(h=torch.zeros(2, 2))}, r"rope.h has shape \[2, 2\]; expected \[any, any, 2\]"),
    ],
)
def test_qk_norm_rope_names_what_does_not_fit(more: Arguments, sentence: str) -> None:
    given = {"q_weight": GAIN, "k_weight": GAIN, "rope": torch.zeros(6, 2, 2), "heads": 2} | more
    with pytest.raises(ValueError, match=sentence):
        kernels.qk_norm_rope(QKV, **given)


def test_norm_silu_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="upsample and inplace are both set"):
        kernels.norm_silu(torch.zeros(1, 4, 2, 2), torch.zeros(4), upsample=True, inplace=True)
    with pytest.raises(ValueError, match=r"x has shape \[1, 4, 2\]; expected \[B, C, H, W\] or"):
        kernels.norm_silu(torch.zeros(1, 4, 2), torch.zeros(4), upsample=True)
