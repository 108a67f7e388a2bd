"""The transformer as an ONNX graph: checked by onnx, run by ONNX Runtime, equal to eager at shapes not traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime
from runtime.denoising import prepare_context
from runtime.engines.export import OUTPUT, example, export, graph_inputs, projected_from, write_onnx
from runtime.kernels.qk_norm_rope import rotated
from tests.published import Tiny, relative, write

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime, a test dependency, is not installed")

CONFIGS = {"tiny": Tiny(layers=1, seed=60), "no-norm": Tiny(heads=3, head_dim=16, layers=1, cross_norm=False, seed=61)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Name -> (model, ONNX file)."""
    made = {}
    for name in (*CONFIGS, "demo"):
        folder = tmp_path_factory.mktemp(name)
        if name in CONFIGS:
            write(CONFIGS[name], folder / "model")
        model = runtime.load(folder / "model" if name in CONFIGS else "demo")
        network = model.transformers[0]
        write_onnx(network, example(network, model.spec), folder / "graph.onnx")
        made[name] = model, folder / "graph.onnx"
    return made


def arguments(model: runtime.Model, shape: tuple[int, int, int], text: int) -> tuple:
    """A Denoiser's arguments, of one prompt of `text` tokens."""
    generator = torch.Generator().manual_seed(5)
    channels = model.spec.latent_channels
    x = torch.randn(1, channels, *shape, generator=generator)
    texts = [torch.randn(text, model.transformers[0].text_dim, generator=generator)]
    context = prepare_context(model, texts, (channels, *shape))
    return x, torch.tensor([0.7312], dtype=torch.float64), context.experts[0]


@pytest.mark.parametrize("name", [*CONFIGS, "demo"])
@pytest.mark.parametrize(("shape", "text"), [((1, 4, 6), 24), ((5, 8, 10), 7)])
def test_onnx_runtime_equals_eager(graphs: dict, name: str, shape: tuple[int, int, int], text: int) -> None:
    model, file = graphs[name]
    network = model.transformers[0]
    given = arguments(model, shape, text)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = {name: tensor.detach().numpy() for name, tensor in graph_inputs(network, *given).items()}
    (found,) = session.run([OUTPUT], inputs)
    with torch.inference_mode():
        eager = network(*given)
    velocity = network.unpatchify(torch.from_numpy(found), given[0].shape)
    assert relative(velocity, eager) <= 1e-4


@pytest.mark.parametrize("name", [*CONFIGS, "demo"])
def test_the_graph_is_standard_and_dynamic(graphs: dict, name: str) -> None:
    model, file = graphs[name]
    graph = onnx.load(file, load_external_data=False).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    blocks = len(model.transformers[0].blocks)
    assert sum(node.op_type == "Attention" for node in graph.node) == 2 * blocks
    free = {given.name: [d.dim_param for d in given.type.tensor_type.shape.dim if d.dim_param] for given in graph.input}
    assert free["tokens"] == ["L"] and free["rope"] == ["L"] and free["bias"] == ["S"] and free["time"] == []
    assert [free[f"keys.{i}"] + free[f"values.{i}"] for i in range(blocks)] == [["S", "S"]] * blocks
    assert [output.name for output in graph.output] == [OUTPUT]
    assert {name.removeprefix("network.") for name in (i.name for i in graph.initializer) if "network" in name} <= {
        name for name, _ in model.transformers[0].named_parameters()
    }
    # Strongly typed: no double anywhere, and what stays float32 is float32.
    kinds = {tensor.data_type for tensor in graph.initializer} | {i.type.tensor_type.elem_type for i in graph.input}
    assert onnx.TensorProto.DOUBLE not in kinds and onnx.TensorProto.COMPLEX64 not in kinds


def test_bfloat16_keeps_the_float32_islands(tmp_path: Path) -> None:
    write(Tiny(layers=1), tmp_path)
    model = runtime.load(tmp_path, dtype="bfloat16")
    network = model.transformers[0]
    write_onnx(network, example(network, model.spec), tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx", load_external_data=False).graph
    kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert kinds["rope"] == kinds["time"] == onnx.TensorProto.FLOAT
    assert kinds["tokens"] == kinds["keys.0"] == kinds["bias"] == onnx.TensorProto.BFLOAT16
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in graph.node:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
        if node.op_type == "Attention":
            assert types[node.output[0]] == onnx.TensorProto.BFLOAT16, node.name


def test_exported_program_has_no_operation_of_ours(graphs: dict) -> None:
    model, _ = graphs["tiny"]
    network = model.transformers[0]
    program = export(network, example(network, model.spec))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "runtime" in name or "complex" in name]


def test_inputs_and_projected_are_inverse() -> None:
    model = runtime.load("demo")
    x, sigma, projected = arguments(model, (1, 4, 4), 9)
    inputs = graph_inputs(model.transformers[0], x, sigma, projected)
    back = projected_from({name: inputs[name] for name in inputs if name not in ("tokens", "time")})
    assert all(a is b for a, b in zip(back.keys + back.values, projected.keys + projected.values, strict=True))
    assert back.rope is projected.rope and torch.equal(back.bias, projected.bias)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("skip", [(0, 0), (2, 1)])
def test_real_rotation_equals_the_definition(pairing: str, skip: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(2, 9, 3, 8, generator=generator)
    angles = torch.randn(9 - sum(skip), 1, 4, generator=generator)
    table = torch.stack([angles.cos(), angles.sin()], 3)
    program = torch.export.export(Rotation(pairing, skip), (h, table))
    assert torch.allclose(program.module()(h, table), rotated(h.clone(), table, pairing, skip), atol=1e-6)


class Rotation(torch.nn.Module):
    def __init__(self, pairing: str, skip: tuple[int, int]) -> None:
        super().__init__()
        self.pairing, self.skip = pairing, skip

    def forward(self, h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return rotated(h, table, self.pairing, self.skip)
