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
    SPARE,
    Profile,
    ahead_of_time,
    dtype_name,
    engines_for,
    key_parts,
    library,
    make_log,
)  # fmt: skip
from runtime.engines.export import MASKED, OUTPUT, graph_inputs, varying, write_onnx
from runtime.engines.store import Damaged, Entry, Key, Store, architecture
from runtime.models.spec import Context, Denoiser, Projected, Transformer
from runtime.trace import note, span

KERNELS = "runtime.cache"  # what tensorrt_rtx compiled for this very GPU at first use
KEPT_RUNS = 4  # sizes whose buffers and graphs stay
ROUND_KEYS = 64  # text keys are filled up to a multiple, so that prompts of many lengths share a graph

# Open engines of each transformer, by name, with the hash of the weights that they hold.
_sessions: WeakKeyDictionary[nn.Module, dict[str, tuple[str, Session]]] = WeakKeyDictionary()


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
    choices: dict[tuple[str, int, int], tuple[Entry, int]] = {}

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        projected = context.experts[expert]
        sigma = one_level(sigma)
        dtype = dtype_name(projected.keys[0].dtype)
        velocities = []
        for row in range(projected.keys[0].shape[0]):
            one = projected.row(row)
            sizes = dtype, one.rope.shape[0], one.keys[0].shape[1]
            if sizes not in choices:
                choices[sizes] = choose(trt, transformer, gpu, f"{weights} expert {expert}", *sizes)
            entry, index = choices[sizes]
            if sessions.get(entry.name, (None, None))[0] != weights:  # a LoRA changes the weights of a loaded model
                with span("denoise/load"):
                    sessions.pop(entry.name, None)
                    session = open_session(trt, entry, device)
                    if entry.key.parts["weights"] == ANY_WEIGHTS:
                        session.refit(transformer, graph_inputs(transformer, x, sigma, one))
                    sessions[entry.name] = weights, session
            velocities.append(sessions[entry.name][1].run(transformer, x, sigma, one, index))
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
    trt: Any, network: Transformer, gpu: str, weights: str, dtype: str, tokens: int, keys: int
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
        f"--frames N --engine tensorrt --gpu {gpu} --dtype {dtype}, with each --lora that is asked for"
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
    """One engine on one GPU; its runs share the memory for activations, since one works at a time."""

    def __init__(self, trt: Any, folder: Path, device: torch.device) -> None:
        self.trt, self.device, self.name = trt, device, folder.name
        self.log = make_log(trt)
        self.runtime = trt.Runtime(self.log)
        plan = (folder / ENGINE).read_bytes()
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            free, _ = torch.cuda.mem_get_info(device)
            if len(plan) > free:
                raise ValueError(
                    f"the engine {folder.name} has {len(plan) >> 20} MiB, and {free >> 20} MiB are free on the GPU; "
                    "build it with --stream, so that weights may stay in the host's memory, or give some free"
                )
            raise Damaged(f"is refused by {trt.__name__} ({self.log.last})")
        self._stream_weights()
        self.memory = torch.empty(self.engine.device_memory_size_v2, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.runs: dict[tuple, Run] = {}

    def _stream_weights(self) -> None:
        """Where the weights do not fit into the free memory, keep a part of them on the host."""
        size = self.engine.streamable_weights_size
        free, _ = torch.cuda.mem_get_info(self.device)
        if size > SPARE * free:
            self.engine.weight_streaming_budget_v2 = min(self.engine.get_weight_streaming_automatic_budget(), size)
            note(f"{size >> 20} MiB of weights and {free >> 20} MiB free on the GPU: TensorRT streams some of them")

    def run(
        self, network: Transformer, x: torch.Tensor, sigma: torch.Tensor, projected: Projected, profile: int
    ) -> torch.Tensor:
        """Return the velocity [1, C, T, H, W] float32 of one row."""
        inputs = graph_inputs(network, x, sigma, projected)
        most = self.engine.get_tensor_profile_shape("bias", profile)[2][3]
        keys = min(-(-inputs["bias"].shape[3] // ROUND_KEYS) * ROUND_KEYS, most)
        sizes = (profile, inputs["tokens"].shape[1], keys)
        if sizes not in self.runs:
            if len(self.runs) >= KEPT_RUNS:
                self.runs.pop(next(iter(self.runs)))
            self.runs[sizes] = Run(self, inputs, *sizes)
        return network.unpatchify(self.runs[sizes](inputs), x.shape).float()

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
    """An engine at one number of tokens and text keys: buffers, and a CUDA graph where it can be captured.

    It has an execution context of its own, because changing a context spoils the graphs captured from it.
    """

    def __init__(self, session: Session, inputs: dict[str, torch.Tensor], profile: int, tokens: int, keys: int) -> None:
        self.session = session
        self.inputs = {name: with_room(name, tensor, keys) for name, tensor in inputs.items()}
        self.context, kernels = self._make_context()
        stream = session.stream
        stream.wait_stream(torch.cuda.current_stream(session.device))
        with torch.cuda.stream(stream):
            self.fill(inputs)
            self.out = self._bind(profile)
            self.execute()  # once plainly: the library finishes its own set-up in it
            stream.synchronize()
            self.graph = self._capture()
        if kernels is not None:
            self._keep(kernels, f"{profile} {tokens} {keys}")

    def _make_context(self) -> tuple[Any, Any]:
        """Return (an execution context on the session's memory, the library's cache of kernels if it has one)."""
        trt, engine, memory = self.session.trt, self.session.engine, self.session.memory
        config, kernels = engine.create_runtime_config(), None
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if ahead_of_time(trt):
            kernels = config.create_runtime_cache()
            for kept in self._kept():
                kernels.deserialize((kept / KERNELS).read_bytes())
            config.set_runtime_cache(kernels)
            # Else a graph is captured with kernels for any shape, while the right ones are still being compiled.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = engine.create_execution_context(config)
        context.set_device_memory(memory.data_ptr(), memory.numel())
        return context, kernels

    def _kernels_key(self, sizes: str) -> Key:
        gpu = f"{torch.cuda.get_device_name(self.session.device)}, CUDA {torch.version.cuda}"
        return Key("tensorrt_kernels", {"engine": self.session.name, "gpu": gpu, "sizes": sizes})

    def _kept(self) -> list[Path]:
        """Return the folders of kernels that were compiled for this engine on this GPU, whatever the sizes."""
        wanted = self._kernels_key("").parts.items() - {("sizes", "")}
        keys = [entry.key for entry in Store().entries() if wanted <= entry.key.parts.items()]
        return [found for key in keys if (found := Store().find(key)) is not None]

    def _keep(self, kernels: Any, sizes: str) -> None:
        """Put kernels compiled for this GPU into the store; a store that cannot be written costs time only."""
        content = bytes(kernels.serialize())
        try:
            Store().fetch(
                self._kernels_key(sizes), lambda folder: (folder / KERNELS).write_bytes(content), lambda folder: None
            )
        except OSError as error:
            note(f"kernels compiled for this GPU are not kept: {error}")

    def _bind(self, profile: int) -> torch.Tensor:
        """Give the context its profile, shapes and addresses; return the tensor that the velocity goes to."""
        self.context.set_optimization_profile_async(profile, self.session.stream.cuda_stream)
        for name, tensor in self.inputs.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT does not take {name} {list(tensor.shape)}: {self.session.log.last}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape(OUTPUT))
        out = torch.empty(shape, dtype=self.inputs["tokens"].dtype, device=self.session.device)
        self.context.set_tensor_address(OUTPUT, out.data_ptr())
        return out

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Capture one execution; tensorrt_rtx says whether it can be."""
        ask = getattr(self.context, "is_stream_capturable", None)
        if ask is not None and not ask(self.session.stream.cuda_stream):
            note("this TensorRT engine cannot be captured as a CUDA graph; it runs without")
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.session.stream):
            self.execute()
        return graph

    def execute(self) -> None:
        """Run on the session's stream."""
        if not self.context.execute_async_v3(self.session.stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed: {self.session.log.last}")

    def fill(self, inputs: dict[str, torch.Tensor]) -> None:
        """Copy inputs into the buffers; what is left of the text keys weighs nothing."""
        self.inputs["bias"].fill_(MASKED)
        for name, tensor in inputs.items():
            place = self.inputs[name]
            for axis, size in enumerate(tensor.shape):
                place = place.narrow(axis, 0, size)
            place.copy_(tensor)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the velocity's tokens [1, L, C]; the next call overwrites them."""
        self.fill(inputs)
        if self.graph is not None:
            self.graph.replay()
            return self.out
        current = torch.cuda.current_stream(self.session.device)
        self.session.stream.wait_stream(current)
        self.execute()
        current.wait_stream(self.session.stream)
        return self.out


def with_room(name: str, tensor: torch.Tensor, keys: int) -> torch.Tensor:
    """Return zeros shaped as an input, with so many text keys."""
    free = varying(name)
    return tensor.new_zeros([keys if free.get(axis) == "S" else size for axis, size in enumerate(tensor.shape)])
