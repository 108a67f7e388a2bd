"""python tools/smallest.py: small cases of every operation once on the GPU, for compute-sanitizer.

By Triton and by csrc. It judges no result; the checker that runs it does. Exit status 1 where a version fails.
"""

from __future__ import annotations

import sys

import torch

from runtime.kernels.cases import CASES, cases
from runtime.kernels.verdicts import implementations, made, run

EACH = 4  # cases of an operation: a checker takes up to a hundred times as long
DTYPES = (torch.bfloat16, torch.float32)


def main() -> int:
    """Run them and print how many there were."""
    count, failed = 0, []
    for operation in CASES:
        small = cases(operation, real=False)
        for case in [*small[:EACH], small[-1]]:
            for name in implementations(operation):
                for dtype in DTYPES:
                    try:
                        run(operation, name, made(case, dtype, "cuda"))
                        torch.cuda.synchronize()
                        count += 1
                    except ValueError as error:  # csrc is not built, or takes no such case
                        print(f"{operation} {case.name} by {name}: {error}")
                    except RuntimeError as error:
                        failed.append(f"{operation} {case.name} by {name} in {dtype}: {error}")
        print(f"{operation}: {count} calls so far", flush=True)
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
