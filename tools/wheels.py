"""python tools/wheels.py: wheels of what a GPU machine without a network lacks, small enough to be carried along.

They are downloaded in the versions of constraints.txt, for another Python and Linux on x86-64, and packed tighter. On
that machine: python3 -m pip install --no-index --no-deps --target DIR .whl/*.whl, and DIR in PYTHONPATH. Older wheels
in the folder are deleted: two versions of one package would stop the whole install.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("av", "diffusers", "ftfy", "wcwidth")  # diffusers imports importlib_metadata on no Python of today
GLIBC = (28, 27, 17)  # pip takes a platform's number literally


def main(argv: Sequence[str] | None = None) -> int:
    """Download, pack, print the size; pip's exit status where it fails."""
    parser = argparse.ArgumentParser(prog="python tools/wheels.py", description=__doc__)
    parser.add_argument("--python", default="3.12", help="version there (default 3.12)")
    parser.add_argument("--packages", default=",".join(PACKAGES), help=f"default {','.join(PACKAGES)}")
    parser.add_argument("--into", type=Path, default=ROOT / ".whl", help="folder (default .whl)")
    args = parser.parse_args(argv)
    pinned = dict(re.findall(r"^([\w.-]+)(==.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in GLIBC] + ["--platform=manylinux2014_x86_64"]
    download = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation=cp", f"--python-version={args.python}", *platforms,
        f"--dest={args.into}", *(name + pinned.get(name, "") for name in args.packages.split(",")),
    ]  # fmt: skip
    for old in args.into.glob("*.whl"):
        old.unlink()
    if status := subprocess.run(download, check=False).returncode:
        return status
    wheels = sorted(args.into.glob("*.whl"))
    for wheel in wheels:
        repack(wheel)
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB in {args.into}")
    return 0


def repack(wheel: Path) -> None:
    """Compress a wheel by LZMA, which pip reads as well; the files inside stay the same."""
    packed = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_LZMA)
    packed.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
