"""What an installation brings, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python packages as a wheel would hold them."""
    folder = tmp_path_factory.mktemp("built")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        "build_py",
        "--build-lib",
        str(folder / "lib"),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "Warning" not in done.stderr, done.stderr
    return folder / "lib"


def test_only_one_name_at_the_top(built: Path) -> None:
    """Another published package imports as `kernels`; ours is runtime.kernels."""
    assert [path.name for path in built.iterdir()] == ["runtime"]


def test_everything_is_in(built: Path) -> None:
    for source in [
        *ROOT.glob("runtime/**/*.py"),
        *ROOT.glob("runtime/demo/**/*.*"),
        *ROOT.glob("runtime/serve/page/*"),
    ]:
        assert (built / source.relative_to(ROOT)).is_file()
    for source in ROOT.glob("csrc/embed/**/*.*"):
        assert (built / "runtime" / source.relative_to(ROOT / "csrc")).is_file()
    for source in ROOT.glob("kernels/*.py"):
        assert (built / "runtime" / source.relative_to(ROOT)).is_file()


def test_it_runs_from_there(built: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(built)!r}); import runtime, runtime.kernels;"
        "assert runtime.__file__.startswith(sys.path[0]) and runtime.kernels.__file__.startswith(sys.path[0]);"
        "video = runtime.generate(runtime.load('demo'), runtime.Request(prompt='a ball', num_frames=1, steps=1));"
        "assert video.frames.shape == (1, 96, 160, 3)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_importing_runtime_is_light() -> None:
    """A process that only serves HTTP imports runtime without torch."""
    code = "import sys, runtime, runtime.tasks; assert 'torch' not in sys.modules; assert 'load' in dir(runtime)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for name in (requirement.split(">")[0].lower().replace("_", "-") for requirement in needed):
        assert f"\n{name}==" in pinned, name


def test_every_station_is_held_to_the_rules_of_imports() -> None:
    """A new file falls under them: it is named in each contract that lists its siblings."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers, words, families, _, server = contracts
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "runtime").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    stations = {name for name in modules if name.count(".") == 1}
    below = {name for name in modules if name.count(".") == 2}
    serving, cli = ({name for name in below if name.startswith(f"runtime.{part}.")} for part in ("serve", "cli"))
    assert {name for layer in layers["layers"] for name in layer.split(" | ")} == stations
    assert {name for layer in words["layers"] for name in layer.split(" | ")} == cli
    assert set(families["source_modules"]) == stations - {"runtime.models"}
    assert set(server["source_modules"]) | set(server["forbidden_modules"]) >= serving
