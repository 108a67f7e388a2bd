"""Prove what the server promises when things go wrong: python tools/drill.py

All 36 faults of tools/faults.py, each by the tests that name it and by the drills that take longer; one table is
printed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

from tools.drills import DRILLS, Sizes
from tools.faults import FAULTS


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


class Collector:
    """Runs the tests that name a fault, and notes what became of each."""

    def __init__(self, rows: set[int], proofs: dict[int, Proof]) -> None:
        self.rows, self.proofs = rows, proofs

    @staticmethod
    def faults(item: Any) -> set[int]:
        """Return the faults that a test names."""
        return {number for mark in item.iter_markers("fault") for number in mark.args}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests of the wanted rows."""
        items[:] = [item for item in items if self.faults(item) & self.rows]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        """Count a test's outcome, and where it failed to be set up."""
        report = yield
        if report.when == "call" or report.outcome != "passed":
            for number in self.faults(item) & self.rows:
                proof = self.proofs[number]
                setattr(proof, report.outcome, getattr(proof, report.outcome) + 1)
                place = item.nodeid.partition("[")[0]
                if place not in proof.places:
                    proof.places.append(place)
        return report


def main() -> int:
    """Run tests and drills, and print the table; 1 where a row fails or has no proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(FAULTS), help="which faults (default: all)")
    parser.add_argument("--tests", action="store_true", help="the tests alone, without the drills")
    parser.add_argument("--drills", action="store_true", help="the drills alone, without the tests")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    options = parser.parse_args()
    rows = set(options.rows)
    proofs: dict[int, Proof] = defaultdict(Proof)
    if not options.drills:
        pytest.main(["-p", "no:cacheprovider", "-m", "fault and not gpu", "tests"], plugins=[Collector(rows, proofs)])
    sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
    for drill in DRILLS if not options.tests else ():
        wanted = rows & set(drill.rows)
        if not wanted:
            continue
        print(f"drill: {drill.name}", flush=True)
        found, good = drill.run(sizes)
        for row in wanted:
            proofs[row].drills.append(good)
            proofs[row].found.append(found)
            proofs[row].places.append(f"tools/drills.py: {drill.name}")
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
