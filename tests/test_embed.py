"""The C++ side: found, built and run in clean folders, with the frames of Python; and what hosts may do wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from runtime.__main__ import main
from runtime.denoising import prepare_context
from tests.published import Tiny, relative, write

ROOT = Path(__file__).resolve().parent.parent
EMBED = ROOT / "csrc" / "embed"
# What modules without the sanitizer (Python, PyTorch) do among themselves is not judged, but their locks are seen, the
# interpreter's above all. A list of suppressions would hide our frames below Python's as well.
SANITIZED = "-O1 -g -fsanitize=thread"
SANITIZER = ("TSAN_OPTIONS=ignore_noninstrumented_modules=1", "OMP_NUM_THREADS=1")  # PyTorch's own threads left out

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="cmake or g++ is not installed"
)


def ran(*command: object, status: int = 0) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == status, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def built(source: Path, build: Path, *settings: str, flags: str = "-O0") -> Path:
    """Configure and build a CMake project, and return the folder."""
    given = ["-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={flags}", *settings]
    ran("cmake", "-S", source, "-B", build, *given)
    ran("cmake", "--build", build)
    return build


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation brings, without the source tree."""
    folder = tmp_path_factory.mktemp("package")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, capture_output=True)
    return folder / "runtime" / "embed"


@pytest.fixture(scope="module")
def programs(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `checks` and `generate`, with the library as part of the host's own build, statically."""
    settings = f"-Ddit_runtime_DIR={package / 'cmake'}", f"-DPython3_EXECUTABLE={sys.executable}"
    return built(ROOT / "tests" / "embed", tmp_path_factory.mktemp("programs"), *settings)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that tells `checks` of a Python without this package, which has a library of its own."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch(0o755)  # its place says where its library is, and nobody runs it
    (folder / "lib").symlink_to(Path(sysconfig.get_path("stdlib")).parent)
    return f"BARE_HOME={folder}"


@pytest.fixture(scope="module")
def findings(programs: Path, bare: str) -> dict[str, str]:
    """What the host of tests/embed/checks.cpp met."""
    return dict(line.split(": ", 1) for line in ran("env", bare, programs / "checks").splitlines())


def test_the_command_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--cmake-dir"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "dit_runtimeConfig.cmake").is_file()


def test_the_package_brings_every_source(package: Path) -> None:
    for source in (path for path in EMBED.rglob("*") if path.is_file()):
        assert (package / source.relative_to(EMBED)).read_bytes() == source.read_bytes()


def test_the_example_makes_the_frames_of_python(programs: Path, tmp_path: Path) -> None:
    prompt = "a red ball rolls left over green grass"
    told = ran(programs / "generate", prompt, tmp_path / "ball.rgb", 7)
    assert "ball.rgb: 17 frames, 160x96, 8 fps" in told
    frames = np.fromfile(tmp_path / "ball.rgb", np.uint8).reshape(17, 96, 160, 3)
    ours = runtime.generate(runtime.load("demo"), runtime.Request(prompt=prompt, seed=7)).frames
    assert np.array_equal(frames, ours)


@pytest.mark.slow
def test_a_shared_library_that_was_installed(package: Path, tmp_path: Path) -> None:
    """Built by itself and found where it was installed, by the example as it is."""
    library = built(package, tmp_path / "library", f"-DPython3_EXECUTABLE={sys.executable}", "-DBUILD_SHARED_LIBS=ON")
    ran("cmake", "--install", library, "--prefix", tmp_path / "prefix")
    build = built(package / "examples", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    assert "17 frames" in ran(build / "generate", "a red ball", tmp_path / "ball.mp4")
    assert (tmp_path / "ball.mp4").is_file()
    assert "no such folder" in ran(build / "generate", "a red ball", tmp_path / "x.mp4", 7, "no-such-model", status=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no python", "Refused there is no Python at /no/such/python"),
        ("python without us", "Refused dit-runtime cannot be imported by "),
        ("missing model", "Refused there is no model 'no-such-model'"),
        ("device", "Refused device is 'tpu'; legal"),
        ("other python", "Refused the interpreter already runs from"),
        ("size", "Refused the size is 63x64; the width and height of a video are even"),
        ("more", "Refused Request::more has colour, which is no field"),
        ("no object", "Refused Request::more is {; legal: a JSON object"),
        ("empty", "Refused this model or video is empty"),
        ("unwritable", "Refused the folder /no/such/folder does not exist"),
        ("cancel in a step", "Cancelled cancelled after step 1 of 2"),
        ("cancel from a thread", "Cancelled long before its end"),
        ("cancel at a frame", "Cancelled cancelled after frame 3 of 5"),
        ("exception in a step", "HostError 5"),
        ("exception at a frame", "HostError 6"),
        ("early shutdown", "Refused 1 models or videos are still there"),
        ("shutdown again", "nothing was thrown"),
        ("after shutdown", "Error the interpreter was shut down and cannot start again in this process"),
    ],
)
def test_a_host_is_told_what_is_wrong(findings: dict[str, str], name: str, expected: str) -> None:
    assert findings[name].startswith(expected)


def test_a_host_keeps_what_is_its_own(findings: dict[str, str]) -> None:
    assert findings["SIGINT"] == findings["SIGPIPE"] == "the host's"
    assert findings["locale"] == "C"


def test_threads_and_models(findings: dict[str, str]) -> None:
    """Two models' callbacks wait for each other, four threads share a model, a callback makes a request."""
    assert findings["seeds"] == "differ"
    assert findings["two models at once"] == findings["one model, four threads"] == "the same frames"
    assert findings["a request in a step"] == str(5 * 64 * 64 * 3)
    assert findings["receipt"] == "whole"


def test_memory_does_not_grow(programs: Path, bare: str) -> None:
    told = dict(line.split(": ", 1) for line in ran("env", bare, programs / "checks", 100).splitlines())
    assert int(told["bytes grown over the last half"]) < 1 << 20


def sanitized(package: Path, bare: str, build: Path, status: int) -> str:
    """Build `checks` and the library with the thread sanitizer, and return what it says of a run."""
    settings = f"-Ddit_runtime_DIR={package / 'cmake'}", f"-DPython3_EXECUTABLE={sys.executable}"
    built(ROOT / "tests" / "embed", build, *settings, flags=SANITIZED)
    return ran("env", bare, *SANITIZER, build / "checks", status=status)


@pytest.mark.slow
def test_the_thread_sanitizer_finds_nothing_in_our_code(package: Path, bare: str, tmp_path: Path) -> None:
    told = sanitized(package, bare, tmp_path, status=0)
    assert "after shutdown: Error" in told and "ThreadSanitizer" not in told


@pytest.mark.slow
def test_the_thread_sanitizer_would_find_a_race(package: Path, bare: str, tmp_path: Path) -> None:
    """The library with a flag of one thread read by another without being atomic, in a callback below Python."""
    racy = shutil.copytree(package, tmp_path / "racy")
    header = racy / "include" / "dit_runtime.hpp"
    text = header.read_text()
    assert "std::atomic<bool>" in text
    header.write_text(text.replace("std::atomic<bool>", "bool"))
    told = sanitized(racy, bare, tmp_path / "build", status=66)
    assert "data race" in told and "dit_runtime::Cancel::asked() const" in told


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, in `model`, and its packages for 9 frames."""
    folder = tmp_path_factory.mktemp("compiled")
    write(Tiny(seed=70), folder / "model")
    command = ["build", "--engine", "inductor", "--model", folder / "model", "--frames", "9", "--package", folder]
    ran(sys.executable, "-m", "runtime", *command)
    return folder


@pytest.mark.slow
def test_packages_take_turns(package: Path, compiled: Path, tmp_path: Path) -> None:
    """Six threads, four of them on one engine, under the thread sanitizer."""
    settings = f"-Ddit_runtime_DIR={package / 'cmake'}", f"-DPython3_EXECUTABLE={sys.executable}", "-DENGINE=ON"
    build = built(ROOT / "tests" / "embed", tmp_path, *settings, flags=SANITIZED)
    told = ran("env", *SANITIZER, build / "engines", compiled / "step-1.pt2")
    assert "threads: the same numbers" in told and "ThreadSanitizer" not in told
    assert "refused: 0 inputs are given; this package takes 3" in told


@pytest.mark.slow
def test_packages_run_without_python(package: Path, compiled: Path, tmp_path: Path) -> None:
    """One step and the decoder, compiled ahead by the command, make the numbers of Python with libtorch alone."""
    settings = f"-Ddit_runtime_DIR={package / 'cmake'}", f"-DPython3_EXECUTABLE={sys.executable}", "-DENGINE=ON"
    engine = built(package / "examples", tmp_path / "build", *settings) / "engine"
    assert "libtorch_cpu" in (linked := ran("ldd", engine)) and "libpython" not in linked

    model = runtime.load(compiled / "model")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *model.spec.latent_shape(9, 32, 32), generator=generator)
    text = torch.zeros(1, model.spec.text_length, model.transformers[0].text_dim)
    text[:, :7] = torch.randn(1, 7, text.shape[2], generator=generator)
    x.numpy().tofile(tmp_path / "x.bin")
    text.numpy().tofile(tmp_path / "text.bin")
    ran(engine, compiled, tmp_path, tmp_path, 3)

    context = prepare_context(model, [text[0, :7]], x.shape[1:])
    with torch.inference_mode():
        for sigma in (1.0, 2 / 3, 1 / 3):
            x = x - model.transformers[0](x, torch.tensor([sigma], dtype=torch.float64), context.experts[0]) / 3
    theirs = torch.from_numpy(np.fromfile(tmp_path / "latents.bin", np.float32)).view(x.shape)
    assert relative(theirs, x) < 1e-4
    frames = np.fromfile(tmp_path / "frames.rgb", np.uint8).reshape(9, 32, 32, 3)
    assert np.abs(frames.astype(int) - runtime.decode(model, theirs).frames).max() <= 1

    (tmp_path / "step-1.pt2").write_bytes(b"nothing")
    assert "step-1.pt2 cannot be loaded" in ran(engine, tmp_path, tmp_path, tmp_path, status=2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--engine", "tensorrt"], "are written by inductor"),
        (["--engine", "inductor", "--size", "64x64,96x64"], "is for one size"),
        (["--engine", "inductor", "--size", "63x64"], "take 62x64 or 64x64"),
    ],
)
def test_packages_that_cannot_be_written(
    given: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *given, "--package", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
