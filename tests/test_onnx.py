"""The ONNX file: names, sizes, metadata, cleanliness, quantization, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt import reference
from graphopt.ir import Graph, Origin, TensorType, Value
from graphopt.onnx import cleanup, export, export_onnx, lowering, naming
from graphopt.onnx.lowering import lower

BATCH = 2


def build(*shapes: tuple[int, ...]) -> tuple[Graph, list[Value]]:
    """A graph with float inputs of the given shapes, of which the first size is free."""
    graph = Graph({"batch": BATCH})
    values = [
        graph.add_input(f"x{index}", TensorType(torch.float32, shape), {0: "batch"})
        for index, shape in enumerate(shapes)
    ]
    return graph, values


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    results: list[np.ndarray] = session.run(None, feed)
    return results


# -- names, sizes, metadata ---------------------------------------------------------------------


class Branches(nn.Module):
    """Several inputs with two free sizes, and results in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Any]:
        hidden = self.body(self.embedding(ids) * weights.unsqueeze(-1))
        return {"hidden": hidden, "pooled": (hidden.mean(1), hidden.amax(1)), "weights": weights}


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    free = {0: "batch", 1: "tokens"}
    inputs = {"ids": torch.randint(20, (2, 5)), "weights": torch.rand(2, 5)}
    graph = graphopt.trace(Branches().eval(), inputs, dynamic={"ids": free, "weights": free})
    path = tmp_path_factory.mktemp("onnx") / "branches.onnx"
    exported = export_onnx(graph, path, pipeline=("dead-code", "fold-batch-norm"))
    assert exported.verdict is not None
    assert exported.verdict.runs == 2
    assert "largest error" in str(exported)
    return path


def test_inputs_and_outputs_are_named_as_in_the_model(branches: Path) -> None:
    model = onnx.load(branches)
    assert [value.name for value in model.graph.input] == ["ids", "weights"]
    outputs = ["hidden", "pooled_0", "pooled_1", "weights_2"]
    assert [value.name for value in model.graph.output] == outputs


def test_free_sizes_are_named_dimensions(branches: Path) -> None:
    model = onnx.load(branches)
    assert [shape_of(value) for value in model.graph.input] == [["batch", "tokens"]] * 2
    assert shape_of(model.graph.output[0]) == ["batch", "tokens", 8]
    assert shape_of(model.graph.output[1]) == ["batch", 8]
    hidden, mean, _, weights = run(branches, torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7))
    assert (hidden.shape, mean.shape, weights.shape) == ((3, 7, 8), (3, 8), (3, 7))


def test_nodes_are_named_after_modules(branches: Path) -> None:
    names = {node.op_type: node.name for node in onnx.load(branches).graph.node}
    assert names["Gather"] == "embedding/Gather"
    assert names["MatMul"] == "body.0/MatMul"
    assert names["Relu"] == "body.1/Relu"
    every = [node.name for node in onnx.load(branches).graph.node]
    assert len(set(every)) == len(every)


def test_the_file_says_what_made_it(branches: Path) -> None:
    model = onnx.load(branches)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {
        "graphopt.version": graphopt.__version__,
        "graphopt.pipeline": "dead-code, fold-batch-norm",
    }
    assert (model.producer_name, model.producer_version) == ("graphopt", graphopt.__version__)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    assert relu.doc_string == "module 'body.1', operator aten.relu (%relu)"
    assert not relu.metadata_props  # part of the format from IR version 10 on only


@dataclass
class Pair:
    first: Any
    second: Any


torch.export.register_dataclass(Pair)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (0, ["output"]),
        ((0, 0), ["output_0", "output_1"]),
        ([0, {"a": 0}], ["output_0", "output_1_a"]),
        ({"b": 0, "a": [0, 0]}, ["b", "a_0", "a_1"]),
        ({1: 0}, ["output_1"]),
        (Pair(0, (0, 0)), ["first", "second_0", "second_1"]),
    ],
)
def test_output_names(result: Any, names: list[str]) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    assert naming.output_names(spec, len(leaves)) == names


def test_outputs_that_are_inputs_constants_literals_or_twice_the_same(tmp_path: Path) -> None:
    graph, (x,) = build((BATCH, 3))
    y = graph.add("aten.relu", x)
    constant = graph.constant(torch.arange(3.0), "constant")
    graph.set_outputs([x, y, None, y, constant, 5])
    export_onnx(graph, tmp_path / "model.onnx")
    given = torch.randn(4, 3)
    results = run(tmp_path / "model.onnx", given)
    expected = [given, given.relu(), given.relu(), torch.arange(3.0)]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted.numpy())
    names = [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names == ["output_0", "output_1", "output_3", "output_4"]


# -- cleanliness --------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Hardsigmoid()
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(48, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shuffled = x.reshape(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        left, right = (shuffled * self.gate(x)).chunk(2, 1)
        result: Tensor = self.head(torch.cat([right, left], 1))
        return result


class Windowed(nn.Module):
    """Attention in shifted windows, with a mask that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        shifted = torch.roll(functional.pad(self.norm(x), (0, 0, 0, 2, 0, 2)), (-1, -1), (1, 2))
        tiles = shifted.reshape(batch, 2, 4, 2, 4, channels).permute(0, 1, 3, 2, 4, 5)
        windows = tiles.reshape(batch * 4, 16, channels)
        qkv = self.qkv(windows).reshape(batch * 4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mask = torch.zeros(16, 16).masked_fill(torch.eye(16) > 0, -100.0)
        attended = functional.scaled_dot_product_attention(query, key, value, mask)
        merged = self.project(attended.transpose(1, 2).reshape(batch * 4, 16, channels))
        untiled = merged.reshape(batch, 2, 2, 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        image = torch.roll(untiled.reshape(batch, 8, 8, channels), (1, 1), (1, 2))
        return x + image[:, :height, :width]


class Masked(nn.Module):
    """An encoder over tokens, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.position = nn.Embedding(16, 8)
        self.layer = nn.Linear(8, 24)
        self.feed_forward = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embedding(ids) + self.position(torch.arange(length))
        shape = (batch, length, 2, 4)
        query, key, value = (t.reshape(shape).transpose(1, 2) for t in self.layer(x).chunk(3, -1))
        visible = (ids != 1)[:, None, None, :].expand(batch, 1, length, length)
        attended = functional.scaled_dot_product_attention(query, key, value, visible)
        x = x + attended.transpose(1, 2).reshape(batch, length, 8)
        result: Tensor = self.feed_forward(x)
        return result


def count_nodes(model: onnx.ModelProto) -> int:
    return len(model.graph.node)


def basic_level(path: Path) -> onnx.ModelProto:
    """What onnxruntime's basic optimizations make of a file."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".basic.onnx"))
    onnxruntime.InferenceSession(path, options)
    return onnx.load(path.with_suffix(".basic.onnx"))


def assert_nothing_foldable(model: onnx.ModelProto) -> None:
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert node.op_type not in ("Identity", "Constant", "Dropout"), node.name
        operands = [name for name in node.input if name]
        foldable = all(name in known for name in operands)
        assert not foldable or node.op_type == "DequantizeLinear", node.name


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Convolutional(), torch.randn(2, 3, 16, 16)),
        (Windowed(), torch.randn(2, 6, 6, 8)),
        (Masked(), torch.randint(20, (2, 7))),
    ],
    ids=lambda part: type(part).__name__,
)
def test_no_optimizer_finds_anything_left(
    model: nn.Module, example: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    graphopt.optimize(model.eval(), example).export_onnx(path)
    exported = onnx.load(path)
    assert_nothing_foldable(exported)
    assert count_nodes(exported) <= count_nodes(onnxslim.slim(str(path)))
    assert count_nodes(exported) <= count_nodes(basic_level(path))


# -- quantization -------------------------------------------------------------------------------


def quantized_layer(
    weight_range: tuple[int, int] = (-127, 127),
    activation_range: tuple[int, int] = (0, 255),
    block_size: int | None = None,
    fake: bool = False,
) -> Graph:
    """A linear layer with quantized input, weight (per output channel or block) and bias."""
    graph, (x,) = build((BATCH, 8))
    number = torch.tensor
    pair = (graph.constant(number(0.03), "scale"), graph.constant(number(100), "zero_point"))
    whole = (*pair, None, *activation_range, torch.uint8)
    if fake:
        x = graph.add("graphopt.fake_quantize", x, *whole)
    else:
        x = graph.add("graphopt.dequantize", graph.add("graphopt.quantize", x, *whole), *whole)
    low, high = weight_range
    axis, shape = (0, (4,)) if block_size is None else (1, (4, 8 // block_size))
    scale = graph.constant(torch.rand(shape) * 0.1 + 0.01, "weight_scale")
    along = (scale, None, axis, low, high, torch.int8, block_size)
    if fake:
        floats = graph.constant(torch.randn(4, 8), "weight", trainable=True)
        weight = graph.add("graphopt.fake_quantize", floats, *along)
    else:
        steps = torch.randint(low, high + 1, (4, 8), dtype=torch.int8)
        weight = graph.add("graphopt.dequantize", graph.constant(steps, "weight"), *along)
    bias_steps = graph.constant(torch.randint(-1000, 1000, (4,), dtype=torch.int32), "bias")
    fine = graph.constant(torch.full((4,), 1e-3), "bias_scale")
    zero = graph.constant(torch.zeros(4, dtype=torch.int32), "bias_zero_point")
    limits = torch.iinfo(torch.int32)
    bias = graph.add(
        "graphopt.dequantize", bias_steps, fine, zero, 0, limits.min, limits.max, torch.int32
    )
    graph.set_outputs([graph.add("aten.linear", x, weight, bias)])
    return graph


def assert_runs_like_the_graph(graph: Graph, path: Path) -> None:
    """To a step of the activation at most, weights being what they are."""
    given = torch.randn(16, 8) * 3
    (expected,) = reference.run(graph, [given], dtype=torch.float64)
    (result,) = run(path, given)
    assert np.abs(result - expected.numpy()).max() <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("fake", [False, True], ids=["quantized", "trainable form"])
def test_quantization_becomes_pairs_and_keeps_int8_weights(fake: bool, tmp_path: Path) -> None:
    graph = quantized_layer(fake=fake)
    path = tmp_path / "model.onnx"
    export_onnx(graph, path)
    model = onnx.load(path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts == {"QuantizeLinear": 1, "DequantizeLinear": 3, "Gemm": 1}
    types = Counter(tensor.data_type for tensor in model.graph.initializer if tensor.dims == [4, 8])
    assert types == {onnx.TensorProto.INT8: 1}
    assert_nothing_foldable(model)
    assert_runs_like_the_graph(graph, path)


def test_a_range_narrower_than_its_type_clips(tmp_path: Path) -> None:
    graph = quantized_layer(activation_range=(64, 191))
    export_onnx(graph, tmp_path / "model.onnx")
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert counts == {"Clip": 1, "QuantizeLinear": 1, "DequantizeLinear": 3, "Gemm": 1}
    assert_runs_like_the_graph(graph, tmp_path / "model.onnx")


def test_blocks_need_opset_21(tmp_path: Path) -> None:
    graph = quantized_layer(weight_range=(-8, 7), block_size=4)
    with pytest.raises(graphopt.ExportError, match=r"graphopt\.dequantize.*opset=21"):
        export_onnx(graph, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    exported = export_onnx(graph, tmp_path / "model.onnx", opset=21)
    assert (exported.opset, exported.ir_version) == (21, 10)
    assert_runs_like_the_graph(graph, tmp_path / "model.onnx")


def test_the_highest_opset_is_offered_and_works(tmp_path: Path) -> None:
    graph = quantized_layer()
    with pytest.raises(graphopt.ExportError, match="choose one of 18 to") as caught:
        export_onnx(graph, tmp_path / "model.onnx", opset=1000)
    highest = int(re.findall(r"18 to (\d+)", str(caught.value))[0])
    assert export_onnx(graph, tmp_path / "model.onnx", opset=highest).opset == highest
    assert_runs_like_the_graph(graph, tmp_path / "model.onnx")


def test_int32_with_a_zero_point_is_refused(tmp_path: Path) -> None:
    graph = quantized_layer()
    graph.set_constant(graph.value("bias_zero_point"), torch.ones(4, dtype=torch.int32))
    with pytest.raises(graphopt.ExportError, match=r"graphopt\.dequantize .*zero point of zero"):
        export_onnx(graph, tmp_path / "model.onnx")


# -- lowering, without ONNX ---------------------------------------------------------------------


def lowered(graph: Graph) -> list[str]:
    """The operators after lowering, whose results are those before."""
    twin = graph.clone()
    lower(twin)
    twin.verify()
    inputs = [torch.randn(value.shape, dtype=torch.float64) for value in graph.inputs]
    expected = reference.run(graph, [x.float() for x in inputs], dtype=torch.float64)
    results = reference.run(twin, [x.float() for x in inputs], dtype=torch.float64)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
    return [node.op.removeprefix("aten.") for node in twin.nodes]


@pytest.mark.parametrize(
    ("op", "operands", "expected"),
    [
        ("aten.adaptive_avg_pool2d", ([1, 1],), ["mean.dim"]),
        ("aten.adaptive_avg_pool2d", ([2, 3],), ["avg_pool2d"]),
        ("aten.adaptive_avg_pool2d", ([4, 7],), ["matmul", "matmul"]),
        ("aten.squeeze.dim", (1,), []),
        ("aten.group_norm", (4,), ["instance_norm"]),
        ("aten.group_norm", (2,), ["group_norm"]),
        ("aten.transpose.int", (1, 2), ["transpose.int"]),
        ("aten.scaled_dot_product_attention", (), ["mul.Tensor", "transpose.int", "matmul"]),
    ],
)
def test_lowering(op: str, operands: Sequence[Any], expected: list[str]) -> None:
    graph, (x,) = build((BATCH, 4, 6, 9))
    if op.endswith("attention"):
        operands = (x, x)
    graph.set_outputs([graph.add(op, x, *operands)])
    assert lowered(graph)[: len(expected)] == expected


def test_transposes_of_single_sizes_become_views_unless_the_size_is_free() -> None:
    graph, (x,) = build((BATCH, 1, 4, 1))
    graph.set_outputs([graph.add("aten.permute", x, [0, 2, 3, 1])])
    assert lowered(graph) == ["reshape"]
    graph, (x,) = build((BATCH, 1, 4, 1))
    graph.set_outputs([graph.add("aten.swapaxes", x, 1, 2)])
    assert lowered(graph) == ["reshape"]
    graph, (x,) = build((BATCH, 4))
    graph.set_outputs([graph.add("aten.transpose.int", x, 0, 1)])
    assert lowered(graph) == ["transpose.int"]


@pytest.mark.parametrize("hides", [False, True])
def test_masks_that_hide_a_row_give_zeros(hides: bool) -> None:
    graph, (x,) = build((BATCH, 2, 5, 4))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[2] &= not hides
    attention = "aten.scaled_dot_product_attention"
    graph.set_outputs([graph.add(attention, x, x, x, graph.constant(mask, "mask"))])
    assert ("isnan" in lowered(graph)) == hides


# -- refusals -----------------------------------------------------------------------------------


def test_an_operator_without_onnx_form_is_named_with_its_module(tmp_path: Path) -> None:
    graph, (x,) = build((BATCH, 3))
    y = graph.add("aten.relu", x)
    z = graph.add("aten.digamma", y, origin=Origin("body.strange", "Strange"))
    graph.set_outputs([z])
    path = tmp_path / "model.onnx"
    with pytest.raises(graphopt.ExportError, match=r"'body\.strange', operator aten\.digamma"):
        export_onnx(graph, path)
    assert list(tmp_path.iterdir()) == []


def test_what_lowering_refuses_is_named_too(tmp_path: Path) -> None:
    graph, (x,) = build((BATCH, 3, 7, 7))
    origin = Origin("pool")
    pooled = graph.add(
        "aten.avg_pool2d", x, [2, 2], ceil_mode=True, divisor_override=3, origin=origin
    )
    graph.set_outputs([pooled])
    with pytest.raises(graphopt.ExportError, match=r"'pool', operator aten\.avg_pool2d"):
        export_onnx(graph, tmp_path / "model.onnx")


def test_wrong_arguments(tmp_path: Path) -> None:
    graph, (x,) = build((BATCH, 3))
    with pytest.raises(graphopt.ExportError, match="returns no tensor"):
        export_onnx(graph, tmp_path / "model.onnx")
    graph.set_outputs([graph.add("aten.relu", x)])
    with pytest.raises(graphopt.ExportError, match=r"opset 17 .* one of 18 to"):
        export_onnx(graph, tmp_path / "model.onnx", opset=17)
    with pytest.raises(graphopt.ExportError, match="no directory"):
        export_onnx(graph, tmp_path / "missing" / "model.onnx")


def test_random_operators_cannot_be_compared(tmp_path: Path) -> None:
    graph, (x,) = build((BATCH, 3))
    graph.set_outputs([graph.add("aten.rand_like", x)])
    with pytest.raises(graphopt.ExportError, match=r"aten\.rand_like.*verify=False"):
        export_onnx(graph, tmp_path / "model.onnx")
    assert export_onnx(graph, tmp_path / "model.onnx", verify=False).verdict is None
    assert run(tmp_path / "model.onnx", torch.zeros(4, 3))[0].shape == (4, 3)


# -- the built-in comparison, and writing -------------------------------------------------------


def pooling_graph() -> Graph:
    graph, (x,) = build((BATCH, 2, 5, 5))
    graph.set_outputs([graph.add("aten.adaptive_avg_pool2d", x, [3, 3])])
    return graph


def test_a_wrong_file_is_refused_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("what was here before")
    right = lowering._averages

    def slightly_wrong(*args: Any) -> Tensor:
        return right(*args) * 1.001

    monkeypatch.setattr(lowering, "_averages", slightly_wrong)
    with pytest.raises(graphopt.ExportError, match=r"errs by 0\.00.* is allowed"):
        export_onnx(pooling_graph(), path)
    assert path.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_right_at_the_example_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 2 burnt in would go unnoticed at the example's size."""
    graph, (x,) = build((BATCH, 3))
    batch = graph.add("aten.sym_size.int", x, 0)
    graph.set_outputs([graph.add("aten.mul.Tensor", x, batch)])
    clean = cleanup.clean

    def burn_in(model: Any) -> None:
        clean(model)
        for node in list(model.graph):
            if node.op_type == "Mul":
                two = onnx.numpy_helper.from_array(np.array(2.0, np.float32), "two")
                constant = export.onnx_ir.node("Constant", [], {"value": two})
                model.graph.insert_before(node, constant)
                node.replace_input_with(1, constant.outputs[0])

    monkeypatch.setattr(cleanup, "clean", burn_in)
    with pytest.raises(graphopt.ExportError, match="errs by"):
        export_onnx(graph, tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_are_compared(dtype: torch.dtype, tmp_path: Path) -> None:
    graph = Graph({"batch": BATCH})
    x = graph.add_input("x", TensorType(dtype, (BATCH, 3)), {0: "batch"})
    single = graph.add("aten.to.dtype", x, torch.float32)
    graph.set_outputs([graph.add("aten.to.dtype", graph.add("aten.mul.Scalar", single, 2), dtype)])
    exported = export_onnx(graph, tmp_path / "model.onnx")
    assert exported.verdict is not None
    assert exported.verdict.error <= exported.verdict.allowed


def test_given_inputs_are_compared(tmp_path: Path) -> None:
    graph = pooling_graph()
    given = [torch.full((BATCH, 2, 5, 5), torch.nan)]
    exported = export_onnx(graph, tmp_path / "model.onnx", example_inputs=given)
    assert exported.verdict is not None
    assert exported.verdict.error <= exported.verdict.allowed


def test_large_models_keep_their_weights_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, (x,) = build((BATCH, 64))
    weight = graph.constant(torch.randn(64, 64), "weight")
    graph.set_outputs([graph.add("aten.linear", x, weight)])
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 64 * 64 * 4 - 1)
    export_onnx(graph, tmp_path / "model.onnx")
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert files["model.onnx.data"] >= 64 * 64 * 4 > files["model.onnx"]
    given = torch.randn(3, 64)
    (result,) = run(tmp_path / "model.onnx", given)
    np.testing.assert_allclose(result, given @ weight.constant.T, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    with pytest.raises(graphopt.ExportError, match="do not fit into one file"):
        export_onnx(graph, tmp_path / "single.onnx", external_data=False)
    monkeypatch.undo()
    export_onnx(graph, tmp_path / "single.onnx")
    assert not (tmp_path / "single.onnx.data").exists()


def test_the_exporter_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(pooling_graph(), tmp_path / "model.onnx")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_graph_is_left_as_it_is(tmp_path: Path) -> None:
    graph = pooling_graph()
    before = graph.to_text()
    export_onnx(graph, tmp_path / "model.onnx")
    assert graph.to_text() == before
