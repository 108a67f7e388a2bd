"""Builds TensorRT engines: one code for `tensorrt` (datacentre GPUs) and `tensorrt_rtx` (consumer GPUs, no GPU needed).

An engine holds one transformer of one checkpoint, strongly typed, for a list of profiles: a profile is a resolution
with any number of frames up to one. The library tunes for the largest; fewer tokens run in the same engine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from runtime.engines.export import example, varying, write_onnx
from runtime.engines.store import Entry, Key, Store, architecture, code_hash
from runtime.models.spec import ModelSpec, Transformer

KIND = "tensorrt"
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # library -> our extra
ENGINE, TIMINGS = "engine.plan", "timings.cache"
ANY_WEIGHTS = "any, refitted when loaded"
FOLDS = 8  # keys that stand for padding, at most
USUAL_KEYS = 128  # text keys that the library tunes for
SPARE = 0.7  # of a GPU's memory that weights may take; the rest is for activations
HALF_TOKENS = 65535  # the libraries' float16 attention overflows beyond


@dataclass(frozen=True)
class Profile:
    """Sizes that an engine takes: (least, tuned for, most) video tokens and text keys."""

    name: str
    tokens: tuple[int, int, int]
    keys: tuple[int, int, int]

    def takes(self, tokens: int, keys: int) -> bool:
        """Tell whether it covers so many tokens and keys."""
        return self.tokens[0] <= tokens <= self.tokens[2] and self.keys[0] <= keys <= self.keys[2]


@dataclass(frozen=True, kw_only=True)
class Options:
    """`refit`: weights come from the model when the engine is loaded; `stream`: they may stay in the host's memory."""

    refit: bool = False
    stream: bool = False


def make_profile(spec: ModelSpec, width: int, height: int, frames: int) -> Profile:
    """Return the profile of a resolution in pixels, either way up, with 1 to `frames` frames."""

    def tokens(count: int) -> int:
        _, *cells = spec.latent_shape(count, height, width)
        t, h, w = (n // p for n, p in zip(cells, spec.patch, strict=True))
        return t * h * w

    keys = spec.text_length + FOLDS
    return Profile(
        f"{width}x{height}, up to {frames} frames",
        (tokens(spec.patch[0] * spec.stride[0] - spec.stride[0] + 1), tokens(frames), tokens(frames)),
        (2, min(USUAL_KEYS, keys), keys),
    )


def build_engine(
    network: Transformer, spec: ModelSpec, profiles: Sequence[Profile], gpu: str, weights: str, options: Options
) -> Path:
    """Return the folder of an engine in the store, built now where it is not there. `weights` is the hash of them.

    Raises ValueError for a GPU that no library here builds for, and where float16 attention would overflow.
    """
    trt = library(gpu)
    if spec.conditioning in ("channels", "control"):
        raise ValueError(
            f"{spec.name} takes pictures or clips as inputs of its own, for which no TensorRT engine is built yet; "
            "take --engine eager or inductor"
        )
    if options.refit and not torch.cuda.is_available():
        raise ValueError(
            f"an engine that takes other weights is built by {trt.__name__} on its GPU only; leave --refit"
        )
    inputs = example(network, spec)
    dtype = dtype_name(inputs["tokens"].dtype)
    most = max(each.tokens[2] for each in profiles)
    if dtype == "float16" and most > HALF_TOKENS:
        raise ValueError(
            f"{most} tokens in float16 overflow in TensorRT's attention, which takes {HALF_TOKENS} at most; take "
            "--dtype bfloat16"
        )
    parts = key_parts(trt, network, dtype, gpu, ANY_WEIGHTS if options.refit else weights)
    shapes = json.dumps([asdict(each) for each in profiles])
    key = Key(KIND, parts | {"shapes": shapes, "options": "stream" if options.stream else ""})

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            graph = Path(scratch) / "graph.onnx"
            write_onnx(network, inputs, graph)
            engine, timings = compile_onnx(trt, graph, profiles, gpu, options)
        (folder / ENGINE).write_bytes(engine)
        if timings is not None:
            (folder / TIMINGS).write_bytes(timings)

    return Store().fetch(key, make, lambda folder: folder)


def key_parts(trt: Any, network: Transformer, dtype: str, gpu: str, weights: str) -> dict[str, str]:
    """Return what an engine's key says besides its profiles."""
    return {
        "weights": weights,
        "network": repr(network.config),
        "code": code_hash(),
        "dtype": dtype,
        "gpu": gpu,
        "libraries": f"{trt.__name__} {trt.__version__}, torch {torch.__version__}",
    }


def engines_for(parts: Mapping[str, str]) -> list[tuple[Entry, list[Profile]]]:
    """Return the engines in the store that have these parts, with their profiles."""
    found = []
    for entry in Store().entries():
        if entry.key.kind == KIND and parts.items() <= entry.key.parts.items():
            with suppress(ValueError, TypeError, KeyError):  # the store's checks refuse it when it is loaded
                found.append((entry, read_profiles(entry.key.parts["shapes"])))
    return found


def read_profiles(shapes: str) -> list[Profile]:
    """Undo what a key says of its profiles."""
    return [Profile(each["name"], tuple(each["tokens"]), tuple(each["keys"])) for each in json.loads(shapes)]


class Parsed:
    """An ONNX file as a library's network; parser and builder live as long, since it points into them."""

    def __init__(self, trt: Any, graph: Path) -> None:
        self.log = make_log(trt)
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.log)
        if not self.parser.parse_from_file(str(graph)):
            reasons = "; ".join(self.parser.get_error(index).desc() for index in range(self.parser.num_errors))
            raise RuntimeError(f"{trt.__name__} does not take the graph: {reasons}")
        relax_attention(trt, self.network)


def compile_onnx(
    trt: Any, graph: Path, profiles: Sequence[Profile], gpu: str, options: Options
) -> tuple[memoryview, bytes | None]:
    """Return (the engine of an ONNX file, the library's timings if it measured any)."""
    parsed = Parsed(trt, graph)
    builder, network = parsed.builder, parsed.network
    config = builder.create_builder_config()
    for profile in profiles:
        config.add_optimization_profile(fill_profile(builder.create_optimization_profile(), network, profile))
    for flag, wanted in ((trt.BuilderFlag.REFIT, options.refit), (trt.BuilderFlag.WEIGHT_STREAMING, options.stream)):
        if wanted:
            config.set_flag(flag)
    timings = None
    if ahead_of_time(trt):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), 0)
    else:
        timings = config.create_timing_cache(known_timings(trt, gpu))
        config.set_timing_cache(timings, False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{trt.__name__} could not build the engine: {parsed.log.last or 'it does not say why'}")
    return memoryview(engine), None if timings is None else bytes(timings.serialize())


def fill_profile(found: Any, network: Any, profile: Profile) -> Any:
    """Give an optimization profile the sizes of every input that has free ones."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if free := varying(tensor.name):
            sizes = [
                [
                    size if axis not in free else (profile.tokens if free[axis] == "L" else profile.keys)[which]
                    for axis, size in enumerate(tensor.shape)
                ]
                for which in range(3)
            ]
            found.set_shape(tensor.name, *sizes)
    return found


def relax_attention(trt: Any, network: Any) -> None:
    """Let the library decompose what it has no fused attention for: float32, and odd head sizes.

    Everywhere else it refuses rather than put the L x L scores into memory.
    """
    for attention in attentions(trt, network):
        query = attention.get_input(0)
        size = query.shape[3]
        attention.decomposable = query.dtype == trt.float32 or size % 8 != 0 or not 16 <= size <= 256


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Yield a network's attentions."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out every layer as its base class
            yield layer.attention


def known_timings(trt: Any, gpu: str) -> bytes:
    """Return the timings that the newest engine of this library and GPU left, so that kernels are measured once."""
    for entry in Store().entries():
        parts = entry.key.parts
        if entry.key.kind == KIND and parts.get("gpu") == gpu and trt.__version__ in parts.get("libraries", ""):
            with suppress(OSError):
                return (Store().folder / entry.name / TIMINGS).read_bytes()
    return b""


def ahead_of_time(trt: Any) -> bool:
    """Tell whether a library builds for GPUs that are not there: `tensorrt_rtx` does."""
    return hasattr(trt, "ComputeCapability")


def architectures(trt: Any) -> list[str]:
    """Return the GPU architectures that a library builds for here, such as sm89."""
    if ahead_of_time(trt):
        return [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [architecture(torch.device("cuda"))] if torch.cuda.is_available() else []


def library(gpu: str) -> Any:
    """Return the library that builds and runs engines of a GPU architecture; ValueError says what to install."""
    installed = [found for name in EXTRAS if (found := importable(name)) is not None]
    for trt in installed:
        if gpu in architectures(trt):
            return trt
    if not installed:
        raise ValueError(
            "engine 'tensorrt' needs TensorRT, which is not installed; install the extra for consumer GPUs, which also "
            "builds where no GPU is: pip install 'dit-runtime[tensorrt-rtx]', or for datacentre GPUs: "
            "pip install 'dit-runtime[tensorrt]'"
        )
    legal = "; ".join(
        f"{trt.__name__} {trt.__version__} builds for {', '.join(architectures(trt)) or 'the GPU of the machine: none'}"
        for trt in installed
    )
    more = "".join(f"; the extra [{extra}] is not installed" for name, extra in EXTRAS.items() if not importable(name))
    raise ValueError(f"no TensorRT here builds for {gpu!r}; legal: {legal}{more}")


def importable(name: str) -> Any:
    """Return a library, None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def make_log(trt: Any) -> Any:
    """Return a logger of a library that keeps the last error and prints nothing."""

    class Log(trt.ILogger):
        last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message

    return Log()


def dtype_name(dtype: torch.dtype) -> str:
    """Return bfloat16 of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
