"""Ways to run a transformer: one module each, `build(transformer, expert, weights) -> Denoiser`.

`weights` is the hash of the model's weights, for engines that hold them.
"""

from __future__ import annotations

from types import ModuleType

from runtime.engines import cuda_graph, eager, inductor, tensorrt

ENGINES: dict[str, ModuleType] = {
    "eager": eager,
    "cuda_graph": cuda_graph,
    "inductor": inductor,
    "tensorrt": tensorrt,
}


def engine(name: str) -> ModuleType:
    """Return the engine called `name`; ValueError names the legal ones."""
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; legal: {', '.join(sorted(ENGINES))}")
    return ENGINES[name]
