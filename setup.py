"""Build hook: compiles csrc into `runtime._cuda` where nvcc and a C++ compiler are; the rest stands in pyproject.toml.

An install without them works: the operations run by Triton or their references. What is missing is printed here, and
`runtime.kernels.cuda.status()` tells it later. For a quick build of one GPU type: python setup.py build_ext --inplace
--arch 90.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ("modulate.cu", "gate_residual.cu", "qk_norm_rope.cu", "norm_silu.cu", "module.cpp")
HEADERS = ("operations.h", "vector.cuh", "row.cuh", "modulate.cuh", "emulate.h")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # those that the nvcc at hand knows are built
CUDA_FOLDER = "/usr/local/cuda"
REASON = "_cuda.txt"  # beside the library: why there is none


class NotBuilt(Exception):
    """Why there is no library."""


def run(*command: str) -> str:
    """Return what a command prints; NotBuilt with its last lines where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise NotBuilt("\n".join([f"{Path(command[0]).name} failed:", *lines[-12:]]))
    return done.stdout


def find_nvcc() -> str:
    """Return nvcc's path; NotBuilt where it is not found."""
    folders = [os.environ.get("CUDA_HOME"), CUDA_FOLDER]
    places = [folder and os.path.join(folder, "bin", "nvcc") for folder in folders]
    for place in (places[0], shutil.which("nvcc"), places[1]):
        if place and os.path.isfile(place):
            return place
    raise NotBuilt(f"nvcc was not found (looked in CUDA_HOME, PATH and {CUDA_FOLDER}); install the CUDA toolkit")


def choose_architectures(nvcc: str, asked: str | None) -> list[int]:
    """Return the compute capabilities to build for: one that was asked for, else all of ours that nvcc knows."""
    offered = {int(word.removeprefix("compute_")) for word in run(nvcc, "--list-gpu-arch").split()}
    wanted = [int(asked)] if asked else list(ARCHITECTURES)
    chosen = [each for each in wanted if each in offered]
    if not chosen:
        raise NotBuilt(f"nvcc ({nvcc}) builds for none of {wanted}; it offers {sorted(offered)}")
    return chosen


def compile_library(asked: str | None, suffix: str) -> Path:
    """Compile what has changed into build/csrc and return the library there; NotBuilt where that cannot be."""
    nvcc = find_nvcc()
    if shutil.which("g++") is None:
        raise NotBuilt("no C++ compiler was found (looked for g++ in PATH); nvcc needs one")
    try:
        import pybind11
    except ImportError as error:
        raise NotBuilt("pybind11 is not installed; pip install pybind11") from error
    chosen = choose_architectures(nvcc, asked)
    names = ", ".join(f"sm_{each}" for each in chosen)
    both = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in chosen]
    newest = f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"  # PTX: for GPUs to come
    flags = {
        ".cu": [*both, *targets, newest, "--threads", str(min(os.cpu_count() or 1, len(targets) + 1))],
        ".cpp": [
            *both, f'-DDIT_ARCHITECTURES="{names}"',
            f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
        ],
    }  # fmt: skip
    shared = run(nvcc, "--version") + "".join((ROOT / "csrc" / name).read_text() for name in HEADERS)
    objects, folder = [], ROOT / "build" / "csrc"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source = ROOT / "csrc" / name
        made = folder / f"{name}.o"
        command = [nvcc, *flags[source.suffix], "-c", str(source), "-o", str(made)]
        if make(made, command, shared + source.read_text()):
            print(f"csrc: compiled {name} for {names if source.suffix == '.cu' else 'Python'}", flush=True)
        objects.append(made)
    library = folder / f"_cuda{suffix}"
    # nvcc links the CUDA runtime statically and never the driver, so the library loads on any machine.
    command = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "-s", *map(str, objects), "-o", str(library)]
    make(library, command, "".join(stamp(made).read_text() for made in objects))
    return library


def stamp(made: Path) -> Path:
    """Where the key of what a file was made from is kept."""
    return made.with_name(made.name + ".key")


def make(made: Path, command: list[str], content: str) -> bool:
    """Run a command unless the file is there and was made from the same command and content; tell whether it ran."""
    key = hashlib.sha256("\0".join([*command, content]).encode()).hexdigest()
    if made.exists() and stamp(made).exists() and stamp(made).read_text() == key:
        return False
    stamp(made).unlink(missing_ok=True)
    run(*command)
    stamp(made).write_text(key)
    return True


def place(target: Path, asked: str | None) -> None:
    """Build the library for the compute capability asked for, None for all, and put it at `target`.

    NotBuilt where that cannot be; why is printed, and lies in a file beside it.
    """
    reason = target.with_name(REASON)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        library = compile_library(asked, sysconfig.get_config_var("EXT_SUFFIX"))
    except NotBuilt as problem:
        target.unlink(missing_ok=True)  # one of other sources would be worse than none
        reason.write_text(f"{problem}\n")
        print(f"csrc: the CUDA library is not built: {problem}", file=sys.stderr, flush=True)
        raise
    reason.unlink(missing_ok=True)
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(library, temporary)
    temporary.replace(target)  # a process that has the old one open keeps it


class BuildCuda(build_ext):
    """build_ext by nvcc; a failure leaves an install without the library, and says so."""

    user_options: ClassVar = [*build_ext.user_options, ("arch=", None, "compute capability to build for, such as 90")]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.arch: str | None = None

    def run(self) -> None:
        with suppress(NotBuilt):  # it has been printed
            place(Path(self.get_ext_fullpath(self.extensions[0].name)), self.arch)


if __name__ == "__main__":
    extension = Extension(
        "runtime._cuda",
        sources=[f"csrc/{name}" for name in SOURCES],
        depends=[f"csrc/{name}" for name in HEADERS],
        optional=True,
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildCuda})
