"""Videos in other formats, made in a process of their own when somebody first asks, and kept beside the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runtime.certificates import read_signer
from runtime.provenance import SEALED, seal, transcoding
from runtime.reading import read_video

FORMATS = ("mp4", "webm", "gif")
SECONDS = 3600


def converted(path: Path, kind: str, signer: tuple[Path, Path] | None) -> Path:
    """Return the file of a video in a format of `FORMATS`, signed where it can be (`signer`: certificate and key);
    ValueError or OSError where it cannot be written."""
    target = path.with_suffix(f".{kind}")
    if target.exists():
        return target
    command = [sys.executable, "-m", "runtime.serve.formats", str(path), str(target), *map(str, signer or ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        found = json.loads(done.stdout or '{"message": "the converter died"}')
        raise OSError(found["errno"], found["message"]) if found.get("errno") else ValueError(found["message"])
    return target


def main() -> int:
    """Write one file in the format of another's name; tell what is wrong as JSON."""
    os.nice(10)  # what is being made goes first
    source, target, *signer = (Path(text) for text in sys.argv[1:])

    def sign(file: Path) -> None:
        if signer and target.suffix in SEALED:
            seal(file, target.name, *transcoding(source), read_signer(*signer))

    try:
        read_video(source).save(target, seal=sign)
    except (ValueError, OSError) as error:
        print(json.dumps({"errno": getattr(error, "errno", None), "message": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
