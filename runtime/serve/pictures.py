"""Pictures: uploads looked at in a process of their own, with limits; thumbnails and sheets of what was made."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from runtime.kinds import KINDS, kind_of
from runtime.reading import read_video
from runtime.serve.boxed import answer, boxed
from runtime.video import Video

MAX_PIXELS = 50_000_000  # of one picture
MAX_FRAMES = 3600
SHEET = 5  # pictures a row and a column of a sprite sheet at most
SHEET_WIDTH = 160

PICTURES = ("png", "jpeg", "webp")


def inspect(path: Path, *, mask: bool = False) -> dict[str, Any]:
    """Decode an upload whole in a child with limits; return {file, width, height, num_frames, fps}.

    A picture becomes a PNG, upright and without transparency; a `mask` is white where it was transparent. ValueError
    for what cannot be decoded within the limits, OSError where the disk is full.
    """
    return boxed("runtime.serve.pictures", str(path), *(["mask"] if mask else []))


def look(path: Path, *, mask: bool) -> dict[str, Any]:
    """What the child does for `inspect`."""
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"the upload is none of {', '.join(KINDS)} by its content")
    if kind in PICTURES:
        with Image.open(path, formats=[kind.upper()]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"the picture has more than {MAX_PIXELS} pixels; give a smaller one")
            upright = ImageOps.exif_transpose(picture)
            if mask and not upright.has_transparency_data:
                raise ValueError("the mask has no transparent part; make it transparent where something is to change")
            upright = clear(upright) if mask else eight_bits(upright).convert("RGB")
        target = path.with_suffix(".png")
        upright.save(target)
        return {"file": target.name, "width": upright.width, "height": upright.height, "num_frames": 1, "fps": None}
    if mask:
        raise ValueError("the mask is no picture; give a PNG with a transparent part")
    target = path.with_suffix(f".{kind}")
    path.rename(target)
    video = read_video(target)
    if video.num_frames > MAX_FRAMES:
        raise ValueError(f"the clip has {video.num_frames} frames; at most {MAX_FRAMES} are taken")
    for _ in video._decode(keep=False):
        pass
    return {
        "file": target.name, "width": video.width, "height": video.height, "num_frames": video.num_frames,
        "fps": video.fps,
    }  # fmt: skip


def clear(picture: Image.Image) -> Image.Image:
    """Return a picture that is white where another is transparent, and black elsewhere."""
    return picture.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha < 128)).convert("RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits in 8; Pillow alone would cut it off at 255."""
    return picture.point(lambda value: value / 257, "L") if picture.mode.startswith("I;16") else picture


def write_sheets(path: Path) -> dict[str, Any]:
    """Write a thumbnail and a sprite sheet beside a video; return the name of each, and how the sheet is laid out."""
    video = read_video(path)
    count = min(SHEET * SHEET, video.num_frames)
    wanted = {round(i * (video.num_frames - 1) / max(count - 1, 1)) for i in range(count)}
    height = max(1, round(video.height * SHEET_WIDTH / video.width))
    found: list[Image.Image] = []
    for index, frame in enumerate(video):
        if index == 0:
            Image.fromarray(frame).save(path.with_suffix(".webp"))
        if index in wanted:
            found.append(Image.fromarray(frame).resize((SHEET_WIDTH, height)))
    columns = math.ceil(math.sqrt(len(found)))
    rows = math.ceil(len(found) / columns)
    sheet = Image.new("RGB", (columns * SHEET_WIDTH, rows * height))
    for place, picture in enumerate(found):
        sheet.paste(picture, (place % columns * SHEET_WIDTH, place // columns * height))
    sheet.save(path.with_suffix(".jpg"), quality=85)
    return {
        "thumbnail": path.with_suffix(".webp").name,
        "spritesheet": path.with_suffix(".jpg").name,
        "sheet": {"columns": columns, "rows": rows, "frames": len(found), "width": SHEET_WIDTH, "height": height},
    }


def stub(found: Mapping[str, Any]) -> Video:
    """Return a Video with an upload's facts and no frames, for checks in a process that decodes nothing."""
    return Video(
        list, fps=found["fps"] or 24, num_frames=found["num_frames"], height=found["height"], width=found["width"]
    )


if __name__ == "__main__":
    answer(partial(look, mask="mask" in sys.argv[2:]), Path(sys.argv[1]), Image.DecompressionBombError)
