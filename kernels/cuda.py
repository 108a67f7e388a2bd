"""The CUDA library of csrc on tensors: the `_cuda` implementations, and whether they are there.

The library, `runtime._cuda`, is built when the package is installed and nvcc is found. Each function here has the
signature of its `_triton` sibling, makes the layout that the kernel wants and launches on the current stream.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .qk_norm_rope import Parts, Rope

LIBRARY = "runtime._cuda"
REASON = "_cuda.txt"  # what the build leaves where there is no library
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def load() -> ModuleType | str:
    """Return the library, or why there is none."""
    try:
        return importlib.import_module(LIBRARY)
    except ModuleNotFoundError:
        package = importlib.util.find_spec(LIBRARY.partition(".")[0])
        for folder in (package.submodule_search_locations or []) if package else []:
            reason = Path(folder) / REASON
            if reason.exists():
                return reason.read_text().strip()
        return "the package was installed without it; install again where nvcc is"
    except ImportError as error:
        return f"it does not load: {error}"


def status() -> str:
    """Return "built for ...", or "not built: " and the reason."""
    found = load()
    return f"not built: {found}" if isinstance(found, str) else f"built for {found.ARCHITECTURES}"


def available(tensor: torch.Tensor) -> bool:
    """Tell whether the library is built and has kernels for a tensor of this device and dtype."""
    return tensor.device.type == "cuda" and tensor.dtype in DTYPES and not isinstance(load(), str)


def call(operation: str, x: torch.Tensor, /, **arguments: Any) -> None:
    """Launch on x's device; tensors among the arguments are passed as addresses, None as 0."""
    addresses = {}
    for name, value in arguments.items():
        several = value if isinstance(value, tuple) else (value,)
        for tensor in several:
            if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where the other tensors are")
        found = tuple(address(each) for each in several)
        addresses[name] = found if isinstance(value, tuple) else found[0]
    launch(operation, x, addresses)


def address(value: Any) -> Any:
    """Return what the library takes for a value."""
    if isinstance(value, torch.Tensor):
        return 0 if value.device.type == "meta" else value.data_ptr()
    return 0 if value is None else value


def launch(operation: str, x: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Launch on x's device and its current stream; on the meta device there is nothing to do."""
    library = load()
    if isinstance(library, str):
        raise ValueError(f"this operation has no implementation 'cuda' here: not built: {library}")
    if x.device.type == "meta":
        return
    if x.device.type != "cuda":
        raise ValueError(f"tensors are on {x.device}; the CUDA library needs them on an NVIDIA GPU")
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(library, operation)(**arguments, dtype=dtype_name(x), stream=stream)


def dtype_name(x: torch.Tensor) -> str:
    """Return "bfloat16", "float16" or "float32"."""
    return str(x.dtype).removeprefix("torch.")


def modulate_cuda(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
) -> torch.Tensor:
    """One pass over x. x's last dimension and the vectors are contiguous, or are made so."""
    _expect_dtype("x", x)
    x = _tokens(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    others = _vectors(x, scale=scale, shift=shift) | _plain(weight=weight, bias=bias)
    shape, rms = tuple(x.shape), norm == "rms"
    call("modulate", x, x=x, x_steps=x.stride()[:2], out=out, shape=shape, eps=eps, rms=rms, **others)
    return out


def gate_residual_cuda(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """One pass: reads 2, writes 1."""
    return _gate_residual(x, y, gate, None, {})


def gate_residual_modulate_cuda(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass: reads 2, writes 2."""
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    others = _vectors(x, scale=scale, shift=shift) | _plain(weight=weight, bias=bias)
    return _gate_residual(x, y, gate, h, others | {"eps": eps}), h


def _gate_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, h: torch.Tensor | None, others: dict[str, Any]
) -> torch.Tensor:
    """Launch either form."""
    _expect_dtype("x", x)
    if y.dtype != x.dtype:
        raise ValueError(f"y has dtype {y.dtype}; the CUDA kernel expects x's, {x.dtype}")
    x, y = _tokens(x), _tokens(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call(
        "gate_residual", x, x=x, x_steps=x.stride()[:2], y=y, y_steps=y.stride()[:2], out=out, h=h,
        shape=tuple(x.shape), **_vectors(x, gate=gate), **others,
    )  # fmt: skip
    return out


def qk_norm_rope_cuda(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: Rope,
    heads: int,
    eps: float,
    norm: str = "rms",
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    pairing: str = "interleaved",
    skip: tuple[int, int] = (0, 0),
) -> Parts:
    """One pass over q and k, in qkv's own memory; a qkv that is not dense, token by token, is copied first."""
    _expect_dtype("qkv", qkv)
    if not (qkv.is_contiguous() or qkv.transpose(0, 1).is_contiguous()):
        qkv = qkv.contiguous()
    rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    tables: dict[str, Any] = {}
    if isinstance(rope, torch.Tensor):
        tables["table"] = rope.float().contiguous()
    elif rope is not None and length > sum(skip):
        axes = tuple(table.float().contiguous() for table in rope)
        tables["grid"] = tuple(len(table) for table in axes)
        tables["axis_pairs"] = tuple(table.shape[1] for table in axes)
        # An axis without pairs has no memory of its own and is not read; another stands for it.
        tables["axes"] = tuple(table if table.numel() else max(axes, key=torch.numel) for table in axes)
    call(
        "qk_norm_rope", qkv, qkv=qkv, qkv_steps=qkv.stride()[:2], shape=(rows, length, width), heads=heads, norm=norm,
        **_plain(q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias), eps=eps, pairing=pairing,
        skip=tuple(skip), **tables,
    )  # fmt: skip
    q, k, v = qkv.unflatten(2, (3, heads, width // heads)).unbind(2)
    return q, k, v


def norm_silu_cuda(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool, upsample: bool) -> torch.Tensor:
    """One pass over a channels-last x, two over a contiguous one; an x in another layout is copied first."""
    _expect_dtype("x", x)
    last = x.movedim(1, -1)
    source = last if last.is_contiguous() or upsample or not x.is_contiguous() else x
    given, source = source, source.contiguous()
    own = inplace or source.data_ptr() != given.data_ptr()  # memory that may be overwritten
    shape = list(source.shape)
    if upsample:
        shape[-3:-1] = [2 * shape[-3], 2 * shape[-2]]
    out = source if own and not upsample else torch.empty(shape, dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    pixels = x[0, 0].numel() if x.shape[0] and channels else 0
    by_pixel = source is not x
    call(
        "norm_silu", x, x=source, out=out, **_plain(gamma=gamma.flatten()), silu=silu,
        shape=(1, len(x) * pixels, channels) if by_pixel else (len(x), pixels, channels),
        x_steps=(0, channels, 1) if by_pixel else (channels * pixels, 1, pixels),
        upsample_width=source.shape[-2] if upsample else 0,
    )  # fmt: skip
    out = out.movedim(-1, 1) if by_pixel else out
    if not inplace:
        return out
    return x if out.data_ptr() == x.data_ptr() else x.copy_(out)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last dimension contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def _expect_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} has dtype {dtype_name(tensor)}; the CUDA kernels take {legal}")


def _plain(**vectors: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return vectors that all tokens share as the library wants them: float32, contiguous."""
    return {name: None if vector is None else vector.float().contiguous() for name, vector in vectors.items()}


def _vectors(x: torch.Tensor, **vectors: torch.Tensor | None) -> dict[str, Any]:
    """Return vectors [1 or B, M, D] as the library wants them, and by `<name>_steps` which token takes which."""
    arguments: dict[str, Any] = {}
    for name, vector in _plain(**vectors).items():
        if vector is not None:
            per_row = 0 if vector.shape[0] == 1 else vector.stride(0)
            arguments[name], arguments[f"{name}_steps"] = vector, (per_row, max(x.shape[1] // vector.shape[1], 1))
    return arguments
