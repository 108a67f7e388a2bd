"""python -m benchmarks <what>: measures on this machine, keeps every sample as JSON, prints a table for the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import stages
from benchmarks.measure import Refused


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status: 2 for a wrong option, 1 where the sides' results differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="what")
    stages.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except Refused as error:
        print(f"no speeds: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
