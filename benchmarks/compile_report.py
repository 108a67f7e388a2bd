"""The compile report: every kernel, at every real case, compiled ahead of time for GPUs that need not be here.

Triton's kernels are recorded on tensors without data and compiled for each architecture, csrc by nvcc; what the machine
code takes, and what it does (in the file of results), is read from the cubin. A kernel that spills registers or asks
for more shared memory than the chip has makes the report fail.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.machine_code import Code, read_sass
from runtime import kernels
from runtime.kernels import backend
from runtime.kernels.cases import Case, Maker

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """What one streaming multiprocessor has. Source: CUDA C++ Programming Guide, "Compute Capabilities"."""

    warps: int
    blocks: int
    shared: int  # bytes of shared memory, of which one block may take all but 1 KiB
    registers: int = 65536

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Return the share of the warp slots that blocks of so many warps can fill; registers are per thread."""
        per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are handed out by 256
        by_registers = self.registers // per_warp // 4 * 4 // warps  # and to four schedulers alike
        by_shared = self.shared // (-(-shared // 128) * 128 + KIB)  # 1 KiB per block is the system's
        return min(self.warps // warps, self.blocks, by_registers, by_shared) * warps / self.warps


CHIPS = {
    "sm_80": Chip(warps=64, blocks=32, shared=164 * KIB),  # A100
    "sm_89": Chip(warps=48, blocks=24, shared=100 * KIB),  # L4, L40, RTX 40
    "sm_90": Chip(warps=64, blocks=32, shared=228 * KIB),  # H100, H200
    "sm_100": Chip(warps=64, blocks=32, shared=228 * KIB),  # B200
    "sm_120": Chip(warps=48, blocks=24, shared=100 * KIB),  # RTX 50, RTX PRO 6000
}
# The oldest architecture that an operation's types exist on.
LEAST = dict.fromkeys(
    ("linear_fp8", "quantise_rows", "modulate_fp8", "gate_residual_modulate_fp8", "attention_fp8"), "sm_89"
)

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One thing to compile: a Triton kernel with all that is fixed at compile time. Equal units give equal code."""

    operation: str
    case: str  # the first real case that needs it
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> type
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16, as Triton specialises on
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides about the machine code."""
        return self.module, self.kernel, self.signature, self.constants, self.aligned, self.options


@dataclass(frozen=True)
class Row:
    """What a kernel takes on one architecture, or why it was not compiled."""

    operation: str
    case: str
    kernel: str
    arch: str
    warps: int = 0
    registers: int = 0
    spills: int = 0  # bytes of local memory per thread
    shared: int = 0  # bytes per block
    occupancy: float = 0.0
    seconds: float = 0.0
    error: str = ""
    code: Code | None = None

    @property
    def faults(self) -> list[str]:
        """Return what makes the report fail."""
        found = [self.error] if self.error else []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled per thread")
        most = CHIPS[self.arch].shared - KIB
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory; {self.arch} has {most}")
        return found


def exists(operation: str, arch: str) -> bool:
    """Tell whether an architecture has the types of an operation."""
    return capability(arch) >= capability(LEAST.get(operation, arch))


def units(cases: Sequence[Case], arch: str) -> list[Unit]:
    """Return what the cases launch on an architecture, each once."""
    found: dict[tuple[Any, ...], Unit] = {}
    for case in cases:
        arguments = case.make(Maker(torch.device("meta"), torch.bfloat16))
        for unit in launched(case, arch, partial(getattr(kernels, case.operation), **arguments)):
            found.setdefault(unit.key, unit)
    return list(found.values())


def launched(case: Case, arch: str, call: Callable[[], Any]) -> list[Unit]:
    """Return what a call launches by Triton on an architecture, each once."""
    target = divmod(capability(arch), 10)
    with torch.no_grad(), backend.forced("triton"), backend.recorded(target) as launches:
        call()
    found = [specialised(case, launch) for launch in launches]
    return [*{unit.key: unit for unit in found}.values()]


def specialised(case: Case, launch: backend.Launch) -> Unit:
    """Return a launch as Triton would compile it: types, a 1 as a constant, multiples of 16 known as such."""
    signature, constants, aligned = [], dict(launch.constants), []
    for index, name in enumerate(launch.kernel.arg_names):
        value = constants.get(name, launch.arguments.get(name))
        if type(value) is int and value == 1:
            constants[name] = 1
        if name in constants:
            signature.append((name, "constexpr"))
            continue
        kind, multiple = argument_type(value)
        signature.append((name, kind))
        if multiple:
            aligned.append(index)
    function = launch.kernel.fn
    return Unit(
        case.operation, case.name, function.__module__, function.__name__, tuple(signature),
        tuple(constants.items()), tuple(aligned), tuple(launch.options.items()),
    )  # fmt: skip


def argument_type(value: Any) -> tuple[str, bool]:
    """Return Triton's name of a run-time argument's type, and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        # Allocations begin at a multiple of 256 bytes; a view begins at its offset.
        return "*" + TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"a kernel was launched with a {type(value).__name__}; add it to argument_type")


def compiled(unit: Unit, arch: str) -> Row:
    """Compile one unit for one architecture; seconds near zero mean that Triton's cache had it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(unit.module), unit.kernel)
    source = ASTSource(
        function,
        dict(unit.signature),
        dict(unit.constants),
        {(index,): [["tt.divisibility", 16]] for index in unit.aligned},
    )
    began = time.perf_counter()
    try:
        kernel = triton.compile(source, GPUTarget("cuda", capability(arch), 32), dict(unit.options))
    except Exception as error:  # whatever the compiler raises stands in the report, which then fails
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        return Row(unit.operation, unit.case, unit.kernel, arch, error=text)
    seconds = time.perf_counter() - began
    ((used, code),) = inspected(kernel.asm["cubin"]).values()
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Row(
        unit.operation, unit.case, unit.kernel, arch, warps, used["REG"], used["STACK"] + used["LOCAL"], shared,
        CHIPS[arch].occupancy(used["REG"], shared, warps), seconds, code=code,
    )  # fmt: skip


def inspected(cubin: bytes) -> dict[str, tuple[dict[str, int], Code]]:
    """Return of each kernel in a cubin REG, STACK, SHARED and LOCAL, and what its machine code shows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = _output([cuobjdump(), "--dump-resource-usage", "--dump-sass", str(file)])
    codes = read_sass(text)
    return {name: (used, codes[name]) for name, used in parse_resources(text).items()}


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """Read what `cuobjdump --dump-resource-usage` printed."""
    found = {
        name: {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in re.findall(r"Function ([^\s:]+):\s*(REG:.*)", text)
    }
    if not found or any(len(numbers) != 4 for numbers in found.values()):
        raise ValueError(f"cuobjdump printed what is not a resource usage: {text[:200]!r}")
    return found


def cuobjdump() -> str:
    """Return the tool's path: Triton's own, else the CUDA toolkit's."""
    with suppress(ImportError, AttributeError, RuntimeError):
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    if (found := shutil.which("cuobjdump")) is None:
        raise ValueError("cuobjdump is not found; Triton's package and the CUDA toolkit bring it")
    return found


def csrc_rows(arch: str, operations: Collection[str]) -> Iterator[Row]:
    """Compile csrc's files of these names for one architecture, where nvcc is.

    Shared memory that is asked for at launch is not seen.
    """
    folder, nvcc = ROOT / "csrc", shutil.which("nvcc")
    sources = [source for source in sorted(folder.glob("*.cu")) if source.stem in operations]
    for source in sources if nvcc else ():
        with tempfile.TemporaryDirectory() as scratch:
            cubin = Path(scratch) / f"{source.stem}.cubin"
            began = time.perf_counter()
            done = subprocess.run(
                [str(nvcc), "-cubin", "-std=c++17", "-O3", f"-arch={feature_arch(arch)}", "-I", str(folder),
                 "-o", str(cubin), str(source)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            if done.returncode:
                error = (done.stderr.strip().splitlines() or ["nvcc failed"])[0]
                yield Row(source.stem, "csrc", source.name, arch, error=error)
                continue
            reserved = KIB if capability(arch) >= 90 else 0  # counted in wherever a kernel has shared memory
            for name, (used, code) in inspected(cubin.read_bytes()).items():
                yield Row(
                    source.stem, "csrc", readable(name), arch, 0, used["REG"], used["STACK"] + used["LOCAL"],
                    max(used["SHARED"] - reserved, 0), 0.0, seconds, code=code,
                )  # fmt: skip


def readable(symbol: str) -> str:
    """Return a C++ symbol's name without its parameters, the symbol itself where c++filt is missing."""
    if shutil.which("c++filt") is None:
        return symbol
    return _output(["c++filt", "-p", symbol]).strip().removeprefix("void ")


def capability(arch: str) -> int:
    """sm_90 -> 90."""
    return int(arch.removeprefix("sm_"))


def feature_arch(arch: str) -> str:
    """Return the name that lets nvcc use what only this chip has, as Triton does."""
    return f"{arch}a" if capability(arch) >= 90 else arch


def report(cases: Sequence[Case], archs: Sequence[str], jobs: int = 1, csrc: Collection[str] = ()) -> Iterator[Row]:
    """Compile what the cases launch, and csrc's files of these names, for each architecture; a row each.

    ValueError where Triton is missing or interprets.
    """
    if backend.triton is None:
        raise ValueError("the compile report needs Triton; install the extra [triton]")
    if os.environ.get("TRITON_INTERPRET"):
        raise ValueError("TRITON_INTERPRET is set, so Triton interprets kernels and cannot compile them; unset it")
    work = [
        (unit, arch) for arch in archs for unit in units([case for case in cases if exists(case.operation, arch)], arch)
    ]
    if jobs == 1:
        yield from (compiled(*item) for item in work)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(compiled, *zip(*work, strict=True))
    for arch in archs:
        yield from csrc_rows(arch, csrc)


HEADER = """\
| operation | first case | kernel | arch | warps | registers | spills | shared | occupancy | compile |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(row: Row) -> str:
    """Return a row of the Markdown table under HEADER."""
    numbers = ["", "", "", "", "", "failed"]
    if not row.error:
        filled = f"{row.occupancy:.0%}" if row.warps else "-"
        numbers = [
            str(row.warps or "-"), str(row.registers), f"{row.spills} B", f"{row.shared} B", filled,
            f"{row.seconds:.1f} s",
        ]  # fmt: skip
    return f"| {' | '.join([row.operation, row.case, row.kernel, row.arch, *numbers])} |"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows for a file."""
    return [asdict(row) | {"faults": row.faults} for row in rows]


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
