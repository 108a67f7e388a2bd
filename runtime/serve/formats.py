"""Videos in other formats, and parts of them, made in a process of their own when somebody first asks, and kept
beside the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from runtime.certificates import read_signer
from runtime.clips import cut_clip
from runtime.provenance import CUT, SEALED, TRANSCODE, derived, seal
from runtime.reading import read_video

FORMATS = ("mp4", "webm", "gif")
SECONDS = 3600
KEPT_PARTS = 8  # of a video; beyond that the oldest goes

Part = tuple[int, int]  # frames, from the first up to before the second


def converted(path: Path, kind: str, part: Part | None, signer: tuple[Path, Path] | None) -> Path:
    """Return the file of a video, or of a part, in a format of `FORMATS`, signed where it can be (`signer`: certificate
    and key); ValueError or OSError where it cannot be written."""
    places = "" if part is None else f"{part[0]}-{part[1]}"
    target = path.with_name(f"{path.stem}{places and '-'}{places}.{kind}")
    if target.exists():
        return target
    if part is not None:
        kept = sorted(path.parent.glob(f"{path.stem}-*-*.*"), key=lambda file: file.stat().st_mtime)
        for oldest in kept[: len(kept) + 1 - KEPT_PARTS]:
            oldest.unlink(missing_ok=True)
    command = [sys.executable, "-m", "runtime.serve.formats", str(path), str(target), places, *map(str, signer or ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        found = json.loads(done.stdout or '{"message": "the converter died"}')
        raise OSError(found["errno"], found["message"]) if found.get("errno") else ValueError(found["message"])
    return target


def main() -> int:
    """Write one file, or a part of it, in the format of another's name; tell what is wrong as JSON."""
    os.nice(10)  # what is being made goes first
    source, target, places, *signer = sys.argv[1:]

    def sign(file: Path) -> None:
        if signer and file.suffix in SEALED:
            made = derived(Path(source), CUT if places else TRANSCODE)
            seal(file, Path(target).name, *made, read_signer(*map(Path, signer)))

    try:
        start, _, stop = places.partition("-")
        video = cut_clip(source, int(start), int(stop)) if places else read_video(source)
        video.save(target, seal=sign)
    except (ValueError, OSError) as error:
        print(json.dumps({"errno": getattr(error, "errno", None), "message": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
