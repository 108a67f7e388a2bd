"""TensorRT: real engines built by tensorrt_rtx without a GPU, what the network in them is, and what is refused.

Without a driver no library loads an engine: what is bound and profiled is read from the network that it was built of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import runtime
from kernels.tolerance import judge
from runtime.engines import builder, tensorrt
from runtime.engines.builder import Options, Profile, make_profile
from runtime.engines.export import OUTPUT, example, graph_inputs, projected_from, write_onnx
from runtime.engines.store import Store
from tests.published import Tiny, write

trt = pytest.importorskip("tensorrt_rtx", reason="the extra [tensorrt-rtx] is not installed")
pytest.importorskip("onnxscript", reason="the extra [tensorrt-rtx] is not installed whole")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("published")
    write(Tiny(layers=1, head_dim=16, seed=80), folder)
    return runtime.load(folder, dtype="bfloat16")


@pytest.fixture(scope="module")
def graph(tiny: runtime.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "graph.onnx"
    write_onnx(tiny.transformers[0], example(tiny.transformers[0], tiny.spec), file)
    return file


def profiles(model: runtime.Model) -> list[Profile]:
    return [make_profile(model.spec, 64, 64, 17), make_profile(model.spec, 96, 64, 9)]


@pytest.mark.parametrize("gpu", ["sm89", "sm120"])
def test_a_real_engine_is_built_and_kept(
    tiny: runtime.Model, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    given = (tiny.transformers[0], tiny.spec, profiles(tiny), gpu, "abc expert 0", Options())
    folder = builder.build_engine(*given)
    assert (folder / builder.ENGINE).stat().st_size > 100_000
    assert Store().check() == {folder.name: ""}
    monkeypatch.setattr(builder, "compile_onnx", None)
    assert builder.build_engine(*given) == folder
    parts = builder.key_parts(trt, tiny.transformers[0], "bfloat16", gpu, "abc expert 0")
    ((entry, found),) = builder.engines_for(parts)
    assert entry.name == folder.name and found == profiles(tiny)
    assert builder.engines_for(parts | {"weights": "other"}) == []


def test_demo_engines_for_two_gpus(tmp_path: Path) -> None:
    model = runtime.load("demo", dtype="bfloat16")
    network = model.transformers[0]
    write_onnx(network, example(network, model.spec), tmp_path / "graph.onnx")
    for gpu in ("sm89", "sm120"):
        engine, timings = builder.compile_onnx(trt, tmp_path / "graph.onnx", profiles(model)[:1], gpu, Options())
        weights = sum(p.numel() * p.element_size() for p in network.blocks.parameters())
        assert len(engine) > 0.8 * weights and timings is None


def test_network_and_profiles(tiny: runtime.Model, graph: Path) -> None:
    parsed = builder.Parsed(trt, graph)
    network = parsed.network
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    assert sorted(inputs) == ["bias", "keys.0", "rope", "time", "tokens", "values.0"]
    assert tuple(inputs["tokens"].shape) == (1, -1, 16) and tuple(inputs["keys.0"].shape) == (1, -1, 2, 16)
    assert tuple(inputs["rope"].shape) == (-1, 8, 2) and tuple(inputs["bias"].shape) == (1, 1, 1, -1)
    kinds = {name: tensor.dtype for name, tensor in inputs.items()}
    assert kinds["rope"] == kinds["time"] == trt.float32 and kinds["tokens"] == kinds["bias"] == trt.bfloat16
    assert [network.get_output(0).name, network.num_outputs, network.get_output(0).dtype] == [OUTPUT, 1, trt.bfloat16]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    fused = [not attention.decomposable for attention in builder.attentions(trt, network)]
    assert fused == [True, True]  # self and cross
    norms = [layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION]
    assert norms and all(layer.get_output(0).dtype == trt.float32 for layer in norms)
    (one, _) = profiles(tiny)
    filled = builder.fill_profile(parsed.builder.create_optimization_profile(), network, one)
    assert [tuple(size) for size in filled.get_shape("tokens")] == [(1, 16, 16), (1, 80, 16), (1, 80, 16)]
    assert [tuple(size) for size in filled.get_shape("keys.0")] == [(1, 2, 2, 16), (1, 32, 2, 16), (1, 32, 2, 16)]
    assert [size[0] for size in filled.get_shape("rope")] == [16, 80, 80]


def test_float32_attention_may_be_decomposed(tmp_path: Path) -> None:
    write(Tiny(layers=1, head_dim=12, seed=81), tmp_path)
    model = runtime.load(tmp_path)
    write_onnx(model.transformers[0], example(model.transformers[0], model.spec), tmp_path / "graph.onnx")
    engine, _ = builder.compile_onnx(trt, tmp_path / "graph.onnx", profiles(model), "sm89", Options(stream=True))
    assert len(engine) > 100_000


def test_no_operation_of_ours_is_a_plugin_where_the_library_takes_none(graph: Path) -> None:
    """tensorrt_rtx has no way to put one into a network; all of it is decomposed, and standard layers."""
    parsed = builder.Parsed(trt, graph)
    assert not [name for name in dir(parsed.network) if "plugin" in name]
    kinds = {parsed.network.get_layer(i).type for i in range(parsed.network.num_layers)}
    assert not {kind for kind in kinds if "PLUGIN" in kind.name}


def test_what_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no TensorRT here builds for 'sm90'; legal: tensorrt_rtx .* sm75, .* sm120"):
        builder.library("sm90")
    with pytest.raises(ValueError, match="builds for 'h200'"):
        builder.library("h200")
    monkeypatch.setattr(builder, "importable", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dit-runtime\[tensorrt-rtx\]'.*'dit-runtime\[tensorrt\]'"):
        builder.library("sm89")


def test_weights_with_inputs_of_their_own_are_refused(tiny: runtime.Model) -> None:
    spec = replace(tiny.spec, conditioning="channels")
    with pytest.raises(ValueError, match="no TensorRT engine is built yet; take --engine eager or inductor"):
        builder.build_engine(tiny.transformers[0], spec, profiles(tiny), "sm89", "abc", Options())


def test_float16_beyond_its_range_is_refused(tmp_path: Path) -> None:
    write(Tiny(layers=1, head_dim=16), tmp_path)
    model = runtime.load(tmp_path, dtype="float16")
    wide = [Profile("1280x720, up to 81 frames", (3600, 75600, 75600), (2, 128, 520))]
    with pytest.raises(ValueError, match="75600 tokens in float16 overflow .* take --dtype bfloat16"):
        builder.build_engine(model.transformers[0], model.spec, wide, "sm89", "abc", Options())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_needs_a_gpu_says_so(tiny: runtime.Model) -> None:
    with pytest.raises(ValueError, match="runs on an NVIDIA GPU, and the model is on cpu; take --device cuda"):
        tensorrt.build(tiny.transformers[0], 0)
    with pytest.raises(ValueError, match="on its GPU only; leave --refit"):
        builder.build_engine(tiny.transformers[0], tiny.spec, profiles(tiny), "sm89", "abc", Options(refit=True))


def test_frames_at_different_levels_are_refused() -> None:
    assert tensorrt.one_level(torch.tensor([[0.5, 0.5]])).tolist() == [0.5]
    assert tensorrt.one_level(torch.tensor([0.25])).tolist() == [0.25]
    with pytest.raises(ValueError, match="one noise level for all frames, .* take --engine eager or inductor"):
        tensorrt.one_level(torch.tensor([[0.0, 0.5]]))


def test_the_profile_that_covers_a_request_is_chosen(
    tiny: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "compile_onnx", lambda *_: (b"an engine", None))
    monkeypatch.setattr(builder, "write_onnx", lambda *_: None)
    network = tiny.transformers[0]
    with pytest.raises(ValueError, match="Profiles there are: none. Build one with: python -m runtime build --model"):
        tensorrt.choose(trt, network, "sm89", "abc expert 0", "bfloat16", 16, 8)
    builder.build_engine(network, tiny.spec, profiles(tiny), "sm89", "abc expert 0", Options())
    for tokens, index in ((16, 0), (80, 0)):
        assert tensorrt.choose(trt, network, "sm89", "abc expert 0", "bfloat16", tokens, 8)[1] == index
    for tokens, gpu, weights in ((81, "sm89", "abc expert 0"), (80, "sm120", "abc expert 0"), (80, "sm89", "xyz")):
        with pytest.raises(ValueError, match=f"for {gpu} takes {tokens} video tokens") as caught:
            tensorrt.choose(trt, network, gpu, weights, "bfloat16", tokens, 8)
        there = "64x64, up to 17 frames (16 to 80 tokens); 96x64, up to 9 frames (24 to 72 tokens)"
        assert (there in str(caught.value)) == ((gpu, weights) == ("sm89", "abc expert 0"))


def test_a_damaged_engine_is_never_opened(tiny: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "compile_onnx", lambda *_: (b"an engine", None))
    monkeypatch.setattr(builder, "write_onnx", lambda *_: None)
    network = tiny.transformers[0]
    folder = builder.build_engine(network, tiny.spec, profiles(tiny), "sm89", "abc", Options())
    (folder / builder.ENGINE).write_bytes(b"an engime")
    entry, _ = tensorrt.choose(trt, network, "sm89", "abc", "bfloat16", 16, 8)
    with pytest.raises(ValueError, match="has engine.plan corrupted; build it again"):
        tensorrt.open_session(trt, entry, torch.device("cuda"))


STAND_IN = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
"""
# Every name that builder.py and tensorrt.py use, as Class.member; ":n" is how many arguments we give.
USED = [
    "Builder.create_network:1", "Builder.create_builder_config:0", "Builder.create_optimization_profile:0",
    "Builder.build_serialized_network:2", "OnnxParser.parse_from_file:1", "OnnxParser.get_error:1",
    "OnnxParser.num_errors", "ParserError.desc:0", "INetworkDefinition.get_layer:1", "INetworkDefinition.num_layers",
    "INetworkDefinition.get_input:1", "INetworkDefinition.num_inputs", "ITensor.name", "ITensor.shape", "ITensor.dtype",
    "ILayer.type", "LayerType.ATTENTION_INPUT", "IAttentionInputLayer.attention", "IAttention.get_input:1",
    "IAttention.decomposable", "IOptimizationProfile.set_shape:4", "IBuilderConfig.add_optimization_profile:1",
    "IBuilderConfig.set_flag:1", "BuilderFlag.REFIT", "BuilderFlag.WEIGHT_STREAMING",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IBuilderConfig.create_timing_cache:1",
    "IBuilderConfig.set_timing_cache:2", "ITimingCache.serialize:0", "Runtime.deserialize_cuda_engine:1",
    "ICudaEngine.streamable_weights_size", "ICudaEngine.weight_streaming_budget_v2",
    "ICudaEngine.get_weight_streaming_automatic_budget:0", "ICudaEngine.create_execution_context:1",
    "ICudaEngine.device_memory_size_v2", "ICudaEngine.get_tensor_profile_shape:2",
    "ICudaEngine.create_runtime_config:0",
    "IRuntimeConfig.set_execution_context_allocation_strategy:1", "ExecutionContextAllocationStrategy.USER_MANAGED",
    "IExecutionContext.set_device_memory:2",
    "IExecutionContext.set_optimization_profile_async:2", "IExecutionContext.set_input_shape:2",
    "IExecutionContext.set_tensor_address:2", "IExecutionContext.get_tensor_shape:1",
    "IExecutionContext.execute_async_v3:1", "Refitter.refit_cuda_engine:0", "OnnxParserRefitter.refit_from_file:1",
    "ILogger.ERROR", "ILogger.INTERNAL_ERROR", "float32", "__version__",
]  # fmt: skip
USED_OF_RTX = [
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability:2", "ComputeCapability.SM89",
    "IRuntimeConfig.create_runtime_cache:0",
    "IRuntimeConfig.set_runtime_cache:1", "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER", "IRuntimeCache.serialize:0", "IRuntimeCache.deserialize:1",
    "IExecutionContext.is_stream_capturable:1",
]  # fmt: skip
READ = """
import importlib, re, sys
library = importlib.import_module(sys.argv[1])
for use in sys.argv[2:]:
    path, _, count = use.partition(":")
    found = library
    for part in path.split("."):
        found = getattr(found, part)
    if not count:
        continue
    # pybind11 puts the signatures, one per overload, into the docstring.
    takes = False
    for signature in re.findall(re.escape(path.split(".")[-1]) + r"\\((self[^\\n]*)\\) ->", found.__doc__):
        parts = re.split(r", (?=\\w+: )", signature)[1:]
        takes |= sum("=" not in part for part in parts) <= int(count) <= len(parts)
    assert takes, (use, found.__doc__[:300])
print("all there")
"""


def read_names(library: str, names: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", READ, library, *names]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr


def test_the_names_we_use_are_in_tensorrt_rtx() -> None:
    assert read_names("tensorrt_rtx", USED + USED_OF_RTX, {}) == "all there"


@pytest.mark.skipif(find_spec("tensorrt_bindings") is None, reason="the wheel tensorrt-cu13-bindings is not installed")
def test_the_names_we_use_are_in_tensorrt(tmp_path: Path) -> None:
    """The bindings are real; empty functions stand in for the libraries, which are not on any public index."""
    (tmp_path / "empty.c").write_text(STAND_IN)
    major = runtime_version("tensorrt-cu13-bindings")
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = tmp_path / f"lib{name}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, tmp_path / "empty.c"], check=True)
    assert read_names("tensorrt_bindings", USED, {"LD_LIBRARY_PATH": str(tmp_path)}) == "all there"
    assert "AttributeError" in read_names("tensorrt_bindings", ["Builder.gone"], {"LD_LIBRARY_PATH": str(tmp_path)})


def runtime_version(package: str) -> str:
    from importlib.metadata import version

    return version(package).partition(".")[0]


def test_texts_of_many_lengths_fit_one_buffer(tiny: runtime.Model) -> None:
    generator = torch.Generator().manual_seed(2)
    run = object.__new__(tensorrt.Run)
    network = tiny.transformers[0]
    for length in (19, 7):
        projected = network.project([torch.randn(length, 16, generator=generator)], tiny.spec.text_length, (1, 4, 4))
        inputs = graph_inputs(network, torch.randn(1, 4, 1, 4, 4), torch.tensor([0.5]).double(), projected)
        if length == 19:
            run.inputs = {name: tensorrt.with_room(name, tensor, 32) for name, tensor in inputs.items()}
        run.fill(inputs)
        roomy = projected_from({name: run.inputs[name] for name in inputs if name not in ("tokens", "time")})
        assert roomy.keys[0].shape[1] == 32
        tight = network.flow(inputs["tokens"], inputs["time"], projected)
        verdict = judge(network.flow(run.inputs["tokens"], run.inputs["time"], roomy), tight)
        assert verdict.correct, verdict
