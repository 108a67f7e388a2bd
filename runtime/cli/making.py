"""What the command line does with a request: check where it is to be written, open the model, make, write, tell.

What can be refused is refused before a model is loaded.
"""

from __future__ import annotations

import json
import os
import warnings
from argparse import Namespace as Options
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.certificates import Signer
    from runtime.model import Model
    from runtime.request import Request
    from runtime.video import Video


def make(options: Options) -> None:
    """Make what a verb asks for, and write it."""
    from runtime.video import check_writable

    request = options.verb.request(options)
    check_apart(written(options), given(options, request))
    check_writable(options.output)
    signer_of(options)
    if options.preview:
        check_writable(options.preview)
    for what in ("receipt", "latents"):
        if path := getattr(options, what, None):
            check_file(path, what)

    if options.measure and (request.clips or request.storyboard):
        raise ValueError("--measure is given, and the video is made of clips; legal: for videos of a prompt alone")
    if options.measure and options.precision == "fp8":
        raise ValueError(
            "--measure is given, and the weights are to be in 8 bits alone, with which no exact twin can be made; "
            "legal: --precision full, where --quality takes layers in 8 bits if they save time"
        )
    model = open_model(options, request)
    resolved = request.resolved(model.spec)
    if getattr(options, "draft", False):
        resolved = resolved.drafted(model.spec)
    write(options, model, resolved)


def finish(options: Options) -> None:
    """Make the final video of a draft, which is made again from its receipt."""
    from runtime.pipeline import final_request
    from runtime.request import Request
    from runtime.video import check_writable

    draft = Request.from_receipt(options.draft)
    check_apart(written(options), [options.draft, *given(options, draft)])
    check_writable(options.output)
    signer_of(options)
    if options.receipt:
        check_file(options.receipt, "receipt")

    model = open_model(options, draft)
    check_maker(options.draft, model)
    width, height = options.size or (model.spec.defaults.width, model.spec.defaults.height)
    request = final_request(model, draft, width, height, strength=options.strength, steps=options.steps)
    write(options, model, request)


def open_model(options: Options, request: Request) -> Model:
    """Load the model as the options say; a budget of memory is planned for the request."""
    from runtime.warming import parse_sizes

    sizes = parse_sizes(options.warm) if options.warm else []

    import runtime
    from runtime.offload import Offload
    from runtime.planner import load_within

    how = {
        "device": options.device, "dtype": options.dtype, "engine": options.engine, "precision": options.precision,
    }  # fmt: skip
    if options.blocks is not None or options.text_encoder is not None:
        if options.blocks is not None and options.blocks < 0:
            raise ValueError(f"--blocks is {options.blocks}; legal: 0 or more blocks that stay on the device")
        how["offload"] = Offload(options.text_encoder or "resident", options.blocks)
    if options.lora:
        from runtime.lora import Lora

        how["loras"] = [Lora.parse(text) for text in options.lora]
    if options.memory is not None:
        model = load_within(options.model, request, memory=options.memory, **how)
    else:
        model = runtime.load(options.model, **how)
    if sizes:
        runtime.warmup(model, sizes)
    return model


def signer_of(options: Options) -> Signer | None:
    """Return who signs the result, None where nobody is to; ValueError where that cannot be."""
    if not (options.credentials or options.certificate or options.private_key):
        return None
    from runtime.certificates import find_signer
    from runtime.engines.store import cache_root
    from runtime.provenance import check_sealable

    check_sealable(options.output)
    return find_signer(options.certificate, options.private_key, cache_root() / "credentials")


def foretell(model: Model, request: Request) -> None:
    """Print what the planner foresees; a machine that it does not know is measured in short."""
    from runtime.planner import foresee
    from runtime.prediction import GIB
    from runtime.tasks import plan_task

    found = foresee(model, request, plan_task(request, model.spec), "brief")
    assert found is not None  # it is measured where it was not
    run = [name for name in ("text", "encode", "denoise", "decode") if name != "encode" or found.encoded]
    stages = ", ".join(f"{name} {found.seconds[name]:.2f}" for name in run)
    print(f"foreseen seconds: {stages}; peak memory {found.most / GIB:.2f} GiB", flush=True)


def write(options: Options, model: Model, request: Request) -> None:
    """Make a resolved request's video with what the options say of output and progress."""
    import runtime
    from runtime.cli.progress import Progress
    from runtime.latents import save_latents
    from runtime.pipeline import compare_exact
    from runtime.previews import Previewer
    from runtime.provenance import generation, inputs_of, sealing
    from runtime.trace import recording, span
    from runtime.video import check_writable

    signer = signer_of(options)
    frames = request.num_frames if request.task == "text" else None
    check_writable(options.output, frames, request.height, request.width, request.fps)
    if options.preview:
        cells = None if frames is None else 1 + (frames - 1) // model.spec.stride[0]
        check_writable(options.preview, num_frames=cells)
    if not options.quiet:
        foretell(model, request)
    with Progress("denoising", "step", quiet=options.quiet) as progress:
        watch = Previewer(model, options.preview, request, progress) if options.preview else None
        video = runtime.generate(
            model, request, on_step=progress if watch is None else watch,
            predict=bool(options.receipt) or not options.quiet,
        )  # fmt: skip
    for note in video.receipt.notes:
        warnings.warn(note, stacklevel=1)
    unkept = None
    if getattr(options, "latents", None) and video.latents is not None:  # not lost to a decode that fails
        said = {"model": model.spec.name, "fps": video.fps, "width": video.width, "height": video.height}
        try:
            save_latents(options.latents, video.latents, {name: str(value) for name, value in said.items()})
        except OSError as error:  # what was made is not lost to that either
            unkept = error
    with Progress("decoding", "frame", quiet=options.quiet) as progress, recording(video.receipt.stages), span("save"):
        seal = None
        if signer is not None:
            made = generation(video.receipt, request)
            seal = sealing(Path(options.output).name, made, inputs_of(request), signer)
        path = video.save(options.output, on_frame=progress, seal=seal)
    if getattr(options, "measure", False):
        compare_exact(model, video)
    if options.receipt:
        video.receipt.save(options.receipt)
    if not options.quiet:
        report(video, path)
    if unkept is not None:
        raise OSError(*unkept.args[:-1], f"{unkept.args[-1]}; the video is in {path}") from unkept


def report(video: Video, path: Path) -> None:
    """Print where the video is and how long each stage took."""
    from runtime import budget

    stages, count = video.receipt.stages, video.num_frames
    seconds = {name: stages[name].seconds for name in ("load", "text", "encode", "denoise", "decode") if name in stages}
    seconds["write"] = max(0.0, stages["save"].seconds - seconds["decode"])
    print(
        f"{path}: {count} {'frame' if count == 1 else 'frames'}, {video.width}x{video.height}, {video.fps:g} fps, "
        f"seed {video.receipt.seed}, {video.receipt.model} on {video.receipt.device} in {video.receipt.dtype}"
    )
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    if (said := video.receipt.quality) is not None:
        print(f"quality: {budget.told(said)}")


def check_maker(receipt: str, model: Model) -> None:
    """ValueError where a receipt names other weights than a model has: what it is of cannot be made again by them."""
    said = json.loads(Path(receipt).read_text(encoding="utf-8"))
    if said.get("model_hash") != model.fingerprint:
        raise ValueError(
            f"{receipt} is of the model {said.get('model')}, and {model.spec.name} as it was loaded has other weights; "
            "name its --model, and the --lora that it was made with"
        )


def written(options: Options) -> list[str]:
    """Return the names of what a verb is to write."""
    found = [getattr(options, name, None) for name in ("output", "receipt", "latents", "preview")]
    return [os.fspath(path) for path in found if path]


def given(options: Options, request: Request) -> list[str]:
    """Return the names of the files that a verb reads."""
    found = [getattr(options, name, None) for name in ("storyboard", "certificate", "private_key")]
    for clip in (*request.clips, *request.references):
        found += [clip.video.origin, clip.mask if isinstance(clip.mask, str | os.PathLike) else None]
    if options.lora:
        from runtime.lora import Lora

        found += [Lora.parse(text).file for text in options.lora]
    return [os.fspath(path) for path in found if path]


def check_apart(written: Sequence[str], given: Sequence[str]) -> None:
    """ValueError where a file is to be written that is also read, or written twice: the first would be lost."""
    own = [Path(path).resolve() for path in written]
    for path, file in zip(written, own, strict=True):
        if own.count(file) > 1:
            raise ValueError(f"{path} is to be written twice; give each result a name of its own")
        if any(file == Path(each).resolve() or same_file(file, each) for each in given):
            raise ValueError(f"{path} is read and would be replaced by the result; write to another name")


def same_file(one: Path, other: str) -> bool:
    """Tell whether two names are of one file: by a link."""
    return one.exists() and Path(other).exists() and one.samefile(other)


def check_file(path: str | os.PathLike[str], what: str) -> None:
    """Raise before any work where a file for `what` could not be written."""
    parent = Path(path).resolve().parent
    if Path(path).is_dir():
        raise IsADirectoryError(f"the file for the {what}, {path}, is a folder; legal: a file name")
    if not parent.is_dir():
        raise FileNotFoundError(f"the folder {parent} for the {what} does not exist; make it or name another")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"the folder {parent} for the {what} cannot be written; name another")
