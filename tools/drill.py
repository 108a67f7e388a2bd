"""Prove what the server promises when things go wrong: python tools/drill.py

All 36 faults of tools/faults.py, each by the tests that name it and by the drills that take longer; one table is
printed. What was found is kept as it comes in out/drill.jsonl; --resume goes on after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.pop(0)  # tools/, whose profile.py would hide Python's own
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

from tools.drills import DRILLS, Sizes
from tools.faults import FAULTS

KEPT = Path(__file__).parent.parent / "out" / "drill.jsonl"
TESTS = Path(__file__).parent.parent / "tests"


@dataclass
class Proof:
    """What was found about one fault, and where."""

    found: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    drills: list[bool] = field(default_factory=list)  # whether each was as promised

    def __str__(self) -> str:
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        tests = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return "; ".join([*([f"tests: {tests}"] if tests else []), *self.found])

    @property
    def verdict(self) -> str:
        """pass, FAIL, or not proven."""
        if self.failed or not all(self.drills):
            return "FAIL"
        return "pass" if self.passed or self.drills else "not proven"


class Findings:
    """What tests and drills have found, kept in a file as it comes: a line of JSON each."""

    def __init__(self, file: Path, *, resume: bool) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.unlink(missing_ok=True)
        self.all: list[dict[str, Any]] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )

    def add(self, **finding: Any) -> None:
        """Keep what was found: `place`, `rows`, and `outcome` of a test, or `found` and `good` of a drill."""
        self.all.append(finding)
        with self.file.open("a") as handle:
            handle.write(f"{json.dumps(finding)}\n")

    def places(self) -> set[str]:
        """Return the tests and drills that were done."""
        return {each["place"] for each in self.all}

    def proofs(self) -> dict[int, Proof]:
        """Return what is known of each fault."""
        proofs: dict[int, Proof] = defaultdict(Proof)
        for each in self.all:
            for row in each["rows"]:
                proof = proofs[row]
                if (place := each["place"].partition("[")[0]) not in proof.places:
                    proof.places.append(place)
                if "outcome" in each:
                    setattr(proof, each["outcome"], getattr(proof, each["outcome"]) + 1)
                else:
                    proof.drills.append(each["good"])
                    proof.found.append(each["found"])
        return proofs


class Collector:
    """Runs the tests that name a fault, and notes what became of each."""

    def __init__(self, rows: set[int], findings: Findings) -> None:
        self.rows, self.findings, self.done = rows, findings, findings.places()

    @staticmethod
    def faults(item: Any) -> set[int]:
        """Return the faults that a test names."""
        return {number for mark in item.iter_markers("fault") for number in mark.args}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests of the wanted rows that were not run yet."""
        items[:] = [item for item in items if self.faults(item) & self.rows and item.nodeid not in self.done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        """Count a test's outcome, and where it failed to be set up."""
        report = yield
        if report.when == "call" or report.outcome != "passed":
            self.findings.add(place=item.nodeid, rows=sorted(self.faults(item)), outcome=report.outcome)
        return report


def main() -> int:
    """Run tests and drills, and print the table; 1 where a row fails or has no proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(FAULTS), help="which faults (default: all)")
    parser.add_argument("--tests", action="store_true", help="the tests alone, without the drills")
    parser.add_argument("--drills", action="store_true", help="the drills alone, without the tests")
    parser.add_argument("--resume", action="store_true", help="go on after what the last run has found")
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of what was found (default: out/drill.jsonl)")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    options = parser.parse_args()
    rows, findings = set(options.rows), Findings(options.kept, resume=options.resume)
    if not options.drills:
        files = [str(file) for file in sorted(TESTS.glob("test_*.py")) if "@pytest.mark.fault(" in file.read_text()]
        pytest.main(["-p", "no:cacheprovider", "-m", "fault and not gpu", *files], plugins=[Collector(rows, findings)])
    sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
    for drill in DRILLS if not options.tests else ():
        place = f"tools/drills.py: {drill.name}"
        if not rows & set(drill.rows) or place in findings.places():
            continue
        print(f"drill: {drill.name}", flush=True)
        began = time.monotonic()
        found, good = drill.run(sizes)
        print(f"{found} ({time.monotonic() - began:.0f} s)", flush=True)
        findings.add(place=place, rows=drill.rows, found=found, good=good)
    proofs = findings.proofs()
    print_table(rows, proofs)
    return int(any(proofs[row].verdict != "pass" for row in rows))


def print_table(rows: set[int], proofs: dict[int, Proof]) -> None:
    """Print one line for each fault."""
    print("| row | what is done | expected | found | | where |\n| ---: | --- | --- | --- | --- | --- |")
    for row in sorted(rows):
        done, expected = FAULTS[row]
        proof = proofs[row]
        print(f"| {row} | {done} | {expected} | {proof} | {proof.verdict} | {', '.join(proof.places)} |")


if __name__ == "__main__":
    sys.exit(main())
