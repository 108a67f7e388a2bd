"""What a file is by its first bytes, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# The first bytes of what is read, under the suffix of each.
KINDS: dict[str, Callable[[bytes], bool]] = {
    "png": lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"),
    "jpeg": lambda head: head.startswith(b"\xff\xd8\xff"),
    "webp": lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
    "mp4": lambda head: head[4:8] == b"ftyp",
    "webm": lambda head: head.startswith(b"\x1aE\xdf\xa3"),
    "gif": lambda head: head[:6] in (b"GIF87a", b"GIF89a"),
}
# What FFmpeg may open: a playlist could name other files and addresses, so only containers, only from disk.
READING = {"format_whitelist": "mov,matroska,gif,png_pipe,jpeg_pipe,webp_pipe", "protocol_whitelist": "file"}
# Its reader of each kind, named: left to guess, it takes photos of more than 2 kB for what their suffix says.
READERS = {
    "png": "png_pipe", "jpeg": "jpeg_pipe", "webp": "webp_pipe", "mp4": "mov", "webm": "matroska", "gif": "gif",
}  # fmt: skip
MEDIA_TYPES = {kind: f"{'video' if kind in ('mp4', 'webm') else 'image'}/{kind}" for kind in KINDS}


def sniff(head: bytes) -> str | None:
    """Return what a file is by its first 16 bytes; None for what is not read."""
    return next((kind for kind, fits in KINDS.items() if fits(head)), None)


def kind_of(path: Path) -> str | None:
    """Return what a file is by its content; None for what is not read."""
    with path.open("rb") as handle:
        return sniff(handle.read(16))
