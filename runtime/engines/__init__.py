"""Ways to run a transformer: one module each, `build(transformer, expert) -> Denoiser`."""

from __future__ import annotations

from types import ModuleType

from runtime.engines import eager

ENGINES: dict[str, ModuleType] = {"eager": eager}


def engine(name: str) -> ModuleType:
    """Return the engine called `name`; ValueError names the legal ones."""
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; legal: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]
