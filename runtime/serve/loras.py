"""LoRAs by name: the operator says which files a name stands for, a request which names it wants and how strongly."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from runtime.serve.errors import bad
from runtime.serve.fields import number, structured

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST = 8  # in one request
STRONGEST = 10.0  # either way


def lora_files(given: Sequence[str]) -> dict[str, list[str]]:
    """Return what each name stands for, of texts NAME=FILE[:STRENGTH] or, of two experts, NAME=high=FILE[:STRENGTH].

    A name that is given again stands for all its files. ValueError for what is no name.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not NAME.fullmatch(name) or not file:
            raise ValueError(f"lora is {text!r}; legal: NAME=FILE[:STRENGTH], a name of letters, digits and . _ -")
        found.setdefault(name, []).append(file)
    return found


def lora_by_name(fields: dict[str, Any]) -> None:
    """Turn `lora_name` and `lora_strength`, as some clients write them, into the field `lora`; ApiError where both are
    given, or a strength alone."""
    given = {name: fields.pop(f"lora_{name}") for name in ("name", "strength") if f"lora_{name}" in fields}
    if not given:
        return
    if "lora" in fields or "name" not in given:
        raise bad("lora_strength is for lora_name, and both are for no lora beside them; give lora alone", "lora")
    fields["lora"] = given


def read_loras(value: Any, legal: Collection[str]) -> list[str]:
    """Return NAME, or NAME:STRENGTH, of each LoRA that a field asks for: one or a list of such texts, or of objects
    {name, strength}; ApiError for a name that is not legal. No name is ever a path.
    """
    value = structured(value, "lora") if isinstance(value, str) and value[:1] in "[{" else value
    each = value if isinstance(value, list) else [value]
    if len(each) > MOST:
        raise bad(f"lora names {len(each)}; legal: up to {MOST}", "lora")
    found = dict(named(one) for one in each)
    if len(found) < len(each):
        raise bad("lora names one twice; legal: each once", "lora")
    if unknown := next((name for name in found if name not in legal), None):
        raise bad(
            f"there is no LoRA {unknown[:80]!r} for this model; legal: {', '.join(legal) or 'none, it has none'}",
            "lora", "lora_not_found",
        )  # fmt: skip
    return [name if strength is None else f"{name}:{strength:g}" for name, strength in found.items()]


def named(one: Any) -> tuple[str, float | None]:
    """Return (name, strength or None) of what stands for one LoRA."""
    if isinstance(one, str):
        name, colon, text = one.partition(":")
        given: Mapping[str, Any] = {"name": name, "strength": text} if colon else {"name": name}
    else:
        given = one if isinstance(one, dict) else {}
    strength = next((name for name in ("strength", "scale") if name in given), "strength")
    if given.keys() - {"name", strength} or not isinstance(given.get("name"), str):
        raise bad(f"lora is {str(one)[:80]!r}; legal: NAME, NAME:STRENGTH, or an object with name, strength", "lora")
    if strength not in given:
        return given["name"], None
    try:
        found = number(given, strength, float)
    except Exception as error:
        raise bad(f"lora: {error}", "lora") from error
    if abs(found) > STRONGEST:
        raise bad(f"the strength of a lora is {found:g}; legal: -{STRONGEST:g} to {STRONGEST:g}", "lora")
    return given["name"], found
