"""python -m benchmarks <what>: measures on this machine, keeps every sample as JSON, prints a table for the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.measure import Refused

COMMANDS = ("kernels", "published", "bars", "stages", "latency", "serve", "verbs", "planner", "warm", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status: 2 for a wrong option, 1 where results are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="what")
    given = sys.argv[1:] if argv is None else argv
    asked = [name for name in given[:1] if name in COMMANDS]
    for name in asked or COMMANDS:  # the kernels need less installed than the stages
        import_module(f"benchmarks.{name}").add_command(commands)
    args = parser.parse_args(given)
    try:
        return args.run(args) or 0
    except Refused as error:
        print(f"no speeds: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
