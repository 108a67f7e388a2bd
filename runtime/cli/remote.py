"""python -m runtime remote: the verbs on another machine, asked of its server; no model and no torch here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.cli.arguments import parse_number, parse_whole
from runtime.cli.making import check_apart, check_file
from runtime.client import Client, ServerError

KEY = "DIT_RUNTIME_API_KEY"
NUMBERS = {
    "frames": ("num_frames", parse_whole, "number of (new) frames, such as 81"),
    "seconds": ("seconds", parse_number, "length, instead of --frames"),
    "fps": ("fps", parse_number, "frames per second"),
    "steps": ("num_inference_steps", parse_whole, "denoising steps"),
    "guidance": ("guidance_scale", parse_number, "guidance scale; 1 is none"),
    "seed": ("seed", parse_whole, "the same seed makes the same video"),
    "strength": ("strength", parse_number, "of edit and finish: more than 0 (as it was) to 1 (new)"),
    "priority": ("priority", parse_whole, "-10 to 10; more goes first"),
}
TEXTS = {
    "size": ("size", "pixels, such as 832x480"),
    "negative": ("negative_prompt", "what it must not show"),
    "on": ("model", "the server's model"),
}
FORMATS = {".mp4": None, ".webm": "webm", ".gif": "gif"}

Options = argparse.Namespace


def add_remote(commands: Any) -> None:
    """Add `remote` and its verbs to the commands of the command line."""
    top = commands.add_parser("remote", help="ask a server for the same")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    shared.add_argument("--key-file", type=Path, metavar="FILE", help=f"holds the API key (default: ${KEY})")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument("--quiet", action="store_true", help="print nothing but errors and what is asked for")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[Client, Options], Any], help: str, *words: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, parents=[shared], help=help)
        parser.set_defaults(run=asked, verb=run)
        for word in words:
            parser.add_argument(word)
        return parser

    def maker(name: str, run: Callable[..., Any], help: str, *words: str) -> argparse.ArgumentParser:
        parser = verb(name, run, help, *words)
        for option, (_, kind, what) in NUMBERS.items():
            parser.add_argument(f"--{option}", type=kind, help=what)
        for option, (_, what) in TEXTS.items():
            parser.add_argument(f"--{option}", help=what)
        parser.add_argument(
            "--lora", action="append", metavar="NAME[:STRENGTH]", help="one of the server's; again: more"
        )
        parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="any field of the API")
        parser.add_argument(
            "-o", "--output", type=Path, default=Path("image.png" if name == "image" else "video.mp4"), metavar="PATH"
        )
        return parser

    def video_maker(name: str, run: Callable[..., Any], help: str, *words: str) -> argparse.ArgumentParser:
        parser = maker(name, lambda client, options: finished(client, options, run), help, *words)
        parser.add_argument("--no-wait", action="store_true", help="print the video's id at once; nothing is fetched")
        return parser

    parser = video_maker("generate", generate, "make a video from a prompt", "prompt")
    parser.add_argument("--image", type=Path, help="a picture that it begins with")
    parser = video_maker("extend", extend, "go on after a clip, a file or an id", "clip", "prompt")
    parser.add_argument("--backward", action="store_true", help="lead up to the clip instead")
    video_maker("connect", connect, "lead from one clip to another", "first", "second", "prompt")
    parser = video_maker("loop", loop, "make a seamless loop, of a prompt or of a --clip", "prompt")
    parser.add_argument("--clip", help="a clip to be closed, a file or an id")
    video_maker("edit", edit, "make a clip anew, a file or an id", "clip", "prompt")
    video_maker("finish", finish, "make the final video of a draft", "id")
    maker("image", image, "make a picture from a prompt", "prompt")
    verb("list", listing, "print all videos, the newest first").add_argument("--json", action="store_true")
    verb("get", lambda client, options: show(client.get(options.id)), "print all that is known of a video", "id")
    verb("watch", lambda client, options: follow(client, options, options.id), "show a video's progress", "id")
    verb("cancel", lambda client, options: show(client.cancel(options.id)), "stop a video", "id")
    verb("delete", lambda client, options: show(client.delete(options.id)), "remove a video", "id")
    parser = verb("download", download, "fetch a finished video", "id")
    parser.add_argument("-o", "--output", type=Path, default=Path("video.mp4"), metavar="PATH", help=".mp4 .webm .gif")
    parser.add_argument("--variant", default="video", help="video (default), thumbnail, spritesheet")
    parser.add_argument("--from", dest="start", type=parse_whole, default=0, metavar="N", help="first frame wanted")
    parser.add_argument("--to", dest="stop", type=parse_whole, metavar="N", help="frame before which it ends")
    verb("verify", lambda client, options: show(client.verify(clip(options.what))), "say where it comes from", "what")


def asked(options: Options) -> None:
    """Run one verb against the server."""
    key = os.environ.get(KEY)
    if options.key_file is not None:
        lines = options.key_file.read_text().splitlines()
        if not lines or not lines[0].strip():
            raise ValueError(f"{options.key_file} holds no API key in its first line")
        key = lines[0].strip()
    with Client(options.url, key=key) as client:
        options.verb(client, options)


def fields_of(options: Options) -> dict[str, Any]:
    """Return the API's fields of the options that were given; ValueError for one that cannot be read."""
    names = {option: field for option, (field, *_) in (NUMBERS | TEXTS).items()}
    found = {field: getattr(options, option) for option, field in names.items()}
    found["lora"] = options.lora
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set is {text!r}; legal: FIELD=JSON, such as loop=true")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def clip(text: str) -> str | Path:
    """Return the file of a name, or the id that it is; ValueError for neither."""
    if Path(text).is_file():
        return Path(text)
    if not text.startswith("video_"):
        raise ValueError(f"{text} is no file here, and no id of a video (video_...)")
    return text


def generate(client: Client, options: Options) -> dict[str, Any]:
    given = {} if options.image is None else {"input_reference": options.image}
    return client.create(options.prompt, **given, **fields_of(options))


def extend(client: Client, options: Options) -> dict[str, Any]:
    direction = "backward" if options.backward else "forward"
    return client.extend(clip(options.clip), options.prompt, direction=direction, **fields_of(options))


def connect(client: Client, options: Options) -> dict[str, Any]:
    return client.connect(clip(options.first), clip(options.second), options.prompt, **fields_of(options))


def loop(client: Client, options: Options) -> dict[str, Any]:
    return client.loop(options.prompt, options.clip and clip(options.clip), **fields_of(options))


def edit(client: Client, options: Options) -> dict[str, Any]:
    return client.edit(clip(options.clip), options.prompt, **fields_of(options))


def finish(client: Client, options: Options) -> dict[str, Any]:
    return client.finish(options.id, **fields_of(options))


def image(client: Client, options: Options) -> None:
    check_file(options.output, "picture")
    first, *more = client.image(options.prompt, **fields_of(options))
    names = [options.output.with_stem(f"{options.output.stem}-{index}") for index in range(2, len(more) + 2)]
    for path, content in zip([options.output, *names], [first, *more], strict=True):
        path.write_bytes(content)
        say(options, str(path))


def finished(client: Client, options: Options, ask: Callable[[Client, Options], dict[str, Any]]) -> None:
    """Ask for a video, wait for it, and fetch it; who interrupts that is told how to come back."""
    wanted = format_of(options.output)
    given = [getattr(options, name, None) for name in ("image", "clip", "first", "second")]
    check_apart([str(options.output)], [str(path) for path in given if path])
    check_file(options.output, "video")
    video = ask(client, options)
    if options.no_wait:
        print(video["id"])
        return
    try:
        follow(client, options, video["id"])
    except KeyboardInterrupt:
        print(f"\nit goes on there: remote watch {video['id']}, remote cancel {video['id']}", file=sys.stderr)
        raise
    client.save(video, options.output, format=wanted)
    say(
        options, f"{options.output}: {video['num_frames']} frames, {video['size']}, seed {video['seed']}, {video['id']}"
    )


def follow(client: Client, options: Options, video: str) -> None:
    """Show progress until a video is done; ServerError where it is not completed."""
    from runtime.cli.progress import Progress

    with Progress(video, "percent", quiet=options.quiet) as progress:
        for kind, state in client.events(video):
            if kind == "progress" and state["status"] == "in_progress":
                progress(state["progress"], 100)
    if kind != "done" or state["status"] != "completed":
        error = state.get("error") or {"code": state["status"], "message": f"{video} is {state['status']}"}
        raise ServerError(200, error["code"], error["message"])


def download(client: Client, options: Options) -> None:
    wanted = format_of(options.output) if options.variant == "video" else None
    check_file(options.output, options.variant)
    part = (options.start, options.stop) if options.start or options.stop is not None else None
    say(options, str(client.save(options.id, options.output, variant=options.variant, format=wanted, part=part)))


def format_of(path: Path) -> str | None:
    """Return the API's name of the format that a suffix names; ValueError for none."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; legal: {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def listing(client: Client, options: Options) -> None:
    for video in client.list():
        if options.json:
            print(json.dumps(video))
        else:
            print(
                f"{video['id']}  {video['status']:<11} {video['progress']:>3} %  {video['size']:>9}  "
                f"{video['prompt'][:60]}"
            )


def show(found: dict[str, Any]) -> None:
    print(json.dumps(found, indent=2))


def say(options: Options, line: str) -> None:
    if not options.quiet:
        print(line)
