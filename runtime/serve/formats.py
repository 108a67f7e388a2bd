"""Videos in other formats, made in a process of their own when somebody first asks, and kept beside the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runtime.video import read_video

FORMATS = ("mp4", "webm", "gif")
SECONDS = 3600


def converted(path: Path, kind: str) -> Path:
    """Return the file of a video in a format of `FORMATS`; ValueError or OSError where it cannot be written."""
    target = path.with_suffix(f".{kind}")
    if target.exists():
        return target
    command = [sys.executable, "-m", "runtime.serve.formats", str(path), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        found = json.loads(done.stdout or '{"message": "the converter died"}')
        raise OSError(found["errno"], found["message"]) if found.get("errno") else ValueError(found["message"])
    return target


def main() -> int:
    """Write one file in the format of another's name; tell what is wrong as JSON."""
    os.nice(10)  # what is being made goes first
    source, target = (Path(text) for text in sys.argv[1:])
    try:
        read_video(source).save(target)
    except (ValueError, OSError) as error:
        print(json.dumps({"errno": getattr(error, "errno", None), "message": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
