"""The list of faults: every one is proven by a test that names it, or by a drill."""

from __future__ import annotations

import re
from pathlib import Path

from tools.drills import DRILLS
from tools.faults import FAULTS


def test_every_fault_has_its_proof() -> None:
    marks = [
        text
        for file in Path(__file__).parent.glob("test_*.py")
        for text in re.findall(r"^@pytest\.mark\.fault\(([\d, ]+)\)", file.read_text(), re.MULTILINE)
    ]
    named = {int(number) for text in marks for number in text.split(",")}
    assert sorted(FAULTS) == list(range(1, 37))
    assert named | {row for drill in DRILLS for row in drill.rows} == set(FAULTS)
