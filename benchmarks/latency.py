"""Latency per resolution: cold and warm, stage by stage, beside the floor and beside diffusers.

Every row is a process of its own: load, first request, some more, then each stage. With --together a side measures all
its sizes in one process, the stages alone: for GPUs, whose minutes are few. What was measured is on disk after each
row; what cannot be made, or does not fit, is a row with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plot, sides, true_size
from benchmarks.latency_report import bars, table
from benchmarks.machine import describe, keep, opened
from benchmarks.measure import FreshProcess, Refused, alternate, check_equal, fresh_process, peak_growth
from benchmarks.sides import Case, Ours, Side, at_case
from runtime.engines.store import cache_root
from runtime.machine import peaks_of
from runtime.model import choose_device, locate
from runtime.models import open_checkpoint
from runtime.planner import plan_request
from runtime.request import Request
from runtime.text import cache_folder

SIZES = {"480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1080), "vertical": (480, 832)}
STAGES = ("text", "step", "decode", "encode")
# What a row of --together takes, foreseen from its floor to tell whether it still fits: seconds to begin a process,
# and how many times the floor of ours and of others a step and a decode may take.
STARTING, SLOWER = 30.0, {True: 1.5, False: 3.0}
SEEN = 32  # every so many pixels of three frames are compared between the sides


@dataclass(frozen=True)
class Settings:
    """What holds for all rows of a run; `folder` is the model's."""

    model: str
    folder: Path
    device: torch.device
    dtype: str
    steps: int | None
    repeats: int
    threads: int
    together: bool = False

    @property
    def random(self) -> bool:
        """Whether the weights are random ones."""
        return self.model.endswith(true_size.SUFFIX)


@dataclass(frozen=True)
class Cell:
    """One row: a size by its name, a number of frames, and who makes it."""

    size: str
    frames: int
    side: str
    engine: str

    @property
    def name(self) -> str:
        """What it is called in the table."""
        who = self.engine if self.side == Ours.name else self.side
        return f"{self.size} x {self.frames}, {who}"


def add_command(commands: Any) -> None:
    """Add `latency` to the command line."""
    parser = commands.add_parser("latency", help="requests of many sizes, cold and warm, beside floor and diffusers")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", default="demo", help="demo (default), a folder, a published name, or a published name with random "
        f"weights of its true size, such as wan2.1-t2v-1.3b{true_size.SUFFIX}",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_sizes, help=f"some of {','.join(SIZES)}, or WIDTHxHEIGHT (default: the model's)"
    )
    parser.add_argument("--frames", type=_numbers, help="such as 1,17,81 (default: the model's)")
    parser.add_argument("--engines", default="eager", help="some of eager,cuda_graph,inductor,tensorrt (default eager)")
    parser.add_argument("--against", choices=list(sides.RIVALS), help="measure diffusers behind each size, as it is "
                        "written, compiled block by block, or both")  # fmt: skip
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: as many as PyTorch takes)")
    parser.add_argument("--repeats", type=int, default=3, help="warm samples of each number (default 3)")
    parser.add_argument("--together", action="store_true", help="all sizes of a side in one process, and the stages "
                        "alone: a request is put together from them")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no row after so long")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with the rows that this file lacks")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file of results")
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json); the plot lies beside it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure row after row, keep each, print the table; 130 where it was interrupted."""
    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    began, device = time.monotonic(), choose_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    asked = {key: getattr(args, key) for key in ("model", "steps", "dtype", "repeats", "together")}
    record, file = opened("latency", asked, describe(device), args.resume, args.json)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        if (calibrated := cache_root() / "machine").is_dir():
            shutil.copytree(calibrated, Path(scratch) / "cache" / "machine")
        os.environ["DIT_RUNTIME_CACHE"] = str(Path(scratch) / "cache")  # else a known prompt is not encoded
        folder = model_folder(args.model, Path(scratch) / "model")
        settings = Settings(
            args.model, folder, device, _dtype(args.dtype, device), args.steps, args.repeats, torch.get_num_threads(),
            args.together,
        )  # fmt: skip
        record["left_out"], status = [], 0
        try:
            with Processes(args.together) as processes:
                for cell in remaining(cells(args, folder), record):
                    left = math.inf if args.budget is None else args.budget - (time.monotonic() - began)
                    if left < processes.foreseen(cell, settings):
                        record["left_out"].append(cell.name)
                        print(f"{cell.name}: out of time; go on with --resume", file=sys.stderr)
                        continue
                    print(cell.name, file=sys.stderr, flush=True)
                    shutil.rmtree(cache_folder(), ignore_errors=True)  # the row before had the same prompts
                    record["rows"].append(compared(row(cell, settings, processes), record["rows"]))
                    keep(record, file)
                keep(record, file)
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept, go on with --resume", file=sys.stderr)
            status = 130
    print(table(record))
    if found := bars(record):
        picture = plot.stacked(f"{args.model}, {record['machine']['name']}: seconds per request, floor in black", found)
        print(f"\nsamples: {file}\nplot: {plot.save(file.with_suffix('.svg'), picture)}", file=sys.stderr)
    return status


def model_folder(name: str, scratch: Path) -> Path:
    """Return the folder of a model; of one with random weights, its configs are written there."""
    if not name.endswith(true_size.SUFFIX):
        return locate(name)
    true_size.write_configs(scratch, name.removesuffix(true_size.SUFFIX))
    return scratch


def cells(args: argparse.Namespace, folder: Path) -> Iterator[Cell]:
    """Yield the rows: for each size and number of frames our engines, then the peer; with --together side by side."""
    own = open_checkpoint(folder).spec.defaults
    peers = [Cell("", 0, side.name, "") for side in sides.rival(args.against)]
    who = [*(Cell("", 0, Ours.name, engine) for engine in args.engines.split(",")), *peers]
    sizes, frames = args.sizes or [f"{own.width}x{own.height}"], args.frames or [own.num_frames]
    found = [Cell(size, count, each.side, each.engine) for size, count, each in itertools.product(sizes, frames, who)]
    order = [(each.side, each.engine) for each in who]
    yield from sorted(found, key=lambda cell: order.index((cell.side, cell.engine))) if args.together else found


def remaining(wanted: Iterator[Cell], record: dict[str, Any]) -> Iterator[Cell]:
    """Yield the rows that a record lacks."""
    done = {key(each) for each in record["rows"]}
    return (cell for cell in wanted if key(vars(cell)) not in done)


class Processes:
    """Where rows are measured: in a new process each, or the same one for all rows of a side that follow each other."""

    def __init__(self, together: bool) -> None:
        self.together = together
        self.process: FreshProcess | None = None
        self.side: tuple[str, str] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def measured(self, kind: type[Side], cell: Cell, case: Case, settings: Settings) -> dict[str, Any]:
        """Return what `measured` or `stages_alone` does."""
        if not self.together:
            return fresh_process(measured, kind, case, settings)
        if self.side != (cell.side, cell.engine):
            self.end()
        self.side, self.process = (cell.side, cell.engine), self.process or FreshProcess()
        try:
            return self.process(stages_alone, kind, case, settings)
        except BrokenProcessPool:
            self.end()
            raise

    def end(self) -> None:
        """Let the process go, with all memory that it has."""
        if self.process is not None:
            self.process.end()
        self.process = self.side = None

    def foreseen(self, cell: Cell, settings: Settings) -> float:
        """Return the seconds that a row of a known GPU may take; 0 where nobody knows."""
        if not self.together:
            return 0.0
        try:
            least = floor(settings, asked_of(cell, settings))
        except ValueError:  # what cannot be made takes no time
            return 0.0
        if least is None or least["basis"] != "ideal":
            return 0.0
        starting = 0.0 if self.side == (cell.side, cell.engine) else STARTING
        times = {"step": settings.repeats + 2, "decode": settings.repeats + 1}
        spent = sum(count * least["predicted"][stage] for stage, count in times.items())
        return starting + SLOWER[cell.side == Ours.name] * spent


def asked_of(cell: Cell, settings: Settings) -> Request:
    """Return the request of a row; ValueError where the model does not make it."""
    width, height = pixels(cell.size)
    asked: dict[str, Any] = {"width": width, "height": height, "num_frames": cell.frames, "steps": settings.steps}
    return Request(prompt="as the take says", seed=7, **asked).resolved(open_checkpoint(settings.folder).spec)


def row(cell: Cell, settings: Settings, processes: Processes) -> dict[str, Any]:
    """Measure one row in another process; a row that cannot be has a reason instead."""
    found = {**vars(cell), "dtype": settings.dtype}
    spec = open_checkpoint(settings.folder).spec
    try:
        request = asked_of(cell, settings)
        found["floor"] = floor(settings, request)
    except ValueError as refused:  # by the request's checks, or by the planner where it cannot fit
        return found | {"reason": str(refused)}
    case = Case(settings.folder, spec, request, settings.dtype, cell.engine or "eager", settings.random)
    kinds: list[type[Side]] = [Ours, *sides.RIVALS["both"]]
    kind = next(each for each in kinds if each.name == cell.side)
    counts = {"steps": request.steps, "usual_steps": spec.defaults.steps}
    try:
        return found | counts | processes.measured(kind, cell, case, settings)
    except BrokenProcessPool:
        return found | {"reason": "its process was killed, most likely because the machine's memory was used up"}
    except Exception as error:  # of a process of its own: out of memory, no such engine here, a peer that cannot
        return found | {"reason": (str(error).splitlines() or [""])[0] or type(error).__name__}


def floor(settings: Settings, request: Request) -> dict[str, Any] | None:
    """Return the planner's seconds per stage: at a known GPU's peaks, or by this CPU's calibration; None otherwise.

    ValueError, the planner's answer, where the request does not fit, or not with all weights on the device.
    """
    gpu = None
    if settings.device.type == "cuda":
        if (known := peaks_of(torch.cuda.get_device_name(settings.device))) is None:
            return None
        gpu = known.name
    name = settings.model.removesuffix(true_size.SUFFIX) if settings.random else str(settings.folder)
    keys = ("width", "height", "num_frames", "steps", "guidance")
    planned = plan_request(name, gpu=gpu, dtype=settings.dtype, **{key: getattr(request, key) for key in keys})
    offload = planned.choices["offload"]
    if offload["text_encoder"] != "resident" or offload["blocks"] is not None:
        raise ValueError(
            f"it fits into {planned.memory / 2**30:.2f} GiB only by weights that come and go (text encoder "
            f"{offload['text_encoder']}, transformer {offload['transformer']}: {planned.most / 2**30:.2f} GiB, about "
            f"{planned.seconds['total']:.3g} s); all weights stay on the device here"
        )
    return {"basis": planned.basis, "machine": planned.machine, "predicted": planned.seconds}


def measured(kind: type[Side], case: Case, settings: Settings) -> dict[str, Any]:
    """Return the seconds and bytes of one side in a process that has done nothing else."""
    torch.set_num_threads(settings.threads)
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    began = time.perf_counter()
    side = kind(case, settings.device)
    loaded = time.perf_counter() - began
    frames: list[np.ndarray] = []
    takes = itertools.count(1)

    def first() -> None:
        frames.append(side.request(next(takes)))

    began = time.perf_counter()
    memory = peak_growth(first, settings.device)
    cold = time.perf_counter() - began
    seconds: dict[str, list[float]] = {"load": [loaded], "cold": [cold]}
    [seconds["total"]] = alternate([side.request], list(itertools.islice(takes, settings.repeats)))
    before = 1 if settings.device.type == "cpu" else 2  # a graph is recorded at the second
    missing = of_stages(side, dict.fromkeys(STAGES, before), takes, settings.repeats, seconds)
    return {"seconds": seconds, "memory": memory, "missing": missing, "shown": shown(frames[0])}


# Of a process that measures one side at several sizes; no take comes twice, since its text would be known.
_loaded: list[Side] = []
_takes = itertools.count(1)


def stages_alone(kind: type[Side], case: Case, settings: Settings) -> dict[str, Any]:
    """Return seconds and bytes of the stages; a later row of the same process finds its side loaded."""
    seconds: dict[str, list[float]] = {}
    if _loaded:
        at_case(_loaded[0], case)  # type: ignore[arg-type]
    else:
        torch.set_num_threads(settings.threads)
        if settings.device.type == "cuda":
            torch.cuda.set_device(settings.device)
        began = time.perf_counter()
        _loaded.append(kind(case, settings.device))
        seconds["load"] = [time.perf_counter() - began]
    [side] = _loaded
    frames: list[np.ndarray] = []

    def first() -> None:
        side.step(0)
        frames.append(side.decode(0))

    memory = peak_growth(first, settings.device)
    recording = case.engine == "cuda_graph" and settings.device.type == "cuda"
    before = {"text": 1, "step": 1 if recording else 0, "decode": 0}
    missing = of_stages(side, before, _takes, settings.repeats, seconds)
    return {"seconds": seconds, "memory": memory, "missing": missing, "shown": shown(frames[0])}


def of_stages(
    side: Side, before: dict[str, int], takes: Iterator[int], repeats: int, seconds: dict[str, list[float]]
) -> dict[str, str]:
    """Add the seconds of stages, after as many unmeasured calls as `before` says; return why one is missing."""
    missing = {}
    for stage, count in before.items():
        try:
            for _ in range(count):
                getattr(side, stage)(next(takes))
            [seconds[stage]] = alternate([getattr(side, stage)], list(itertools.islice(takes, repeats)))
        except (RuntimeError, MemoryError) as error:  # a stage by itself may take more memory than in a request
            missing[stage] = (str(error).splitlines() or [""])[0]
    return missing


def shown(frames: np.ndarray) -> str:
    """Return a few pixels of a clip, by which sides are compared."""
    count = len(frames)
    return frames[[0, count // 2, count - 1], ::SEEN, ::SEEN].tobytes().hex()


def compared(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row with how far its frames are from those of our first row of that size, in 255 on average.

    In float32 a row whose frames are not equal up to rounding loses its numbers.
    """
    ours = next((each for each in rows if "shown" in each and key(each)[:2] == key(row)[:2]), None)
    if ours is None or "shown" not in row:
        return row
    a, b = (np.frombuffer(bytes.fromhex(each["shown"]), np.uint8) for each in (ours, row))
    if row["dtype"] == "float32":
        try:
            check_equal("video", a, b)
        except Refused as refused:
            return {name: row[name] for name in (*vars(Cell("", 0, "", "")), "dtype")} | {"reason": str(refused)}
    return row | {"difference": float(np.abs(a.astype(int) - b.astype(int)).mean())}


def key(row: dict[str, Any]) -> tuple[str, int, str, str]:
    """Return what a row is of."""
    return row["size"], row["frames"], row["side"], row["engine"]


def pixels(size: str) -> tuple[int, int]:
    """Return (width, height) of a size by its name or its numbers."""
    if size in SIZES:
        return SIZES[size]
    width, _, height = size.partition("x")
    return int(width), int(height)


def _sizes(given: str) -> Sequence[str]:
    for size in given.split(","):
        width, _, height = size.partition("x")
        if size not in SIZES and not (width.isdecimal() and height.isdecimal()):
            raise argparse.ArgumentTypeError(f"{size!r}: legal are {', '.join(SIZES)}, or numbers such as 1024x1024")
    return given.split(",")


def _numbers(given: str) -> list[int]:
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r}: legal are numbers of frames such as 1,17,81") from None


def _dtype(given: str, device: torch.device) -> str:
    return given if given != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
