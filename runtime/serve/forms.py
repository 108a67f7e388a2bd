"""Bodies: JSON, or multipart with brackets or JSON in its fields; both become one dictionary, with files on disk."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from runtime.serve.errors import ApiError, bad

EXTRA = ("extra_body", "extra_params", "diffusers_kwargs")  # fields that hold more fields, as some clients write them
MAX_JSON = 32 * 2**20
MAX_FIELDS, MAX_FILES = 200, 8
MAX_DEPTH = 16
IDLE_SECONDS = 30.0  # between two chunks of a body


@dataclass(frozen=True)
class Upload:
    """A file of a form, written to a name of ours; the client's own name is forgotten."""

    path: Path


@dataclass
class Part:
    """One part of a form while it arrives."""

    name: bytes = b""
    value: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    text: bytearray = field(default_factory=bytearray)
    file: Any = None
    path: Path | None = None


async def read_body(request: Request, folder: Callable[[], Path], limit: int) -> dict[str, Any]:
    """Return the fields of a body of at most `limit` bytes; its files lie in `folder()`. ApiError for a bad one."""
    kind, options = parse_options_header(request.headers.get("content-type", "application/json"))
    if kind == b"multipart/form-data":
        if not options.get(b"boundary"):
            raise bad("the multipart body names no boundary")
        fields = await read_form(limited(request, limit), options[b"boundary"], folder)
    elif kind in (b"application/json", b""):
        body = bytearray()
        async for chunk in limited(request, min(limit, MAX_JSON)):
            body += chunk
        fields = parse_json(bytes(body)) if body.strip() else {}
        if not isinstance(fields, dict):
            raise bad(f"the body is a JSON {type(fields).__name__}; legal: an object")
    else:
        raise ApiError(415, "legal content types: application/json, multipart/form-data", code="unsupported_media_type")
    for name in EXTRA:
        extra = fields.pop(name, None)
        if isinstance(extra, str):
            extra = parse_json(extra.encode())
        if extra is None:
            continue
        if not isinstance(extra, dict):
            raise bad(f"{name} is no object", name)
        if twice := sorted(fields.keys() & extra.keys()):
            raise bad(f"{twice[0]} is given twice, in {name} as well", twice[0])
        fields |= extra
    return fields


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield a body's chunks; ApiError 413 as soon as there are more than `limit` bytes, 408 where they stop coming."""
    total, stream = 0, request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"nothing of the body came for {IDLE_SECONDS:g} s", code="body_timeout") from None
        total += len(chunk)
        if total > limit:
            raise ApiError(413, f"the body has more than {limit} bytes", code="request_too_large")
        yield chunk


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text; ApiError for a bad, ambiguous or deeply nested one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise bad("the JSON has a key twice in one object")
        return found

    def refuse(name: str) -> Any:
        raise bad(f"the JSON has the number {name}; legal: finite numbers")

    try:
        found = json.loads(body, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad(f"the JSON cannot be read: {str(error)[:200]}", code="invalid_json") from error
    pending = [(found, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise bad(f"the JSON is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict | list):
            pending += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    return found


async def read_form(chunks: AsyncIterator[bytes], boundary: bytes, folder: Callable[[], Path]) -> dict[str, Any]:
    """Return the fields of a multipart body; files are written as they arrive."""
    reader = Reader(folder)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except MultipartParseError as error:
        raise bad(f"the multipart body cannot be read: {error}") from error
    finally:
        reader.close()
    if not reader.ended:
        raise bad("the multipart body ends before its closing boundary")
    return nested(reader.fields)


class Reader:
    """Takes what the multipart parser finds."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self.folder, self.part, self.ended = folder, Part(), False
        self.fields: list[tuple[str, Any]] = []

    def callbacks(self) -> Any:
        """Return the parser's callbacks."""
        return {
            "on_part_begin": self.begin,
            "on_header_field": lambda data, start, end: setattr(self.part, "name", self.part.name + data[start:end]),
            "on_header_value": lambda data, start, end: setattr(self.part, "value", self.part.value + data[start:end]),
            "on_header_end": self.header,
            "on_headers_finished": self.started,
            "on_part_data": self.data,
            "on_part_end": self.end,
            "on_end": lambda: setattr(self, "ended", True),
        }

    def begin(self) -> None:
        self.part = Part()

    def header(self) -> None:
        self.part.headers[self.part.name.lower()] = self.part.value
        self.part.name = self.part.value = b""

    def started(self) -> None:
        _, options = parse_options_header(self.part.headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise bad("a part of the form has no name")
        self.part.name = options[b"name"]
        files = sum(isinstance(value, Upload) for _, value in self.fields)
        if len(self.fields) >= MAX_FIELDS or (files >= MAX_FILES and b"filename" in options):
            raise bad(f"the form has more than {MAX_FIELDS} fields or {MAX_FILES} files")
        if b"filename" in options:
            self.part.path = self.folder() / f"upload-{secrets.token_hex(4)}"
            self.part.file = self.part.path.open("wb")

    def data(self, data: bytes, start: int, end: int) -> None:
        if self.part.file is not None:
            self.part.file.write(data[start:end])
            return
        self.part.text += data[start:end]
        if len(self.part.text) > MAX_JSON:
            raise ApiError(413, f"a field has more than {MAX_JSON} bytes", code="request_too_large")

    def end(self) -> None:
        try:
            name = self.part.name.decode()
            text = self.part.text.decode()
        except UnicodeDecodeError:
            raise bad("a field of the form is not UTF-8") from None
        self.close()
        self.fields.append((name, text if self.part.path is None else Upload(self.part.path)))

    def close(self) -> None:
        """Close the file that is being written."""
        if self.part.file is not None:
            self.part.file.close()
            self.part.file = None


def nested(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields with brackets as what they mean: a[b]=1 is {"a": {"b": 1}}, a[]=1 one of a list.

    Lists of objects arrive as keyframes[][frame]=0, keyframes[][frame]=8, ...: the n-th of each key belong together.
    """
    found: dict[str, Any] = {}
    for name, value in fields:
        match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]*\])*)", name)
        if match is None:
            raise bad(f"the field name {name[:80]!r} cannot be read")
        keys = re.findall(r"\[([^\[\]]*)\]", match[2])
        if keys == [] and match[1] in found:
            raise bad(f"{match[1]} is given twice", match[1])
        if keys == []:
            found[match[1]] = value
        elif keys == [""]:
            place(found, match[1], list).append(value)
        elif len(keys) == 1:
            if keys[0] in place(found, match[1], dict):
                raise bad(f"{name} is given twice", match[1])
            found[match[1]][keys[0]] = value
        elif len(keys) == 2 and keys[0] == "":
            items = place(found, match[1], list)
            item = next((each for each in items if isinstance(each, dict) and keys[1] not in each), None)
            if item is None:
                items.append(item := {})
            item[keys[1]] = value
        else:
            raise bad(f"the field name {name[:80]!r} has too many brackets")
    return found


def place(found: dict[str, Any], name: str, kind: type) -> Any:
    """Return the list or dictionary under a name, made where it is not there; ApiError where it is something else."""
    there = found.setdefault(name, kind())
    if not isinstance(there, kind):
        raise bad(f"{name} is given both with brackets and without", name)
    return there
