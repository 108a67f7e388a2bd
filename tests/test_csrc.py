"""The CUDA kernels of csrc. Without a GPU: nvcc's report on registers, and the kernels' own rows run by CPU threads."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from runtime import kernels
from runtime.kernels import backend, cuda
from runtime.kernels.cases import Case, Maker, cases
from runtime.kernels.qk_norm_rope import NORMS, PAIRINGS, AxisTables
from tests.test_kernels import check, named

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OPERATIONS = ("modulate", "gate_residual", "gate_residual_modulate", "qk_norm_rope", "norm_silu")
KERNELS = ("modulate", "gate_residual", "qk_norm_rope", "norm_silu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
built = pytest.mark.skipif(isinstance(cuda.load(), str), reason=f"the CUDA library is {cuda.status()}")


def hook() -> ModuleType:
    """Return setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_hook", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What nvcc says.


@nvcc
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills(kernel: str, tmp_path: Path) -> None:
    report = resources(kernel, 90, tmp_path)
    assert len(report) >= 6, "fewer kernels than dtypes and paths"
    for name, (registers, spilled) in report.items():
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert registers <= 128, f"{name} takes {registers} registers; a team of 512 lanes has 128 for each"


@nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 100, 120])
def test_no_spills_elsewhere(architecture: int, tmp_path: Path) -> None:
    for kernel in KERNELS:
        assert not any(spilled for _, spilled in resources(kernel, architecture, tmp_path).values()), kernel


def resources(kernel: str, architecture: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Return (registers, bytes spilled) of each kernel in a file."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    target = folder / f"{kernel}.cubin"
    done = subprocess.run([*command, CSRC / f"{kernel}.cu", "-o", target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return {name: (int(used), int(stack) + int(stores) + int(loads)) for name, stack, stores, loads, used in found}


def test_no_torch_header() -> None:
    for source in (file for file in CSRC.iterdir() if file.is_file()):  # embed/ is for C++ programs
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", source.read_text()), source.name


def test_build_knows_all_sources() -> None:
    build = hook()
    assert sorted(build.SOURCES + build.HEADERS) == sorted(source.name for source in CSRC.iterdir() if source.is_file())


# The build.


def copied(folder: Path) -> Path:
    """Copy what a build needs, without what this machine has built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "runtime"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_cuda*", "__pycache__", "demo"))
    text = (folder / "setup.py").read_text()
    (folder / "setup.py").write_text(text.replace('"/usr/local/cuda"', '"/nowhere/cuda"'))
    return folder


def build_in(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--arch", "90"],
        cwd=folder,
        env={"PATH": str(path), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ({}, "nvcc was not found (looked in CUDA_HOME, PATH and /nowhere/cuda)"),
        ({"nvcc": "exit 0"}, "no C++ compiler was found"),
        ({"nvcc": "echo compute_75", "g++": "exit 1"}, "builds for none of [90]; it offers [75]"),
        (
            {"nvcc": 'test "$1" = --list-gpu-arch && echo compute_90 && exit; echo "fatal: no"; exit 2', "g++": ""},
            "nvcc failed:\nfatal: no",
        ),
    ],
)
def test_install_goes_on_without(programs: dict[str, str], sentence: str, tmp_path: Path) -> None:
    folder, path = copied(tmp_path), tmp_path / "bin"
    path.mkdir()
    for name, script in programs.items():
        program(path, name, script)
    (folder / "runtime" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("of other sources")
    done = build_in(folder, path)
    assert done.returncode == 0, done.stderr
    assert "csrc: the CUDA library is not built: " in done.stderr
    assert sentence in done.stderr
    assert [file.name for file in (folder / "runtime").glob("_cuda*")] == ["_cuda.txt"]
    # An editable installation's finder would find the library of the checkout itself.
    said = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
        "from runtime.kernels import cuda; print(cuda.status())"
    )
    (folder / "runtime" / "kernels").symlink_to("../kernels")
    status = subprocess.run([sys.executable, "-c", said], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert status.startswith("not built: ") and sentence in status


def test_unchanged_is_not_compiled_again(tmp_path: Path) -> None:
    build, target, log = hook(), tmp_path / "made", tmp_path / "log"
    command = ["sh", "-c", f"echo ran >> {log}; touch {target}"]
    assert build.make(target, command, "source")
    assert not build.make(target, command, "source")
    assert build.make(target, command, "changed source")
    assert build.make(target, ["sh", "-c", f"echo other flags; touch {target}"], "changed source")
    assert len(log.read_text().split()) == 2
    with pytest.raises(build.NotBuilt, match="the last line"):
        build.make(target, ["sh", "-c", "echo the last line; exit 1"], "source")
    assert build.make(target, command, "changed source"), "a failure leaves no key"


def test_status() -> None:
    assert re.match(r"built for sm_\d+|not built: \w", cuda.status())
    assert not cuda.available(torch.zeros(1))


@built
def test_no_driver() -> None:
    """The library loads anywhere; where no driver is, a launch says so."""
    if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        pytest.skip("a driver is here")
    library = cuda.load()
    assert isinstance(library, ModuleType)
    arguments = {"x": 256, "out": 256, "shape": (1, 1, 8), "x_steps": (8, 8), "dtype": "float32", "stream": 0}
    with pytest.raises(RuntimeError, match="CUDA: no NVIDIA driver is on this machine"):
        library.modulate(**arguments)
    library.modulate(**{**arguments, "shape": (1, 0, 8)})  # nothing to launch
    linked = subprocess.run(["ldd", str(library.__file__)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked


# The kernels' rows on the CPU: the same source, compiled without nvcc's device side (csrc/emulate.h).


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    build, folder = hook(), ROOT / "build" / "emulated"
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("nvcc is not installed, and with it CUDA's headers")
    pybind11 = pytest.importorskip("pybind11")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        "nvcc", "-x", "c++", "-std=c++20", "-O1", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        '-DDIT_ARCHITECTURES="the CPU"', f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
        *(str(CSRC / name) for name in build.SOURCES), "-o", str(library),
    ]  # fmt: skip
    build.make(library, command, "".join((CSRC / name).read_text() for name in build.SOURCES + build.HEADERS))
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_caller_in_cpp(emulated: ModuleType, tmp_path: Path) -> None:
    """Pointers, strides and a stream from a C++ program; its own formula is what they are compared with."""
    pybind11, paths = pytest.importorskip("pybind11"), sysconfig.get_paths()
    library = Path(sysconfig.get_config_var("LIBDIR"))
    build = [
        "g++", "-std=c++17", "-O0", f"-I{pybind11.get_include()}", f"-I{paths['include']}",
        ROOT / "tests" / "embed" / "kernels.cpp", "-o", tmp_path / "kernels", f"-L{library}",
        f"-Wl,-rpath,{library}", f"-lpython{sysconfig.get_python_version()}",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, build)), capture_output=True, text=True, check=False)
    if "cannot find -lpython" in done.stderr:
        pytest.skip("this Python has no library to embed")
    assert done.returncode == 0, done.stderr
    assert emulated.__file__ is not None
    command = [str(tmp_path / "kernels"), str(Path(emulated.__file__).parent)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(told[0].removeprefix("difference: ")) < 1e-5
    assert "x is a null pointer" in told[1] and any("x is not a multiple of 4 bytes" in line for line in told[2:])


@pytest.fixture
def on_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the implementation "cuda" be the emulated one, on tensors of the CPU."""

    def launch(operation: str, x: torch.Tensor, arguments: dict[str, Any]) -> None:
        getattr(emulated, operation)(**arguments, dtype=cuda.dtype_name(x), stream=0)

    monkeypatch.setattr(cuda, "launch", launch)


SMALL = [case for operation in OPERATIONS for case in cases(operation, real=False)]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=named)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    check(case, "cuda", dtype)


# What each row can meet, beyond the shared cases: vectors of 128 bits or single numbers, held or read again, teams of
# part of a warp, of one, of many.


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that starts one number after an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def token_cases() -> Iterator[Case]:
    for width in (8, 256, 1536, 1544, 5120, 16392):

        def make(m: Maker, width: int = width) -> dict[str, Any]:
            return {
                "x": m.tensor(2, 4, width), "y": m.tensor(2, 4, width), "gate": m.vector(2, 2, width),
                "scale": m.vector(2, 4, width), "shift": m.vector(2, 4, width),
                "weight": m.gain(width), "bias": m.vector(width),
            }  # fmt: skip

        def unaligned(m: Maker, width: int = width) -> dict[str, Any]:
            return make(m, width) | {"x": shifted(m.tensor(2, 4, width))}

        def vector_unaligned(m: Maker, width: int = width) -> dict[str, Any]:
            return make(m, width) | {"bias": shifted(m.vector(width))}

        makers = {"": make} | ({" x unaligned": unaligned, " bias unaligned": vector_unaligned} if width == 256 else {})
        for described, maker in makers.items():
            for operation, names in NAMES.items():

                def only(m: Maker, maker: Any = maker, names: tuple[str, ...] = names) -> dict[str, Any]:
                    return {name: value for name, value in maker(m).items() if name in names}

                yield Case(operation, f"width {width}{described}", only)


NAMES = {
    "modulate": ("x", "scale", "shift", "weight", "bias"),
    "gate_residual": ("x", "y", "gate"),
    "gate_residual_modulate": ("x", "y", "gate", "scale", "shift", "weight", "bias"),
}


def head_cases() -> Iterator[Case]:
    """All norms, pairings and tables, on heads that are and are not whole vectors, and on published widths."""
    tables = ("dense", "axes", "none")
    shapes = ((2, 32), (3, 6))
    kinds = [(n, p, t, *shape) for n in NORMS for p in PAIRINGS for t in tables for shape in shapes]
    published = [("rms", p, t, heads, 128) for p in PAIRINGS for t in tables[:2] for heads in (12, 24, 40)]
    others = [("rms_head", "half", "axes", 3, 256), ("layer_head", "interleaved", "dense", 30, 64)]
    for norm, pairing, table, heads, size in [*kinds, *published, *others, ("rms", "half", "dense", 130, 128)]:

        def make(
            m: Maker, norm: str = norm, pairing: str = pairing, table: str = table, heads: int = heads, size: int = size
        ) -> dict[str, Any]:
            rows, skip, grid = (2, (3, 1), (2, 3, 2)) if heads < 5 else (1, (1, 1), (1, 2, 1))
            tokens, pairs = grid[0] * grid[1] * grid[2], size // 2
            width = heads * size if norm == "rms" else size
            parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
            axes = AxisTables(*(m.turns(extent, part) for extent, part in zip(grid, parts, strict=True)))
            gains = {name: m.gain(width) for name in ("q_weight", "k_weight")}
            biases = {name: m.vector(width) if norm == "layer_head" else None for name in ("q_bias", "k_bias")}
            return {
                "qkv": m.tensor(rows, tokens + sum(skip), 3 * heads * size),
                "rope": {"dense": m.turns(tokens, pairs), "axes": axes, "none": None}[table],
                "heads": heads, "norm": norm, "pairing": pairing, "skip": skip, **biases,
                **(dict.fromkeys(gains) if norm == "none" else gains),
            }  # fmt: skip

        yield Case("qk_norm_rope", f"{norm} {pairing} {table} {heads}x{size}", make)


def pixel_cases() -> Iterator[Case]:
    for channels in (1, 3, 96, 384, 1024, 1032):
        for last in (True, False):
            for upsample in (False, True):

                def make(
                    m: Maker, channels: int = channels, last: bool = last, upsample: bool = upsample
                ) -> dict[str, Any]:
                    x = m.tensor(2, 3, 2, 5, channels).movedim(4, 1) if last else m.tensor(2, channels, 3, 2, 5)
                    return {"x": x, "gamma": m.gain(channels, 1, 1, 1), "upsample": upsample}

                yield Case("norm_silu", f"{channels} last {last} upsample {upsample}", make)

    def zeros(m: Maker) -> dict[str, Any]:
        return {"x": 0 * m.tensor(2, 16, 3), "gamma": m.gain(16)}

    def large(m: Maker) -> dict[str, Any]:
        return {"x": m.tensor(1, 16, 9), "gamma": 100 * m.gain(16)}

    yield Case("norm_silu", "zeros", zeros)
    yield Case("norm_silu", "far from zero", large)


EXTRA = [*token_cases(), *head_cases(), *pixel_cases()]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", EXTRA, ids=named)
def test_rows(case: Case, dtype: torch.dtype) -> None:
    check(case, "cuda", dtype)


@pytest.mark.usefixtures("on_cpu")
def test_axis_tables_are_the_dense_one() -> None:
    """Both kinds of table give the same bits."""
    [case] = [case for case in EXTRA if case.name == "rms interleaved axes 2x32"]
    outputs = []
    for rope in ("rope", "dense"):
        arguments = case.make(Maker(torch.device("cpu"), torch.float32))
        if rope == "dense":
            arguments["rope"] = arguments["rope"].dense()
        with backend.forced("cuda"):
            outputs.append(kernels.qk_norm_rope(**arguments))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_norm_takes_the_rounded_sum() -> None:
    """h is the modulation of the bfloat16 sum that is returned, to the last bit."""
    for case in [case for case in SMALL + EXTRA if case.operation == "gate_residual_modulate"]:
        arguments = case.make(Maker(torch.device("cpu"), torch.bfloat16))
        with backend.forced("cuda"):
            out, h = kernels.gate_residual_modulate(**arguments)
            others = {name: arguments.get(name) for name in NAMES["modulate"] if name != "x"}
            again = kernels.modulate(out, **others)
        assert torch.equal(h, again), case.name


LEGAL: dict[str, dict[str, Any]] = {
    "modulate": {"x": 256, "x_steps": (8, 8), "out": 256, "shape": (1, 1, 8)},
    "gate_residual": {"x": 256, "x_steps": (8, 8), "y": 256, "y_steps": (8, 8), "out": 256, "shape": (1, 1, 8)},
    "qk_norm_rope": {"qkv": 256, "qkv_steps": (24, 24), "shape": (1, 1, 8), "heads": 2},
    "norm_silu": {"x": 256, "x_steps": (0, 8, 1), "out": 256, "shape": (1, 1, 8), "gamma": 256},
}


@pytest.mark.parametrize(
    ("operation", "wrong", "sentence"),
    [
        ("modulate", {"dtype": "float64"}, "dtype is 'float64'; legal: bfloat16, float16, float32"),
        ("modulate", {"x": 0}, "x is a null pointer"),
        ("modulate", {"out": 257}, "out is not a multiple of 2 bytes"),
        ("modulate", {"scale": 258}, "scale is not a multiple of 4 bytes"),
        ("modulate", {"scale": 256, "scale_steps": (0, 0)}, "scale group is 0; expected 1 to 1"),
        ("modulate", {"shape": (-1, 1, 8)}, "batch is -1"),
        ("modulate", {"shape": (2, 2**30, 8)}, "tokens are 2^31 or more"),
        ("gate_residual", {"y": 0}, "y is a null pointer"),
        ("gate_residual", {"gate": 256, "gate_steps": (0, 2)}, "gate group is 2; expected 1 to 1"),
        ("qk_norm_rope", {"heads": 3}, "width is 8; expected 3 heads of an even size"),
        ("qk_norm_rope", {"heads": 8}, "expected 8 heads of an even size"),
        ("qk_norm_rope", {"norm": "layer"}, "norm is 'layer'; legal: rms, rms_head, layer_head, none"),
        ("qk_norm_rope", {"pairing": "neox"}, "pairing is 'neox'; legal: interleaved, half"),
        ("qk_norm_rope", {"skip": (1, 1)}, "skip is (1, 1); expected at most 1 tokens"),
        ("qk_norm_rope", {"axes": (256, 256, 0)}, "axes has a null pointer"),
        ("qk_norm_rope", {"axes": (256, 256, 256)}, "axis_pairs do not sum to half a head"),
        (
            "qk_norm_rope",
            {"axes": (256, 256, 256), "axis_pairs": (1, 1, 0), "grid": (1, 2, 1)},
            "grid does not hold the rotated tokens",
        ),
        ("qk_norm_rope", {"table": 260}, "table is not a multiple of 8 bytes"),
        ("norm_silu", {"upsample_width": 2}, "upsample_width does not divide the pixels"),
        ("norm_silu", {"upsample_width": 1}, "upsample wants channels-last and an out of its own"),
        ("norm_silu", {"gamma": 0}, "gamma is a null pointer"),
    ],
)
def test_refused(operation: str, wrong: dict[str, Any], sentence: str, emulated: ModuleType) -> None:
    arguments = LEGAL[operation] | {"dtype": "bfloat16", "stream": 0} | wrong
    with pytest.raises(ValueError, match=re.escape(sentence)):
        getattr(emulated, operation)(**arguments)


def test_refused_tensors() -> None:
    x = torch.zeros(1, 2, 8)
    with backend.forced("cuda"):
        with pytest.raises(ValueError, match=r"the CUDA library needs them on an NVIDIA GPU|not built"):
            kernels.modulate(x)
        with pytest.raises(ValueError, match="x has dtype float64; the CUDA kernels take bfloat16, float16, float32"):
            kernels.modulate(x.double())
        with pytest.raises(ValueError, match=r"y has dtype torch\.float16; the CUDA kernel expects x's"):
            kernels.gate_residual(x, x.half())
        with pytest.raises(ValueError, match="weight is on meta; expected cpu"):
            kernels.modulate(x, weight=torch.zeros(8, device="meta"))


# On a GPU. The shared cases run in test_kernels.py, by the library as by Triton.


@pytest.mark.gpu
@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, *EXTRA], ids=named)
def test_rows_on_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, "cuda", dtype, "cuda")


@pytest.mark.gpu
@built
def test_captured() -> None:
    """A launch goes to the current stream, so a CUDA graph records and replays it."""
    x = torch.randn(1, 64, 1536, device="cuda", dtype=torch.bfloat16)
    with backend.forced("cuda"):
        kernels.modulate(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.modulate(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, kernels.modulate(x))
