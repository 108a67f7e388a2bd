"""Latents -> frames, streamed as each latent frame is decoded; and frames -> latents, the way back.

What runs out of memory steps down a ladder by itself: whole frames, tiles, smaller tiles, the CPU. All rungs give the
same numbers, so frames that are out stay, and a decode goes on where it was; an encode begins anew.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from runtime.latents import check_latents
from runtime.machine import SLACK, free_memory
from runtime.model import Model, choose_dtype
from runtime.models.spec import nearest_counts, nearest_multiples
from runtime.models.tiles import finer
from runtime.offload import give_back_memory
from runtime.receipt import Receipt
from runtime.trace import Stages, mark, note, recording, span
from runtime.video import Video

Tile = tuple[int, int]  # (height, width) in pixels
ROUNDED = "decoded in 16 bits; the dtype float32 decodes in float32"
# Of PyTorch's errors without a class of their own: its host allocator, oneDNN's or the C++ library's, cuDNN and cuBLAS.
NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "could not allocate", "ALLOC_FAILED", "out of memory")
AHEAD = 2  # chunks decoded before the writer asks: the device does not wait for the encoder, and memory is bounded


def decode(
    model: Model,
    latents: torch.Tensor,
    *,
    tile: Tile | None = None,
    dtype: str | torch.dtype | None = None,
    fps: float | None = None,
    receipt: Receipt | None = None,
) -> Video:
    """Return the video of latents [C, T, H, W] or [1, C, T, H, W], decoded frame by frame as it is iterated.

    `tile` bounds what is decoded at once, halo included (None: as much as fits); the numbers are the same. `dtype` is
    the decoder's (None: bfloat16 where a GPU runs the model in 16 bits, else float32, as published). `fps` is frames
    per second (the model's own where None). Raises ValueError for latents of another shape or type, or with NaN or
    infinity, and for a tile that holds nothing but halo; iterating raises it for numbers that a dtype cannot hold.
    """
    spec = model.spec
    latents = check_latents(latents, (spec.latent_channels, None, None, None), "latents")
    _, _, time, height, width = latents.shape
    kind = model.vae_dtype if dtype is None else choose_dtype(dtype, model.device)
    if receipt is not None and kind != torch.float32 and ROUNDED not in receipt.approximations:
        receipt.approximations.append(ROUNDED)
    model.vae.decode_stream(latents, checked(tile))  # refuses a bad tile now, not at the first frame
    stages: Stages = {} if receipt is None else receipt.stages
    notes: list[str] = [] if receipt is None else receipt.notes
    tried: list[str] = [] if receipt is None else receipt.decoding

    def frames() -> Iterator[np.ndarray]:
        def chunks() -> Iterator[np.ndarray]:
            first = fitting(model, (time, height, width), kind) if tile is None else tile
            return timed(decode_chunks(model, latents, first, kind, notes, tried), stages)

        # On a CPU decoder and encoder share the cores, and a second thread's OpenMP workers only get in the way.
        for chunk in chunks() if model.device.type == "cpu" else ahead(chunks):
            yield from chunk

    return Video(
        frames,
        fps=spec.defaults.fps if fps is None else fps,
        num_frames=1 + (time - 1) * spec.stride[0],
        height=height * spec.stride[1],
        width=width * spec.stride[2],
        latents=latents[0],
        receipt=receipt,
    )


def timed(chunks: Iterator[np.ndarray], stages: Stages) -> Iterator[np.ndarray]:
    """Yield the chunks, each step taken in the span "decode" of `stages`."""
    for number in count():
        with recording(stages), span("decode", memory=True, waits=False, number=number):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def checked(tile: Tile | None) -> Tile | None:
    """Return a tile; ValueError for what is not two whole numbers."""
    legal = isinstance(tile, tuple | list) and len(tile) == 2 and all(type(side) is int for side in tile)
    if tile is not None and not legal:
        raise ValueError(f"tile is {tile!r}; legal: (height, width) in whole pixels, or None")
    return tile


def fitting(
    model: Model, latents: tuple[int, int, int], dtype: torch.dtype, stage: Literal["decode", "encode"] = "decode"
) -> Tile | None:
    """Return the tile to begin with for latents of [T, H, W]: what the model was loaded for, where it has a budget.

    Else whole frames (None) where the memory that they are predicted to take is free now, or the largest tile whose is;
    where none is, what takes least.
    """
    if model.memory is not None:
        return model.tile
    _, down, across = model.spec.stride
    free, parked = free_memory(model.device), model.device.type != "cpu"
    weigh = model.costs.decode if stage == "decode" else model.costs.encode
    needed: dict[Tile | None, float] = {}
    for tile in (None, *finer(latents[1] * down, latents[2] * across, model.vae.tile_of)):
        needed[tile] = weigh(latents, tile, dtype.itemsize, parked=parked).live * (1 + SLACK)
        if needed[tile] <= free:
            return tile
    return min(needed, key=needed.__getitem__)


@dataclass(frozen=True)
class Rung:
    """One way to decode, by how much memory it takes."""

    name: str
    tile: Tile | None
    on_cpu: bool = False


def ladder(model: Model, height: int, width: int, tile: Tile | None) -> list[Rung]:
    """Return the rungs for frames of height x width pixels, from the asked one down."""
    rungs = [Rung("whole frames" if tile is None else f"tiles of {tile[0]}x{tile[1]}", tile)]
    for smaller in finer(height, width, model.vae.tile_of, None if tile is None else tile[0] * tile[1]):
        rungs.append(Rung(f"tiles of {smaller[0]}x{smaller[1]}", smaller))
    if model.device.type != "cpu":
        rungs.append(Rung("the CPU", tile, on_cpu=True))
    return rungs


def decode_chunks(
    model: Model, latents: torch.Tensor, tile: Tile | None, dtype: torch.dtype, notes: list[str], tried: list[str]
) -> Iterator[np.ndarray]:
    """Yield uint8 frames [F, H, W, 3]: one for the first latent frame, then as many as the time stride.

    The rungs' names are added to `tried`, and why one was left to `notes`. Raises the last rung's out-of-memory error.
    """
    _, down, across = model.spec.stride
    rungs = ladder(model, latents.shape[3] * down, latents.shape[4] * across, tile)
    done = 0
    for rung, below in zip(rungs, [*rungs[1:], None], strict=True):
        tried.append(rung.name)
        try:
            for chunk in _decode_on(model, latents, rung, dtype, done):
                yield chunk
                done += 1
            return
        except (RuntimeError, MemoryError) as error:
            if below is None or not out_of_memory(error):
                raise
            notes.append(
                f"decoding {rung.name} ran out of memory at latent frame {done} of {latents.shape[2]}; went on with "
                f"{below.name}"
            )
        give_back_memory()  # in pieces, what is free may be of no use


@torch.inference_mode()
def _decode_on(model: Model, latents: torch.Tensor, rung: Rung, dtype: torch.dtype, start: int) -> Iterator[np.ndarray]:
    device = torch.device("cpu") if rung.on_cpu else model.device
    network = model.autoencoder(device, dtype)
    lag = 0 if device.type == "cpu" else 1  # a GPU works at the next frames while these come over
    coming: deque[Callable[[], np.ndarray]] = deque()
    for number, pixels in enumerate(network.decode_stream(latents.to(device), rung.tile, start), start):
        coming.append(bytes_of(pixels[0], f"latent frame {number}, decoded in {str(dtype).removeprefix('torch.')},"))
        if len(coming) > lag:
            yield coming.popleft()()
    yield from (each() for each in coming)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or in the host's allocator."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)


def ahead(make: Callable[[], Iterator[Any]], depth: int = AHEAD) -> Iterator[Any]:
    """Yield what `make()` yields, taken in a thread of its own at most `depth` items ahead.

    An error there is raised here; closing this generator stops the thread at its next item.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, item: Any = None) -> bool:
        while not stopped.is_set():
            with suppress(queue.Full):
                items.put((kind, item), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in make():
                if not put("item", item):
                    return
            put("end")
        except BaseException as error:
            put("error", error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name="decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = items.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3], rounded to nearest; ValueError for NaN."""
    return bytes_of(pixels, "the picture")()


def bytes_of(pixels: torch.Tensor, what: str) -> Callable[[], np.ndarray]:
    """Begin `to_bytes` and return what waits for it; from a GPU to page-locked memory, so that the host goes on."""
    with mark("decode/bytes"):
        levels = pixels.float().add(1.0).mul_(127.5).clamp_(0, 255).round_()
        lost = levels.isnan().any()
        levels = levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()
        there, copied = [levels, lost], None
        if levels.device.type == "cuda":
            there = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in (levels, lost)]
            for each, place in zip((levels, lost), there, strict=True):
                place.copy_(each, non_blocking=True)
            copied = torch.cuda.current_stream(levels.device).record_event()

    def wait() -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        if there[1]:
            raise ValueError(f"{what} holds NaN; legal: latents and a dtype whose numbers hold it, such as float32")
        # page-locked memory is scarce, and frames may be kept
        return there[0].cpu().numpy() if copied is None else np.array(there[0].numpy())

    return wait


def encode(
    model: Model, frames: np.ndarray | Video, *, tile: Tile | None = None, dtype: str | torch.dtype | None = None
) -> torch.Tensor:
    """Return the latents [C, T, H, W] float32, normalised as the sampler sees them, of uint8 frames [F, H, W, 3].

    A Video is taken frame by frame, so memory does not grow with its length; where memory runs out, from its beginning
    again. `tile` and `dtype` as in `decode`. Raises ValueError for frames whose size or number the model cannot take.
    """
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            given = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames are {given}; legal: a numpy array of uint8 [frames, height, width, 3]")
        count, height, width, _ = frames.shape
    elif isinstance(frames, Video):
        count, height, width = frames.num_frames, frames.height, frames.width
    else:
        raise ValueError(f"frames are {type(frames).__name__}; legal: a Video, or a numpy array of uint8")
    _check_clip(model, count, height, width)
    kind = model.vae_dtype if dtype is None else choose_dtype(dtype, model.device)
    time, down, across = model.spec.stride
    latents = (count + time - 1) // time, height // down, width // across
    with torch.inference_mode():
        found = encode_chunks(
            model, lambda: _pixel_chunks(iter(frames), time, model.device), latents, checked(tile), kind
        )
        joined = found[0].float().cpu()
    return joined.clone()


def encode_chunks(
    model: Model, chunks: Callable[[], Iterable[torch.Tensor]], latents: tuple[int, int, int], tile: Tile | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return latents [1, C, *latents] of chunks [1, 3, F, H, W] in [-1, 1], which `chunks()` yields, on some device.

    `latents` is [T, H, W]. Without a tile, what fits; where memory runs out, anew on the next rung, which is noted.
    """
    _, down, across = model.spec.stride
    first = fitting(model, latents, dtype, "encode") if tile is None else tile
    rungs = ladder(model, latents[1] * down, latents[2] * across, first)
    for rung, below in zip(rungs, [*rungs[1:], None], strict=True):
        device = torch.device("cpu") if rung.on_cpu else model.device
        try:
            return torch.cat(list(model.autoencoder(device, dtype).encode_stream(chunks(), rung.tile)), dim=2)
        except (RuntimeError, MemoryError) as error:
            if below is None or not out_of_memory(error):
                raise
            note(f"encoding {rung.name} ran out of memory; began anew with {below.name}")
        give_back_memory()
    raise AssertionError("the last rung returns or raises")


def _check_clip(model: Model, count: int, height: int, width: int) -> None:
    time, down, across = model.spec.stride
    if height % down or width % across or not height or not width:
        widths, heights = nearest_multiples(width, across), nearest_multiples(height, down)
        raise ValueError(
            f"the frames are {width}x{height}; {model.spec.name} takes widths in multiples of {across} and heights of "
            f"{down}: scale or crop to {widths[0]}x{heights[0]} or {widths[1]}x{heights[1]}"
        )
    if count < 1 or (count - 1) % time:
        below, above = nearest_counts(count, time)
        raise ValueError(f"there are {count} frames; {model.spec.name} takes 1 + {time} * n: give {below} or {above}")


def _pixel_chunks(frames: Iterator[np.ndarray], step: int, device: torch.device) -> Iterator[torch.Tensor]:
    """uint8 frames [H, W, 3] -> chunks [1, 3, F, H, W] in [-1, 1]: one frame, then `step` at a time."""
    chunk: list[np.ndarray] = []
    size = 1
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == size:
            pixels = torch.from_numpy(np.stack(chunk)).to(device).permute(3, 0, 1, 2)
            yield pixels.unsqueeze(0).float().div_(127.5).sub_(1.0)
            chunk, size = [], step
