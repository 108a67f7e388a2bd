"""python -m tools.tune: measure the choices of each operation at the real shapes and keep what is clearly faster.

Writes kernels/tuned/<gpu>.json, which the operations read. A choice is kept only where its results are correct and it
is at least 2 % faster than the operation's own; several cases with one key are judged by their sum. Without a GPU only
--dry-run works: it lists what would be tried.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import correct, in_order, timed
from runtime.kernels import tuning
from runtime.kernels.cases import Case
from runtime.kernels.verdicts import Standard, made, module_of, run

GAIN = 0.02  # of the time that a choice must save
Settings = dict[str, Any]


def grid(**values: Sequence[Any]) -> list[Settings]:
    """Return every combination."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


WARPS = grid(num_warps=(4, 8, 16))
ROWS = [*WARPS, {"implementation": "cuda"}]
TILES = [
    {"block_t": t, "block_f": f, "block_i": i, "num_warps": w, "num_stages": s}
    for t, f, i, w, s in (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3),
        (128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3),
    )
]  # fmt: skip
# What is tried, by the operation that the setting is of: (the operation whose cases ask for it, candidates).
CHOICES: dict[str, tuple[str, list[Settings]]] = {
    "modulate": ("modulate", ROWS),
    "modulate_fp8": ("modulate_fp8", WARPS),
    "gate_residual": ("gate_residual", ROWS),
    "gate_residual_modulate": ("gate_residual_modulate", ROWS),
    "gate_residual_modulate_fp8": ("gate_residual_modulate_fp8", WARPS),
    "quantise_rows": ("quantise_rows", WARPS),
    "qk_norm_rope": ("qk_norm_rope", [*grid(num_warps=(2, 4, 8)), {"implementation": "cuda"}]),
    "norm_silu": ("norm_silu", [*grid(numbers=(2048, 4096, 8192), num_warps=(4, 8)), {"implementation": "cuda"}]),
    "causal_conv3d": (
        "causal_conv3d",
        [
            *grid(num_stages=(3, 5)), *grid(k=(64,), num_stages=(3, 4)),
            *({"block": b, "n": n, "tail": t, "warps": w, "k": k, "num_stages": s} for b, n, t, w, k, s in (
                (128, 128, 0, 8, 64, 4), (256, 128, 0, 8, 64, 3), (128, 256, 0, 8, 64, 3), (128, 64, 32, 4, 64, 4),
                (256, 64, 32, 8, 64, 3), (128, 128, 64, 8, 64, 3),
            )),
        ],
    ),
    "linear": ("mlp", TILES),
    "linear_fp8": ("linear_fp8", [{"implementation": "triton"}]),
    "mlp": ("mlp", [{"implementation": "triton"}]),
    "attention_fp8": (
        "attention_fp8",
        [
            {"implementation": "fa3"}, {"ahead": False}, {"ahead": True},
            *({"block_l": length, "block_s": keys, "num_warps": warps, "num_stages": stages}
              for length, keys, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
                                                  (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3))),
        ],
    ),
    "attention_triton": (
        "attention",
        [
            *grid(ahead=(True,), num_stages=(2, 3, 4)),
            *grid(ahead=(True,), block_l=(64,), num_warps=(4,), num_stages=(2, 3)),
            *({"block_l": length, "block_s": keys, "num_warps": warps, "num_stages": stages}
              for length, keys, warps, stages in ((128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2),
                                                  (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3))),
        ],
    ),
}  # fmt: skip
ORDER = (
    "attention",
    "causal_conv3d",
    *(name for name in CHOICES if name != "causal_conv3d"),
)  # what matters most first
FORCED = {"linear": "triton", "attention_triton": "triton"}  # settings of a version that may not be the one picked


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and write; exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__)
    parser.add_argument("--only", default=",".join(ORDER), help="operations (default: all)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing more begins")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile beforehand (default 1: none)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried; needs no GPU")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in ("attention", *CHOICES)]:
        parser.error(f"--only {', '.join(unknown)}: legal are attention, {', '.join(CHOICES)}, joined by commas")
    if args.dry_run:
        for name in names:
            for case in real_cases(name, args.case):
                print(f"{name}: {case.name}: {len(candidates(name))} choices")
        return 0
    if not torch.cuda.is_available():
        print("no NVIDIA GPU is here, so nothing can be tuned; --dry-run needs none", file=sys.stderr)
        return 2
    device, end = torch.device("cuda", torch.cuda.current_device()), time.monotonic() + args.budget
    file = tuning.TUNED / f"{tuning.gpu_of(device)}.json"
    if args.jobs > 1:
        compile_ahead(names, args.case, args.jobs, (end - time.monotonic()) / 2)
    for name in names:
        for operation, key, settings in tuned(name, args.case, device, end):
            keep(file, operation, key, settings)
    print(file.read_text() if file.exists() else "nothing was faster than what is chosen without a file")
    return 0


def compile_ahead(names: Sequence[str], part: str, jobs: int, seconds: float) -> None:
    """Run every choice once in several processes, so that its kernels are in Triton's cache when they are timed."""
    wanted = [
        (name, case.name, settings)
        for name in names
        if name != "attention"
        for case in real_cases(name, part)
        for settings in candidates(name)
    ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(once, *each) for each in wanted]
        done, waiting = wait(futures, seconds if math.isfinite(seconds) else None)
        print(f"{len(done)} of {len(wanted)} choices compiled", flush=True)
        for future in waiting:
            future.cancel()


def once(name: str, case_name: str, settings: Settings) -> None:
    """Run one choice, in a process of the pool; what fails there fails again where it is told."""
    case = next(case for case in real_cases(name, "") if case.name == case_name)
    with suppress(Exception):
        tried(name, case.operation, settings, made(case, torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
    torch.cuda.empty_cache()


def tuned(name: str, part: str, device: torch.device, end: float) -> Iterator[tuple[str, str, Settings]]:
    """Yield (operation, key, settings) that are clearly faster than the operation's own."""
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for case in real_cases(name, part):
        if time.monotonic() > end:
            break
        keys, seconds = cores(case, device) if name == "attention" else choices(name, case, device)
        if not seconds:
            continue
        told = ", ".join(f"{each} {value * 1e6:.0f} us" for each, value in sorted(seconds.items(), key=lambda x: x[1]))
        print(f"{name} {case.name}: {told}", flush=True)
        before = sums.setdefault(keys, dict.fromkeys(seconds, 0.0))
        sums[keys] = {each: before[each] + seconds[each] for each in before if each in seconds}
    for keys, each in sums.items():
        best = min(each, key=each.__getitem__)
        if best != "{}" and each[best] < (1 - GAIN) * each["{}"]:
            yield from ((name, key, json.loads(best)) for key in keys)


def choices(name: str, case: Case, device: torch.device) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the keys of a case and the seconds of each correct choice, as JSON; {} stands for the operation's own."""
    arguments = made(case, torch.bfloat16, device)
    standard = Standard(case, torch.bfloat16, device)
    calls: dict[str, Callable[[], Any]] = {}
    keys: dict[str, None] = {}
    for settings in [{}, *candidates(name)]:
        try:
            with tuning.trial(name, settings) as asked:
                outputs = run(case.operation, FORCED.get(name), made(case, torch.bfloat16, device))
        except Exception as error:  # of a compiler: more shared memory or registers than there are, or no such call
            print(f"{name} {case.name} {settings}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
            continue
        keys |= dict.fromkeys(asked)
        if correct(standard.judge(outputs)):
            calls[json.dumps(settings)] = partial(tried, name, case.operation, settings, arguments)
    torch.cuda.empty_cache()
    return tuple(keys), medians(calls)


def cores(case: Case, device: torch.device) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the key of an attention case and the seconds of each core, as the settings that name it."""
    module = module_of("attention")
    arguments = made(case, torch.bfloat16, device)
    call = module.call_of(arguments["q"], arguments["k"], arguments.get("bias"))
    standard = Standard(case, torch.bfloat16, device)
    calls: dict[str, Callable[[], Any]] = {"{}": partial(run, "attention", None, arguments)}
    for name, core in module.CORES.items():
        if name in ("sage", "math") or not core.can(call) or (core.package and module.why_absent(core.package)):
            continue
        try:
            outputs = run("attention", None, arguments | {"core": name})
        except Exception as error:  # of a library
            print(f"{name} {case.name}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
            continue
        if correct(standard.judge(outputs)):
            calls[json.dumps({"core": name})] = partial(run, "attention", None, arguments | {"core": name})
    return (call.key,), medians(calls)


def tried(name: str, operation: str, settings: Settings, arguments: dict[str, Any]) -> Any:
    """Run an operation with settings."""
    with tuning.trial(name, settings):
        return run(operation, FORCED.get(name), arguments)


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each call, nothing where there is nothing to compare."""
    if len(calls) < 2 or "{}" not in calls:
        return {}
    return {name: statistics.median(samples) for name, samples in timed(calls).items()}


def candidates(name: str) -> list[Settings]:
    """Return what is tried for an operation."""
    if name == "attention":
        return [{"core": core} for core in module_of("attention").CORES]
    return CHOICES[name][1]


def real_cases(name: str, part: str) -> list[Case]:
    """Return the real cases that ask for an operation's settings, the bars' own first."""
    operation = "attention" if name == "attention" else CHOICES[name][0]
    return [case for case in in_order([operation]) if part in case.name]


def keep(file: Path, operation: str, key: str, settings: Settings) -> None:
    """Add one entry to a tuned file."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found.setdefault(operation, {})[key] = settings
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tuning.table.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
