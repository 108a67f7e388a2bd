"""Frames -> mp4, webm, gif or png: one frame at a time, as they arrive; the same frames give the same bytes.

`Video.save` names the file, checks it and publishes it; here it is only written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from runtime.sound import BLOCK, CODECS, RATE, blocks

if TYPE_CHECKING:
    from runtime.video import Video

THREADS = 8  # fixed, because x264's output depends on the number of threads
BT709 = 1  # the code for matrix, primaries and transfer in ITU-T H.273
# swscale's flags (PyAV names them only from version 18): bicubic, accurate rounding, full chroma input
RGB_TO_YUV = 0x4 | 0x40000 | 0x4000


class Encoding(NamedTuple):
    """How a format with 4:2:0 colour is encoded; a higher quality number gives a smaller file."""

    codec: str
    container: str
    quality: int
    worst_quality: int
    codec_options: dict[str, str]
    container_options: dict[str, str]


# no mbtree: with x264's AVX-512 code it gives other bytes from run to run (seen with PyAV 18; not up to AVX2)
X264_OPTIONS = {"preset": "medium", "mbtree": "0"}
VP9_OPTIONS = {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
ENCODINGS = {
    ".mp4": Encoding("libx264", "mp4", 18, 51, X264_OPTIONS, {"movflags": "+faststart"}),
    ".webm": Encoding("libvpx-vp9", "webm", 24, 63, VP9_OPTIONS, {}),
}


def write_encoded(
    path: Path, frames: Iterable[np.ndarray], video: Video, encoding: Encoding, quality: int | None
) -> None:
    """Write frames, uint8 [H, W, 3] each, and the video's sounds; `quality` None takes the encoding's own."""
    crf = encoding.quality if quality is None else quality
    rate = exact_rate(video.fps)
    reformatter = VideoReformatter()
    with _open_for_writing(path, encoding.container, encoding.container_options) as container:
        options = {"crf": str(crf), **encoding.codec_options}
        stream = cast(av.VideoStream, container.add_stream(encoding.codec, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        context = stream.codec_context
        context.time_base, context.thread_count = 1 / rate, THREADS
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        sound = None
        if video.sounds:
            sound = cast(av.AudioStream, container.add_stream(CODECS[path.suffix.lower()], rate=RATE, layout="stereo"))
        container.start_encoding()
        for index, array in enumerate(frames):
            frame = reformatter.reformat(
                _rgb_frame(array),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=RGB_TO_YUV,
            )
            frame.pts, frame.time_base, frame.duration = index, 1 / rate, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_sound(container, sound, video)


def _write_sound(container: OutputContainer, stream: av.AudioStream, video: Video) -> None:
    fifo = av.AudioFifo()  # encoders take blocks of their own size
    for index, block in enumerate(blocks(video.sounds, video.num_frames / video.fps)):
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="stereo")
        piece.sample_rate, piece.pts, piece.time_base = RATE, index * BLOCK, Fraction(1, RATE)
        fifo.write(piece)
        for frame in fifo.read_many(stream.codec_context.frame_size or BLOCK):
            container.mux(stream.encode(_as_taken(frame, stream)))
    if (rest := fifo.read()) is not None:
        container.mux(stream.encode(_as_taken(rest, stream)))
    container.mux(stream.encode(None))


def _as_taken(frame: av.AudioFrame, stream: av.AudioStream) -> av.AudioFrame:
    """Return the same samples in the encoder's own format."""
    wanted = stream.codec_context.format.name
    if frame.format.name == wanted:
        return frame
    (found,) = av.AudioResampler(format=wanted, layout="stereo", rate=RATE).resample(frame)
    return found


def write_gif(path: Path, frames: Iterable[np.ndarray], video: Video) -> None:
    """Write frames, each with a palette of its own; it loops forever."""
    rate, tick = exact_rate(video.fps), Fraction(1, 100)
    starts = [round(index / rate / tick) for index in range(video.num_frames + 1)]
    options = {"loop": "0", "final_delay": str(starts[-1] - starts[-2])}
    graph = _palette_graph(video.width, video.height)
    with _open_for_writing(path, "gif", options) as container:
        stream = cast(av.VideoStream, container.add_stream("gif", rate=100))
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "pal8"
        stream.codec_context.time_base, stream.codec_context.thread_count = tick, 1
        container.start_encoding()
        for index, array in enumerate(chain(frames, [None])):
            frame = None if array is None else _rgb_frame(array)
            if frame is not None:
                frame.pts, frame.time_base = starts[index], tick
            graph.vpush(frame)
            for painted in _pull(graph):
                painted.time_base = tick
                container.mux(stream.encode(painted))
        container.mux(stream.encode(None))


def _palette_graph(width: int, height: int) -> av.filter.Graph:
    """Reduce each frame to a palette of its own: a common one would need every frame before the first is written."""
    graph = av.filter.Graph()
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base=1/100:pixel_aspect=1/1")
    split, sink = graph.add("split"), graph.add("buffersink")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    paint = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=3")  # a fixed pattern: it does not crawl over time
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(paint, 1, 0)
    palette.link_to(paint, 0, 1)
    paint.link_to(sink)
    graph.configure()
    return graph


def _pull(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):  # it wants more input, or has given all
            return
        yield frame


def write_png(path: Path, frames: Iterable[np.ndarray], numbered: bool) -> None:
    """Write one frame into a file, or `numbered` ones into a new folder."""
    if numbered:
        path.mkdir()
    for index, array in enumerate(frames):
        context = av.CodecContext.create("png", "w")
        context.width, context.height, context.pix_fmt = array.shape[1], array.shape[0], "rgb24"
        context.time_base, context.thread_count = Fraction(1), 1
        context.sample_aspect_ratio = Fraction(1)
        context.options = {"pred": "mixed"}
        data = b"".join(bytes(packet) for frame in (_rgb_frame(array), None) for packet in context.encode(frame))
        with open(path / f"{index:05d}.png" if numbered else path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _open_for_writing(path: Path, container_format: str, options: dict[str, str]) -> Iterator[OutputContainer]:
    options = {"fflags": "+bitexact", **options}  # leaves out the library's version and random identifiers
    container = av.open(str(path), "w", format=container_format, options=options)
    try:
        yield container
    except BaseException:
        with suppress(av.FFmpegError):  # closing a file that is being given up; the first exception is the cause
            container.close()
        raise
    container.close()  # writes what is buffered: a full disk may show only here


def _rgb_frame(array: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")


def exact_rate(fps: float) -> Fraction:
    """The exact frame rate that a rounded one stands for: 23.976 and 23.98 are 24000/1001, 12.5 is 25/2."""
    for nominal in (24, 30, 48, 60, 120):
        broadcast = Fraction(nominal * 1000, 1001)
        if abs(fps - broadcast) < 0.005:
            return broadcast
    return Fraction(fps).limit_denominator(1001)
