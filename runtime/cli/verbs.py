"""The verbs that make a video, as a table: each says its arguments, and the Request that they mean.

Reading them in turn tells what the command line can ask; what happens then is the same for all: `making.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.arguments import parse_levels, parse_number, parse_quality, parse_ranges, parse_size, parse_whole
from runtime.cli.making import finish, make

if TYPE_CHECKING:
    from runtime.clips import Clip
    from runtime.request import Request

STRENGTH = 0.6  # of an edit where nothing else is said

Parser = argparse.ArgumentParser
Options = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """One word of the command line: what it asks for, its own arguments, and the request made of them."""

    help: str
    arguments: Callable[[Parser], None]
    request: Callable[[Options], Request]
    output: str = "video.mp4"
    still: bool = False  # one frame, which has no length and no rate


def generate_arguments(parser: Parser) -> None:
    parser.add_argument("prompt", nargs="?", default="", help="what the video shows")
    parser.add_argument(
        "--image", action="append", default=[], metavar="[FRAME:]PATH",
        help="a picture to animate, or a keyframe at a frame or the 'end'; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--storyboard", metavar="FILE", help="cards as JSON instead of a prompt: from, to, prompt, image"
    )
    parser.add_argument("--draft", action="store_true", help="small and rough, at a fifth of the cost at most")


def generate(options: Options) -> Request:
    if options.storyboard:
        from runtime.storyboard import read_storyboard

        if options.prompt or options.image:
            raise ValueError("a storyboard has its own prompts and pictures; leave prompt and --image out")
        return request_of(options, storyboard=read_storyboard(options.storyboard))
    clips = tuple(keyframe(text) for text in options.image)
    return request_of(options, clips=clips)


def extend_arguments(parser: Parser) -> None:
    parser.add_argument("clip", help="the clip to go on from")
    parser.add_argument("prompt", help="what the new frames show")
    parser.add_argument("--backward", action="store_true", help="lead up to the clip instead")


def extend(options: Options) -> Request:
    return request_of(options, clips=[clip(options.clip)], direction="backward" if options.backward else "forward")


def connect_arguments(parser: Parser) -> None:
    parser.add_argument("first", help="the clip that comes first")
    parser.add_argument("second", help="the clip that comes last")
    parser.add_argument("prompt", help="what happens between them")


def connect(options: Options) -> Request:
    return request_of(options, clips=[clip(options.first), clip(options.second)], direction="between")


def loop_arguments(parser: Parser) -> None:
    parser.add_argument("what", metavar="PROMPT|CLIP", help="what the loop shows, or a clip to be closed")
    parser.add_argument("prompt", nargs="?", default="", help="what a clip's new frames show")


def loop(options: Options) -> Request:
    if Path(options.what).exists() or Path(options.what).suffix.lower() in (".mp4", ".webm", ".gif"):
        return request_of(options, clips=[clip(options.what)], periodic=True)
    if options.prompt:
        raise ValueError(f"there is no clip {options.what!r}; legal: loop PROMPT, or loop CLIP PROMPT")
    options.prompt = options.what
    return request_of(options, periodic=True)


def edit_arguments(parser: Parser) -> None:
    parser.add_argument("clip", help="the clip to make anew")
    parser.add_argument("prompt", help="what it shall show")
    parser.add_argument(
        "--strength", type=parse_number, metavar="S", help="more than 0 (as it was) to 1 (new); default 0.6"
    )  # fmt: skip
    parser.add_argument(
        "--mask", metavar="PATH", help="a picture or clip, white where the clip is made anew; for models that take one"
    )


def edit(options: Options) -> Request:
    if options.mask is None:
        return request_of(
            options, clips=[clip(options.clip)], strength=STRENGTH if options.strength is None else options.strength
        )
    if options.strength is not None:
        raise ValueError("--mask and --strength are two ways to edit: part of the frame, or all of it; give one")
    masked = replace(clip(options.clip), mask=options.mask)
    assert masked.masked is not None  # a broken one is known before a model is loaded
    return request_of(options, clips=[masked])


def fill_arguments(parser: Parser) -> None:
    parser.add_argument("clip", help="a clip, or a folder of numbered pictures of which some may lack")
    parser.add_argument("prompt", help="what the video shows")
    parser.add_argument("--missing", type=parse_ranges, default=(), metavar="RANGES", help="frames such as 12-20,33")


def fill(options: Options) -> Request:
    from runtime.clips import runs

    clips, total = runs(options.clip, set(options.missing))
    if options.frames is None and options.seconds is None:
        options.frames = total
    return request_of(options, clips=clips)


def image_arguments(parser: Parser) -> None:
    parser.add_argument("prompt", help="what the picture shows")


def image(options: Options) -> Request:
    options.frames, options.seconds, options.fps, options.window, options.overlap = 1, None, None, None, None
    return request_of(options)


VERBS = {
    "generate": Verb("make a video from a prompt", generate_arguments, generate),
    "image": Verb("make a picture from a prompt", image_arguments, image, output="image.png", still=True),
    "extend": Verb("go on after a clip, or lead up to it", extend_arguments, extend),
    "connect": Verb("lead from one clip to another", connect_arguments, connect),
    "loop": Verb("make a seamless loop of a prompt or a clip", loop_arguments, loop),
    "edit": Verb("make a clip anew", edit_arguments, edit),
    "fill": Verb("make the frames that a clip lacks", fill_arguments, fill),
}


def add_verbs(commands: Any, shared: Parser) -> None:
    """Add the verbs to the commands of the command line."""
    for name, verb in VERBS.items():
        parser = commands.add_parser(name, parents=[shared], help=verb.help)
        parser.set_defaults(run=make, verb=verb)
        verb.arguments(parser)
        add_sampling(parser, still=verb.still)
        add_output(parser, verb.output, latents=True)
    parser = commands.add_parser("finish", parents=[shared], help="make the final video of a draft")
    parser.set_defaults(run=finish)
    parser.add_argument("draft", metavar="RECEIPT", help="the receipt that generate --draft --receipt wrote")
    parser.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels (default: the model's own)")
    parser.add_argument("--strength", type=parse_number, metavar="S", help="how much may change, more than 0, up to 1")
    parser.add_argument("--steps", type=parse_whole, metavar="N", help="denoising steps")
    add_output(parser, "video.mp4", latents=False)


def add_sampling(parser: Parser, *, still: bool) -> None:
    """Add what every request has; a still picture has no length."""
    what = parser.add_argument_group("what is made")
    what.add_argument("--negative", default="", metavar="TEXT", help="what it must not show")
    what.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="pixels, such as 832x480")
    if not still:
        what.add_argument("--frames", type=parse_whole, metavar="N", help="number of (new) frames, such as 81")
        what.add_argument("--seconds", type=parse_number, metavar="S", help="length of what is made, not --frames")
        what.add_argument("--fps", type=parse_number, metavar="F", help="frames per second")
    what.add_argument("--seed", type=parse_whole, metavar="N", help="the same seed makes the same video")
    what.add_argument(
        "--quality", type=parse_quality, default="exact", metavar="Q",
        help="exact (default), high, fast, or a floor in dB against the exact video, such as 32",
    )  # fmt: skip
    what.add_argument("--measure", action="store_true", help="make the exact twin too, and say how near they are")

    given = parser.add_argument_group("clips and pictures that are given")
    given.add_argument("--fit", default="crop", help="how they get to the size: crop (default), pad, stretch")
    given.add_argument(
        "--reference", action="append", default=[], metavar="PATH",
        help="a picture of what shall look like it, for models that take them (VACE); may be given again",
    )  # fmt: skip

    how = parser.add_argument_group("how it is sampled (default: as the model was published)")
    how.add_argument("--steps", type=parse_whole, metavar="N", help="denoising steps")
    how.add_argument("--guidance", type=parse_number, metavar="G", help="guidance scale; 1 is none")
    how.add_argument("--guidance-2", type=parse_number, metavar="G", help="guidance scale of the second expert")
    how.add_argument("--boundary", type=parse_number, metavar="S", help="sigma below which the second expert works")
    how.add_argument("--shift", type=parse_number, metavar="S", help="how far the schedule leans to noise")
    how.add_argument("--sampler", metavar="NAME", help="unipc, euler or lcm")
    how.add_argument(
        "--recipe", metavar="NAME", help="how distilled weights are sampled: lightx2v-4, lightning-4, fastwan-3"
    )
    how.add_argument(
        "--sigmas", type=parse_levels, metavar="LEVELS", help="noise levels to visit, such as 1,0.94,0.83,0.63"
    )
    how.add_argument("--positions", metavar="KIND", help="spread them beyond the model's own size: ntk, riflex")
    if not still:
        how.add_argument("--window", type=parse_whole, metavar="N", help="frames made at once in a long video")
        how.add_argument("--overlap", type=parse_whole, metavar="N", help="frames shown again to what is made next")

    out = parser.add_argument_group("writing the prompt out")
    out.add_argument(
        "--expand", nargs="?", const="required", choices=("required", "optional"),
        help="let the checkpoint's rules or a language model write the prompt out; 'optional' goes on without",
    )  # fmt: skip
    out.add_argument("--expand-model", metavar="NAME", help="the model's name at the endpoint, or its folder here")
    out.add_argument("--expand-url", metavar="URL", help="a chat endpoint, such as http://localhost:8000/v1")
    out.add_argument("--expand-timeout", type=parse_number, default=30.0, metavar="S", help="seconds for each try of 3")


def add_output(parser: Parser, output: str, *, latents: bool) -> None:
    """Add what is written, and how the model runs."""
    files = parser.add_argument_group("what is written")
    files.add_argument(
        "-o", "--output", default=output, metavar="PATH", help=f".mp4 .webm .gif .png or a folder (default: {output})"
    )
    files.add_argument("--receipt", metavar="FILE", help="write what was done as JSON")
    files.add_argument("--preview", metavar="PATH", help="a small .gif (or other video) of each step while it denoises")
    if latents:
        files.add_argument("--latents", metavar="FILE", help="keep the latents, written before decoding starts")
    files.add_argument(
        "--credentials", action="store_true",
        help="sign into the file where it comes from (C2PA): model, seed, inputs; no two files are equal then",
    )  # fmt: skip
    files.add_argument("--certificate", type=Path, metavar="FILE", help="sign with this (PEM; default: one of our own)")
    files.add_argument("--private-key", type=Path, metavar="FILE", help="the certificate's key (PEM)")
    files.add_argument("--quiet", action="store_true", help="print nothing but errors")

    machine = parser.add_argument_group("how the model runs")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    machine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    machine.add_argument(
        "--precision", default="full",
        help="full (default), or fp8: the large layers' weights in 8 bits, half the memory; not exact",
    )  # fmt: skip
    machine.add_argument("--engine", default="eager", help="eager (default), cuda_graph, inductor, tensorrt")
    machine.add_argument(
        "--lora", action="append", default=[], metavar="[high=|low=]FILE[:STRENGTH]",
        help="a LoRA to merge into the weights, of one of two experts or all; may be given again",
    )  # fmt: skip
    machine.add_argument(
        "--memory", metavar="SIZE", help="bytes that may be used, such as 12GiB; the planner keeps to it"
    )
    machine.add_argument("--blocks", type=parse_whole, metavar="N", help="transformer blocks that stay on the device")
    machine.add_argument("--text-encoder", choices=("resident", "released", "streamed"), help="where its weights are")
    machine.add_argument("--warm", metavar="SIZES", help="sizes to warm at first, such as 832x480x81,480x832x49")


def request_of(options: Options, **task: Any) -> Request:
    """Return the request of the options that all verbs share, and of a task's own fields."""
    from runtime.expansion import Expansion
    from runtime.request import Request

    width, height = options.size or (None, None)
    if options.expand:
        task["expand"] = Expansion(
            model=options.expand_model, url=options.expand_url, timeout=options.expand_timeout,
            optional=options.expand == "optional",
        )  # fmt: skip
    return Request(
        prompt=options.prompt, negative_prompt=options.negative, width=width, height=height,
        num_frames=options.frames, seconds=options.seconds, fps=options.fps, steps=options.steps,
        guidance=options.guidance, guidance_2=options.guidance_2, boundary=options.boundary, shift=options.shift,
        sampler=options.sampler, seed=options.seed, fit=options.fit, window=options.window, overlap=options.overlap,
        positions=options.positions, quality=options.quality, recipe=options.recipe, sigmas=options.sigmas,
        references=tuple(clip(path) for path in options.reference), **task,
    )  # fmt: skip


def clip(path: str, at: Any = 0) -> Clip:
    """Return the clip in a file, looked at now so that a broken one is known before a model is loaded."""
    from runtime.clips import Clip

    found = Clip(path, at=at)
    assert found.video
    return found


def keyframe(text: str) -> Clip:
    """Return the clip of PATH, FRAME:PATH or end:PATH."""
    place, colon, path = text.partition(":")
    if not text or (colon and not path):
        raise ValueError(f"--image is {text!r}; legal: a file, such as start.png, or FRAME:FILE, such as 40:b.png")
    if colon and (place == "end" or place.isdecimal()):
        return clip(path, place if place == "end" else int(place))
    return clip(text)
