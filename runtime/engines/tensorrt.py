"""The tensorrt engine: runs what `builder` made ahead, on an NVIDIA GPU, with CUDA graphs.

Patches and velocity stay PyTorch's; between them one engine takes the tokens, the time, the projected text and the
rotary table, all by address. One row at a time: a prompt's tokens are many, and one set of profiles serves all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from runtime.engines.builder import (
    ANY_WEIGHTS,
    ENGINE,
    Profile,
    ahead_of_time,
    dtype_name,
    engines_for,
    key_parts,
    library,
    make_log,
)  # fmt: skip
from runtime.engines.export import OUTPUT, graph_inputs, write_onnx
from runtime.engines.store import Damaged, Entry, Key, Store, architecture
from runtime.models.spec import Context, Denoiser, Projected, Transformer
from runtime.trace import note, span

KERNELS = "runtime.cache"  # what tensorrt_rtx compiled for this very GPU at first use
SPARE = 0.7  # of the free memory that weights may take; the rest is for activations
KEPT_RUNS = 4  # two rows of two requests
MOVING = ("tokens", "time", "bias")  # inputs that are new at each step; the rest stays over a request

_sessions: WeakKeyDictionary[nn.Module, dict[str, Session]] = WeakKeyDictionary()


def build(transformer: Transformer, expert: int, weights: str = "") -> Denoiser:
    """Return a Denoiser that runs engines of the store; `weights` is the hash of the model's.

    Raises ValueError without an NVIDIA GPU, without the library, and at a call whose sizes no engine takes.
    """
    device = next(cast(nn.Module, transformer).parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"engine 'tensorrt' runs on an NVIDIA GPU, and the model is on {device}; take --device cuda, or --engine "
            "eager or inductor"
        )
    gpu = architecture(device)
    trt = library(gpu)
    sessions = _sessions.setdefault(cast(nn.Module, transformer), {})

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        projected = context.experts[expert]
        sigma = one_level(sigma)
        dtype = dtype_name(projected.keys[0].dtype)
        velocities = []
        for row in range(projected.keys[0].shape[0]):
            one = projected.row(row)
            tokens, keys = one.rope.shape[0], one.keys[0].shape[1]
            entry, index = choose(trt, transformer, dtype, gpu, f"{weights} expert {expert}", tokens, keys)
            if entry.name not in sessions:
                with span("denoise/load"):
                    sessions[entry.name] = session = open_session(trt, entry, device)
                    if entry.key.parts["weights"] == ANY_WEIGHTS:
                        session.refit(transformer, graph_inputs(transformer, x, sigma, one))
            velocities.append(sessions[entry.name].run(transformer, x, sigma, one, index))
        return torch.cat(velocities)

    return denoise


def one_level(sigma: torch.Tensor) -> torch.Tensor:
    """Return sigma [1] of [1] or [1, T] that are all the same; ValueError for frames at different levels."""
    if not (sigma == sigma.flatten()[0]).all():
        raise ValueError(
            "TensorRT engines take one noise level for all frames, and this task holds some of them clean; take "
            "--engine eager or inductor"
        )
    return sigma.flatten()[:1]


def choose(
    trt: Any, network: Transformer, dtype: str, gpu: str, weights: str, tokens: int, keys: int
) -> tuple[Entry, int]:
    """Return (an engine in the store, the index of its profile) for so many tokens and text keys.

    Raises ValueError that names the profiles there are and how to build another.
    """
    known: list[Profile] = []
    for of in (weights, ANY_WEIGHTS):
        for entry, profiles in engines_for(key_parts(trt, network, dtype, gpu, of)):
            for index, profile in enumerate(profiles):
                if profile.takes(tokens, keys):
                    return entry, index
            known += profiles
    there = "; ".join(f"{p.name} ({p.tokens[0]} to {p.tokens[2]} tokens)" for p in known) or "none"
    raise ValueError(
        f"no TensorRT engine of this model in {dtype} for {gpu} takes {tokens} video tokens and {keys} text keys. "
        f"Profiles there are: {there}. Build one with: python -m runtime build --model MODEL --size WIDTHxHEIGHT "
        f"--frames N --engine tensorrt --gpu {gpu} --dtype {dtype}"
    )


def open_session(trt: Any, entry: Entry, device: torch.device) -> Session:
    """Load an engine after checking every byte; ValueError where it is damaged, with what to do."""
    try:
        return Session(trt, Store().verified(entry.key), device)
    except (Damaged, FileNotFoundError) as damage:
        raise ValueError(
            f"the engine {entry.name} {damage or 'is gone'}; build it again as before: a damaged one is replaced"
        ) from damage


class Session:
    """One engine on one GPU."""

    def __init__(self, trt: Any, folder: Path, device: torch.device) -> None:
        self.trt, self.device = trt, device
        self.log = make_log(trt)
        self.runtime = trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if self.engine is None:
            raise Damaged(f"is refused by {trt.__name__} ({self.log.last})")
        self._stream_weights()
        self.kernels: Any = None
        self.context = self._make_context(folder.name)
        self.stream = torch.cuda.Stream(device)
        self.profile = 0
        self.runs: dict[tuple, Run] = {}

    def _stream_weights(self) -> None:
        """Where the weights do not fit into the free memory, keep a part of them on the host."""
        size = self.engine.streamable_weights_size
        free, _ = torch.cuda.mem_get_info(self.device)
        if size > SPARE * free:
            self.engine.weight_streaming_budget_v2 = min(self.engine.get_weight_streaming_automatic_budget(), size)
            note(f"{size >> 20} MiB of weights and {free >> 20} MiB free on the GPU: TensorRT streams some of them")

    def _make_context(self, name: str) -> Any:
        """Make the execution context; tensorrt_rtx compiles for this GPU at first use, and the store keeps that."""
        if not ahead_of_time(self.trt):
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        self.kernels = config.create_runtime_cache()
        gpu = f"{torch.cuda.get_device_name(self.device)}, CUDA {torch.version.cuda}"
        self.kernels_key = Key("tensorrt_kernels", {"engine": name, "gpu": gpu})
        if (kept := Store().find(self.kernels_key)) is not None:
            self.kernels.deserialize((kept / KERNELS).read_bytes())
        config.set_runtime_cache(self.kernels)
        # Else the first runs, and a graph captured of them, take kernels for any shape while others are compiled.
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.engine.create_execution_context(config)

    def keep_kernels(self) -> None:
        """Put what was compiled for this GPU into the store; a store that cannot be written costs time only."""
        if self.kernels is None:
            return
        content = bytes(self.kernels.serialize())
        try:
            Store().fetch(self.kernels_key, lambda folder: (folder / KERNELS).write_bytes(content), lambda folder: None)
        except OSError as error:
            note(f"kernels compiled for this GPU are not kept: {error}")

    def run(
        self, network: Transformer, x: torch.Tensor, sigma: torch.Tensor, projected: Projected, profile: int
    ) -> torch.Tensor:
        """Return the velocity [1, C, T, H, W] float32 of one row."""
        inputs = graph_inputs(network, x, sigma, projected)
        fixed = tuple(tensor.data_ptr() for name, tensor in inputs.items() if name not in MOVING)
        key = (profile, *(tuple(inputs[name].shape) for name in MOVING), fixed)
        if key not in self.runs:
            if len(self.runs) >= KEPT_RUNS:
                self.runs.pop(next(iter(self.runs)))
            self.runs[key] = Run(self, inputs, profile)
            self.keep_kernels()
        return network.unpatchify(self.runs[key](inputs), x.shape).float()

    def bind(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        """Give the context its profile, shapes and addresses; return the tensor that the velocity goes to."""
        if self.profile != profile:
            self.context.set_optimization_profile_async(profile, self.stream.cuda_stream)
            self.profile = profile
        for name, tensor in inputs.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape(OUTPUT))
        out = torch.empty(shape, dtype=inputs["tokens"].dtype, device=self.device)
        self.context.set_tensor_address(OUTPUT, out.data_ptr())
        return out

    def execute(self) -> None:
        """Run what is bound, on the session's stream."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed: {self.log.last}")

    def capturable(self) -> bool:
        """Tell whether runs can be captured as CUDA graphs; tensorrt has no question for it and always can."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or ask(self.stream.cuda_stream)

    def refit(self, network: Transformer, inputs: dict[str, torch.Tensor]) -> None:
        """Put a model's weights into an engine that was built to take any."""
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(False):
            graph = Path(scratch) / "graph.onnx"
            write_onnx(network, {name: tensor.clone() for name, tensor in inputs.items()}, graph)
            refitter = self.trt.Refitter(self.engine, self.log)
            parser = self.trt.OnnxParserRefitter(refitter, self.log)
            if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
                raise RuntimeError(f"TensorRT does not take the weights: {self.log.last}")


class Run:
    """An engine at one set of sizes and addresses, as a CUDA graph where it can be captured."""

    def __init__(self, session: Session, inputs: dict[str, torch.Tensor], profile: int) -> None:
        self.session, self.profile = session, profile
        self.kept = inputs  # while they live, their addresses are nobody else's
        self.inputs = {
            name: tensor.clone() if name in MOVING else tensor.contiguous() for name, tensor in inputs.items()
        }
        self.graph: torch.cuda.CUDAGraph | None = None
        session.stream.wait_stream(torch.cuda.current_stream(session.device))
        with torch.cuda.stream(session.stream):
            self.out = session.bind(self.inputs, profile)
            session.execute()  # once plainly: the library finishes its own set-up in it
            session.stream.synchronize()
            if session.capturable():
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=session.stream):
                    session.execute()
            else:
                note("this TensorRT engine cannot be captured as a CUDA graph; it runs without")

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run on new tokens, time and bias; the result is overwritten by the next call."""
        for name in MOVING:
            self.inputs[name].copy_(inputs[name])
        if self.graph is not None:
            self.graph.replay()
            return self.out
        current = torch.cuda.current_stream(self.session.device)
        self.session.stream.wait_stream(current)
        self.out = self.session.bind(self.inputs, self.profile)
        self.session.execute()
        current.wait_stream(self.session.stream)
        return self.out
