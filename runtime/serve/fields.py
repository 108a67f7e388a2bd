"""Fields of a body read one by one: text, numbers, flags, sizes, lists and objects; ApiError for what is illegal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.serve.errors import ApiError, bad
from runtime.serve.forms import parse_json

MAX_PROMPT = 20_000  # characters


def text(fields: Mapping[str, Any], name: str) -> str:
    """Return a field that is text, without characters that no text has."""
    value = fields[name]
    if not isinstance(value, str):
        raise bad(f"{name} is a {type(value).__name__}; legal: text", name)
    if len(value) > MAX_PROMPT:
        raise bad(f"{name} has {len(value)} characters; legal: up to {MAX_PROMPT}", name)
    return value.encode("utf-8", "replace").decode().replace("\0", "")


def number(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field that is a number, in JSON or as text."""
    value = fields[name]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 40:
            raise ValueError
        found = float(value)
        if not math.isfinite(found) or (kind is int and found != int(found)):
            raise ValueError
        return int(value) if kind is int and not isinstance(value, float) else kind(found)
    except ValueError:
        wanted = "a whole number" if kind is int else "a finite number"
        raise bad(f"{name} is {str(value)[:80]!r}; legal: {wanted}", name) from None


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """Return a field that is true or false, in JSON or as text."""
    value = fields.get(name, False)
    words = {"true": True, "1": True, "false": False, "0": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise bad(f"{name} is {str(value)[:80]!r}; legal: true, false", name)
    return found


def size(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return width and height of the field `size`, such as 832x480."""
    if "size" not in fields or fields["size"] == "auto":
        return {}
    if "width" in fields or "height" in fields:
        raise bad("size is given, and width or height as well; give one of them", "size")
    width, x, height = str(fields["size"]).lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(width + height) < 12):
        raise bad(f"size is {str(fields['size'])[:80]!r}; legal: WIDTHxHEIGHT in pixels, such as 832x480", "size")
    return {"width": int(width), "height": int(height)}


def structured(value: Any, name: str) -> Any:
    """Return a field that is a list or an object, as it is or as a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except ApiError as error:
        raise bad(f"{name}: {error.message}", name) from error
