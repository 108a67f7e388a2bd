"""What a kernel's machine code (SASS) shows: widths of loads and stores, products, spills, barriers, and its main loop.

It is read by `cuobjdump --dump-sass`, from Triton's cubins and from the CUDA library alike; no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Instructions that are counted: products of matrices, copies past the registers, memory, what threads wait for.
PRODUCTS = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA", "IMMA")
BY_WIDTH = ("LDG", "STG", "LDGSTS")  # told apart by the bits that a thread moves at once
OTHERS = ("UTMALDG", "UTMASTG", "UBLKCP", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "BAR", "SHFL")
WIDTHS = ("256", "128", "64", "16", "8")
FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """One kernel: how many instructions it has, those of note by name, and the same of its main loop (None: none)."""

    instructions: int
    counts: dict[str, int]
    loop_instructions: int | None = None
    loop_counts: dict[str, int] | None = None

    def __str__(self) -> str:
        text = f"{self.instructions} instructions: {told(self.counts)}"
        if self.loop_instructions is not None and self.loop_counts is not None:
            text += f"; loop of {self.loop_instructions}: {told(self.loop_counts)}"
        return text


def told(counts: dict[str, int]) -> str:
    """Return counts as words."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none of note"


def disassembled(file: Path, arch: str, cuobjdump: str) -> dict[str, Code]:
    """Return each kernel of a library, as it is for one architecture."""
    command = [cuobjdump, "--dump-sass", "--gpu-architecture", arch, str(file)]
    return read_sass(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_sass(text: str) -> dict[str, Code]:
    """Read what `cuobjdump --dump-sass` printed; ValueError where there is no kernel in it."""
    starts = [*FUNCTION.finditer(text)]
    if not starts:
        raise ValueError(f"cuobjdump printed no function: {text[:200]!r}")
    ends = [each.start() for each in starts[1:]] + [len(text)]
    return {start[1]: code_of(text[start.end() : end]) for start, end in zip(starts, ends, strict=True)}


def code_of(text: str) -> Code:
    """Return what the lines of one kernel hold.

    The main loop, a backward branch and what is before it, has most products of matrices, then most instructions; one
    that neither multiplies matrices nor reads or writes global memory is none.
    """
    lines = [(int(place, 16), name, operands) for place, name, operands in INSTRUCTION.findall(text)]
    lines = [each for each in lines if each[1] != "NOP"]
    loops = []
    for place, name, operands in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < place:
            names = [each[1] for each in lines if int(target[1], 16) <= each[0] <= place]
            loops += [names] if any(name.startswith((*PRODUCTS, *BY_WIDTH)) for name in names) else []
    whole = [name for _, name, _ in lines]
    if not loops:
        return Code(len(whole), counted(whole))
    main = max(loops, key=lambda names: (sum(name.startswith(PRODUCTS) for name in names), len(names)))
    return Code(len(whole), counted(whole), len(main), counted(main))


def counted(names: Iterable[str]) -> dict[str, int]:
    """Return how often the instructions of note occur, the most telling first."""
    found = Counter(filter(None, map(kind_of, names)))
    order = (*PRODUCTS, *BY_WIDTH, *OTHERS, "MUFU")
    return dict(sorted(found.items(), key=lambda each: (order.index(each[0].partition(".")[0]), each[0])))


def kind_of(name: str) -> str | None:
    """Return under which name an instruction is counted, None where it is not: "LDG.128", "HGMMA", "MUFU.EX2"."""
    kind, *modifiers = name.split(".")
    if kind in BY_WIDTH:
        digits = {each.lstrip("US") for each in modifiers}
        return f"{kind}.{next((width for width in WIDTHS if width in digits), '32')}"
    if kind == "MUFU":
        return name
    return kind if kind in (*PRODUCTS, *OTHERS) else None
