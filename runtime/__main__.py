"""The command line: python -m runtime generate | ... | remote | verify | plan | build | info | embed; the rest: cli/.

Exit codes: 0 done, 2 the request or its surroundings cannot work (one sentence says what to do), 1 a fault of ours,
128 + N ended by the signal N (130: Ctrl-C); of verify also 3 no credentials, 4 tampered with, 5 not signed by whom
--trust names. No traceback without --debug, and no partial output file in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from runtime.cli.arguments import Parser, parse_number, parse_size, parse_sizes, parse_whole
from runtime.cli.remote import add_remote
from runtime.cli.verbs import add_verbs

PACKAGE = Path(__file__).parent
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """A signal that ends the process has come; what is under way is cleaned up first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    try:
        try:
            return run(parser().parse_args(arguments))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what was not written is for nobody
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Run what was asked for; return the exit code."""
    warnings.showwarning = show_warning
    try:
        with ending():
            return options.run(options) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; no partial file is left", file=sys.stderr)
        return 128 + signal.SIGINT
    except Ended as error:
        print("\nended by a signal; no partial file is left", file=sys.stderr)
        return 128 + int(error.args[0])
    except BrokenPipeError:
        raise
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        code, sentence = explain(error)
        print(f"error: {sentence}", file=sys.stderr)
        return code


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what is under way as Ctrl-C does, where nobody else has taken or ignores them."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    own = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        own = []
    for number in own:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(prog="python -m runtime", description="Video diffusion transformers, run truthfully.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    faults = Parser(add_help=False)
    faults.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared = Parser(add_help=False, parents=[faults])
    shared.add_argument(
        "--model", default="demo", metavar="NAME",
        help="demo (default), a folder, a cached repository id, or a short name such as wan2.1-t2v-1.3b",
    )  # fmt: skip

    add_verbs(commands, shared)
    add_remote(commands)

    view = commands.add_parser("decode", parents=[shared], help="make a video of kept latents")
    view.set_defaults(run=decode)
    view.add_argument("latents", help="a file that generate --latents wrote")
    view.add_argument("-o", "--output", default="video.mp4", metavar="PATH", help=".mp4 .webm .gif .png or a folder")
    view.add_argument("--fps", type=parse_number, metavar="F", help="frames per second (default: as asked for then)")
    view.add_argument("--tile", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels decoded at once, halo included")
    view.add_argument("--dtype", default="float32", help="float32 (default, exact), bfloat16, float16")
    view.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    view.add_argument("--quiet", action="store_true", help="print nothing but errors")

    ahead = commands.add_parser("plan", parents=[shared], help="say what a request will take, without weights")
    ahead.set_defaults(run=plan)
    ahead.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels, such as 832x480")
    ahead.add_argument("--frames", type=parse_whole, metavar="N", help="number of frames, such as 81")
    ahead.add_argument("--seconds", type=parse_number, metavar="S", help="length, instead of --frames")
    ahead.add_argument("--window", type=parse_whole, metavar="N", help="frames made at once in a long video")
    ahead.add_argument("--steps", type=parse_whole, metavar="N", help="denoising steps")
    ahead.add_argument("--guidance", type=parse_number, metavar="G", help="guidance scale; 1 is none")
    ahead.add_argument("--gpu", metavar="NAME", help="h200 h100 a100 l40s 4090 5090, or cpu (default: this machine)")
    ahead.add_argument("--memory", metavar="SIZE", help="bytes that may be used, such as 24GiB")
    ahead.add_argument("--tile", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels decoded at once, halo included")
    ahead.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    ahead.add_argument("--precision", choices=("full", "fp8"), default="full", help="of the transformer's weights")
    ahead.add_argument("--anew", action="store_true", help="measure this machine again, for all plans from now on")
    ahead.add_argument("--json", action="store_true", help="print a JSON object")

    make = commands.add_parser("build", parents=[shared], help="make engines ahead of time; look after their store")
    make.set_defaults(run=build)
    make.add_argument("--size", type=parse_sizes, default=[], metavar="SIZES", help="pixels, such as 832x480,1280x720")
    make.add_argument("--frames", type=parse_whole, metavar="N", help="the most frames, such as 81")
    make.add_argument("--engine", default="tensorrt", help="tensorrt (default), inductor")
    make.add_argument("--gpu", metavar="ARCH", help="such as sm89 (default: the machine's GPU)")
    make.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    make.add_argument(
        "--lora", action="append", default=[], metavar="[high=|low=]FILE[:STRENGTH]",
        help="a LoRA that the weights have, as generate will ask for it; may be given again",
    )  # fmt: skip
    make.add_argument("--refit", action="store_true", help="take the weights from the model when it is loaded")
    make.add_argument("--stream", action="store_true", help="weights may stay in the host's memory")
    make.add_argument(
        "--package", metavar="FOLDER", help="with inductor: a step and the decoder for C++ without Python"
    )
    look = make.add_mutually_exclusive_group()
    look.add_argument("--list", action="store_true", help="say what the store holds")
    look.add_argument("--check", action="store_true", help="read all of the store and say what is damaged")
    look.add_argument("--prune", action="store_true", help="remove what is damaged and what is over --keep")
    make.add_argument(
        "--keep", type=parse_number, metavar="GIB", help="with --prune: GiB of the most recently used to keep"
    )

    check = commands.add_parser("verify", parents=[faults], help="say where a file comes from, by its credentials")
    check.set_defaults(run=verify)
    check.add_argument("file", type=Path, help="mp4, png, gif, jpeg or webp")
    check.add_argument("--trust", type=Path, metavar="FILE", help="certificates (PEM) of whom you trust")
    check.add_argument("--json", action="store_true", help="print a JSON object")

    learn = commands.add_parser("calibrate", parents=[shared], help="measure what --quality may save of a model")
    learn.set_defaults(run=calibrate)
    learn.add_argument("--prompts", required=True, metavar="FILE", help="a prompt in each line; 20 to 30 are good")
    learn.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels, such as 832x480")
    learn.add_argument("--frames", type=parse_whole, metavar="N", help="number of frames, such as 81")
    learn.add_argument("--steps", type=parse_whole, metavar="N", help="denoising steps")
    learn.add_argument("--guidance", type=parse_number, metavar="G", help="guidance scale; 1 is none")
    learn.add_argument("--negative", default="", metavar="TEXT", help="what the videos must not show")
    learn.add_argument(
        "--precision", choices=("auto", "full", "fp8"), default="auto",
        help="fp8: also what layers in 8 bits cost, simulated where need be; auto: where they save time (default)",
    )  # fmt: skip
    learn.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    learn.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    learn.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")

    tell = commands.add_parser("info", parents=[shared], help="say what a model is and what of it is missing")
    tell.set_defaults(run=info)

    host = commands.add_parser("embed", parents=[faults], help="say where C++ programs find this runtime")
    host.set_defaults(run=embed)
    host.add_argument("--cmake-dir", action="store_true", help="print the folder for CMake's -Ddit_runtime_DIR")
    return top


def decode(options: argparse.Namespace) -> None:
    """Make a video of latents that were kept."""
    from runtime.canvas import framed
    from runtime.cli.making import check_apart
    from runtime.cli.progress import Progress
    from runtime.latents import load_latents
    from runtime.video import check_writable

    check_apart([options.output], [options.latents])
    check_writable(options.output)
    latents, notes = load_latents(options.latents)
    if (kept := notes.get("model")) and kept != "demo" and options.model == "demo":
        raise ValueError(f"{options.latents} holds latents of {kept}; name that model with --model")

    import runtime
    from runtime.model import load_autoencoder_alone

    model = load_autoencoder_alone(options.model, device=options.device)
    tile = options.tile and (options.tile[1], options.tile[0])
    fps = options.fps or float(notes.get("fps", model.spec.defaults.fps))
    video = runtime.decode(model, latents, tile=tile, dtype=options.dtype, fps=fps)
    video = framed(video, int(notes.get("height", video.height)), int(notes.get("width", video.width)))
    with Progress("decoding", "frame", quiet=options.quiet) as progress:
        path = video.save(options.output, on_frame=progress)
    if not options.quiet:
        print(f"{path}: {video.num_frames} frames, {video.width}x{video.height}, {video.fps:g} fps")


def plan(options: argparse.Namespace) -> None:
    """Print what a request will take."""
    from runtime.planner import plan_request
    from runtime.prediction import table

    width, height = options.size or (None, None)
    found = plan_request(
        options.model, width=width, height=height, num_frames=options.frames, seconds=options.seconds,
        window=options.window, steps=options.steps, guidance=options.guidance, gpu=options.gpu,
        memory=options.memory, dtype=options.dtype,
        tile=options.tile and (options.tile[1], options.tile[0]), precision=options.precision,
        anew=options.anew,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2) if options.json else table(found))


def build(options: argparse.Namespace) -> None:
    """Make engines ahead of time, or look after the store."""
    from runtime.cli import builds
    from runtime.engines.builder import Options
    from runtime.lora import Lora

    if options.list:
        lines = builds.listing()
    elif options.check:
        lines = builds.check()
    elif options.prune:
        lines = builds.prune(options.keep)
    else:
        lines = builds.build(
            options.model, options.size, options.frames, engine=options.engine, gpu=options.gpu,
            options=Options(refit=options.refit, stream=options.stream), package=options.package,
            how={"dtype": options.dtype, "loras": [Lora.parse(text) for text in options.lora]},
        )  # fmt: skip
    print("\n".join(lines))


def verify(options: argparse.Namespace) -> int:
    """Print what a file's credentials say; return the exit code."""
    from runtime.provenance import read, told

    found = read(options.file, None if options.trust is None else options.trust.read_bytes())
    print(json.dumps(found.to_dict(), indent=2) if options.json else told(options.file.name, found))
    if found.state == "valid":
        return 5 if options.trust is not None and not found.trusted else 0
    return 4 if found.state == "tampered" else 3


def calibrate(options: argparse.Namespace) -> None:
    """Measure a model's ways to skip steps, and keep them where --quality finds them."""
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompts} is no text ({error}); legal: a prompt in each line, UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]

    import runtime
    from runtime import budget, rungs

    width, height = options.size or (None, None)
    request = runtime.Request(
        prompt="as the file says", negative_prompt=options.negative, width=width, height=height,
        num_frames=options.frames, steps=options.steps, guidance=options.guidance,
    )  # fmt: skip
    model = runtime.load(options.model, device=options.device, dtype=options.dtype)
    fp8 = {"auto": None, "full": False, "fp8": True}[options.precision]
    found = rungs.calibrate(model, request, prompts, (lambda text: None) if options.quiet else print, fp8=fp8)
    print(rungs.table(found))
    print(f"kept in {budget.write(model, found)}")


def info(options: argparse.Namespace) -> None:
    """Print what a model is."""
    from runtime.info import describe
    from runtime.model import locate
    from runtime.models import open_checkpoint

    print(describe(open_checkpoint(locate(options.model))))


def embed(options: argparse.Namespace) -> None:
    """Print where the C++ side lies: installed beside this file, or in the sources."""
    places = [place for place in (PACKAGE / "embed", PACKAGE.parent / "csrc" / "embed") if place.is_dir()]
    if not places:
        raise FileNotFoundError(f"{PACKAGE / 'embed'} is not there; install dit-runtime again, whole")
    print(places[0] / "cmake" if options.cmake_dir else f"{places[0]}: include/dit_runtime.hpp says how; see examples/")


def explain(error: Exception) -> tuple[int, str]:
    """Return (exit code, one sentence): 2 for what the user or the machine's state caused, 1 for our own faults."""
    sentence = " ".join(str(error).split())
    if isinstance(error, OSError) or (isinstance(error, ValueError) and raised_here(error)):
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return 2, sentence
    from runtime.decoding import out_of_memory

    if out_of_memory(error):
        return 2, "out of memory; ask for a smaller --size or fewer --frames, or use a device with more memory"
    return 1, f"{type(error).__name__}: {sentence} (a fault of dit-runtime: run again with --debug and report it)"


def raised_here(error: Exception) -> bool:
    """Tell whether our own checks raised it, not a library that we used wrongly."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning of ours as one line."""
    if issubclass(category, UserWarning):
        print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
