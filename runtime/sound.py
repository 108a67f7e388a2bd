"""The sound of kept frames: read from their clips, put where they stand in the result, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from runtime.kinds import READING

RATE = 48000  # samples per second of what is written, in two channels
BLOCK = 1024  # samples that are encoded at once
CODECS = {".mp4": "aac", ".webm": "libopus"}


@dataclass(frozen=True)
class Sound:
    """`seconds` of a file's sound from `start` on, heard from `at` seconds on."""

    path: Path
    start: float
    seconds: float
    at: float = 0.0


def cut(sounds: Sequence[Sound], start: float, seconds: float, at: float) -> tuple[Sound, ...]:
    """Return what is heard of `sounds` in `seconds` from `start` on, moved so that it begins at `at`."""
    found = []
    for sound in sounds:
        first, last = max(start, sound.at), min(start + seconds, sound.at + sound.seconds)
        if last > first:
            skipped = sound.start + first - sound.at
            found.append(replace(sound, start=skipped, seconds=last - first, at=at + first - start))
    return tuple(found)


def blocks(sounds: Sequence[Sound], seconds: float) -> Iterator[np.ndarray]:
    """Yield float32 [2, BLOCK] of all that is heard in `seconds`, the last padded with silence."""
    total = round(seconds * RATE)
    ordered = sorted(sounds, key=lambda sound: sound.at)
    waiting = np.zeros((2, 0), np.float32)
    done = 0
    for sound in [*ordered, None]:
        until = total if sound is None else min(total, round(sound.at * RATE))
        gap = np.zeros((2, max(0, until - done)), np.float32)
        pieces = [gap] if sound is None else [gap, *_samples(sound)]
        for piece in pieces:
            piece = piece[:, : total - done]
            done += piece.shape[1]
            waiting = np.concatenate([waiting, piece], axis=1)
            while waiting.shape[1] >= BLOCK:
                yield waiting[:, :BLOCK]
                waiting = waiting[:, BLOCK:]
    if waiting.shape[1]:
        yield np.pad(waiting, ((0, 0), (0, BLOCK - waiting.shape[1])))


def _samples(sound: Sound) -> Iterator[np.ndarray]:
    """Yield exactly the samples of a sound, float32 [2, n]; silence where the file ends before."""
    left, skip = round(sound.seconds * RATE), round(sound.start * RATE)
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
    with av.open(str(sound.path), options=READING) as container:
        frames = (piece for frame in container.decode(audio=0) for piece in resampler.resample(frame))
        for frame in frames:
            piece = frame.to_ndarray()
            dropped = min(skip, piece.shape[1])
            skip -= dropped
            piece = piece[:, dropped : dropped + left]
            left -= piece.shape[1]
            yield piece
            if not left:
                return
    yield np.zeros((2, left), np.float32)
