"""The list of faults: every one is proven by a test that names it, or by a drill."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


def test_what_was_proven_is_kept_and_not_proven_again(tmp_path: Path) -> None:
    kept = tmp_path / "drill.jsonl"
    script = Path(__file__).parent.parent / "tools" / "drill.py"
    command = [sys.executable, str(script), "--tests", "--rows", "3", "--kept", str(kept)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tests: 1 passed | pass |" in first.stdout
    (found,) = map(json.loads, kept.read_text().splitlines())
    assert found["rows"] == [3] and found["outcome"] == "passed"
    kept.write_text(json.dumps(found | {"outcome": "failed"}) + "\n")
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 1 and "tests: 1 failed | FAIL |" in again.stdout, "it stands as it was found"
