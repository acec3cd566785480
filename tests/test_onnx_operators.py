"""Every family of operators through torch's exporter into onnxruntime, at a size of its own.

`export_onnx` compares by itself; here its files are run once more, against the graph in float64,
with a batch that neither the example nor the exporter has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from graphopt import reference
from graphopt.ir import Graph, TensorType, Value
from graphopt.onnx import export_onnx
from graphopt.onnx.verification import FLOOR, relative_error

Build = Callable[[Graph], Sequence[Value]]

families: list[Build] = []


def family(build: Build) -> Build:
    families.append(build)
    return build


def image(graph: Graph, channels: int = 4, size: int = 8, name: str = "x") -> Value:
    kind = TensorType(torch.float32, (2, channels, size, size))
    return graph.add_input(name, kind, {0: "batch"})


def sequence(graph: Graph, length: int = 6, width: int = 8, name: str = "x") -> Value:
    return graph.add_input(name, TensorType(torch.float32, (2, length, width)), {0: "batch"})


def tokens(graph: Graph, name: str = "tokens") -> Value:
    return graph.add_input(name, TensorType(torch.int64, (2, 6)), {0: "batch"})


def weight(graph: Graph, *shape: int) -> Value:
    return graph.constant(torch.randn(shape), "weight", trainable=True)


def positive(graph: Graph, *shape: int) -> Value:
    return graph.constant(torch.rand(shape) + 0.5, "positive")


@family
def convolutions(graph: Graph) -> list[Value]:
    x, y = image(graph), sequence(graph, name="y")
    full, bias = weight(graph, 6, 4, 3, 3), weight(graph, 6)
    along = weight(graph, 6, 6, 3)
    norm = graph.add("aten._weight_norm", along, positive(graph, 1, 1, 3), 2)
    add = graph.add
    transposed = weight(graph, 4, 3, 3, 3)
    return [
        add("aten.conv2d", x, full, bias, [2, 1], [1, 0], [1, 2]),
        add("aten.conv2d", x, weight(graph, 4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4),
        add("aten.conv2d.padding", x, weight(graph, 6, 4, 5, 3), None, [1, 1], "same"),
        add("aten.conv1d", y, along, bias),
        add("aten.conv1d", y, norm),
        add("aten.conv_transpose2d.input", x, full.graph.add("aten.transpose.int", full, 0, 1)),
        add("aten.conv_transpose2d.input", x, transposed, None, [2, 2], [1, 1], [1, 1], 2, [2, 2]),
        add("aten.linear", add("aten.permute", x, [0, 2, 3, 1]), weight(graph, 5, 4)),
    ]


@family
def pooling(graph: Graph) -> list[Value]:
    x = image(graph)
    add = graph.add
    return [
        add("aten.max_pool2d", x, [3, 3], [2, 2], [1, 1]),
        add("aten.max_pool2d", x, [3, 3], [2, 2], [0, 0], [1, 1], True),
        add("aten.avg_pool2d", x, [3, 3], [2, 2], [1, 1]),
        add("aten.avg_pool2d", x, [3, 3], [2, 2], [1, 1], True, False),
        add("aten.avg_pool2d", x, [2, 2], divisor_override=3),
        add("aten.adaptive_avg_pool2d", x, [1, 1]),
        add("aten.adaptive_avg_pool2d", x, [4, 2]),
        add("aten.adaptive_avg_pool2d", x, [3, 5]),
        add("aten.adaptive_avg_pool2d", x, [11, 8]),
    ]


@family
def activations(graph: Graph) -> list[Value]:
    x = image(graph)
    magnitude = graph.add("aten.abs", x)
    names = "relu sigmoid tanh silu gelu hardsigmoid hardswish hardtanh leaky_relu elu selu mish"
    names += " softplus relu6 erf exp neg sin cos hardshrink softshrink log_sigmoid"
    defined_for_positive = ["log", "rsqrt", "sqrt", "log1p"]
    return [
        *[graph.add(f"aten.{name}", x) for name in names.split()],
        *[graph.add(f"aten.{name}", magnitude) for name in defined_for_positive],
        graph.add("aten.gelu", x, approximate="tanh"),
        graph.add("aten.prelu", x, weight(graph, 4)),
        graph.add("aten.softmax.int", x, -1),
        graph.add("aten.log_softmax.int", x, 1),
        graph.add("aten.glu", x, 1),
        graph.add("aten.dropout", x, 0.5, False),
    ]


@family
def normalization(graph: Graph) -> list[Value]:
    x, y = image(graph), sequence(graph, name="y")
    scale, shift = positive(graph, 4), weight(graph, 4)
    add = graph.add
    statistics = (weight(graph, 4), positive(graph, 4), False, 0.1, 1e-5, False)
    return [
        add("aten.batch_norm", x, scale, shift, *statistics),
        add("aten.layer_norm", y, [8], positive(graph, 8), weight(graph, 8)),
        add("aten.layer_norm", y, [8]),
        add("aten.rms_norm", y, [8], positive(graph, 8)),
        add("aten.group_norm", x, 2, scale, shift),
        add("aten.group_norm", x, 4, scale, shift),
        add("aten.group_norm", x, 4),
        add("aten.linalg_vector_norm", x, 2, [1], True),
        add("aten.var.correction", x, [1], correction=0),
        add("aten.mean.dim", x, [2, 3], True),
        add("aten.sum.dim_IntList", x, [1]),
        add("aten.amax", x, [1]),
        graph.add_node("aten.max.dim", x, 1).outputs[0],
    ]


@family
def views(graph: Graph) -> list[Value]:
    x = image(graph)
    one = graph.add("aten.slice.Tensor", x, 1, 0, 1)
    batch = graph.add("aten.sym_size.int", x, 0)
    add = graph.add
    return [
        add("aten.flatten.using_ints", x, 1),
        add("aten.reshape", x, [batch, 2, 2, -1]),
        add("aten.transpose.int", x, 1, 2),
        add("aten.transpose.int", one, 1, 2),
        add("aten.permute", x, [0, 2, 3, 1]),
        add("aten.permute", one, [0, 2, 1, 3]),
        add("aten.unsqueeze", x, 1),
        add("aten.slice.Tensor", add("aten.slice.Tensor", x, 2, 1, 7, 2), 3, 0, -1),
        add("aten.select.int", x, 2, 3),
        add("aten.squeeze.dim", x, 1),
        add("aten.squeeze.dim", one, 1),
        add("aten.unflatten.int", x, 1, [2, 2]),
        add("aten.expand", weight(graph, 1, 6, 8), [batch, -1, -1]),
        add("aten.repeat", x, [1, 2, 1, 3]),
        add("aten.roll", x, [2, -1], [2, 3]),
        add("aten.flip", x, [2]),
        add("aten.unfold", x, 2, 3, 2),
        add("aten.pixel_shuffle", x, 2),
        add("aten.im2col", x, [3, 3], [1, 1], [1, 1], [2, 2]),
        add("aten.im2col", x, [3, 2], [2, 1], [0, 0], [2, 1]),
    ]


@family
def joining(graph: Graph) -> list[Value]:
    x = image(graph)
    y = graph.add("aten.relu", x)
    columns = graph.add_input("columns", TensorType(torch.float32, (2, 36, 16)), {0: "batch"})
    return [
        graph.add("aten.cat", [x, y], 1),
        graph.add("aten.cat", [graph.add("aten.cat", [x, y], 1), y, x], -3),
        graph.add(
            "aten.cat", [graph.add("aten.cat", [x, y], 2), graph.add("aten.cat", [y, x], 2)], 1
        ),
        graph.add("aten.unsqueeze", graph.add("aten.unsqueeze", x, 1), 0),
        graph.add("aten.unsqueeze", graph.add("aten.unsqueeze", x, -1), 2),
        graph.add("aten.stack", [x, y], 1),
        *graph.add_node("aten.split.Tensor", x, 3, 1).outputs,
        *graph.add_node("aten.split_with_sizes", x, [1, 3], 1).outputs,
        *graph.add_node("aten.chunk", x, 2, 1).outputs,
        *graph.add_node("aten.unbind.int", x, 1).outputs,
        graph.add("aten.col2im", columns, [8, 8], [3, 3], [1, 1], [1, 1], [2, 2]),
        *[
            graph.add("aten.pad", x, [1, 2, 0, 1], mode)
            for mode in ("constant", "reflect", "replicate", "circular")
        ],
        graph.add("aten.constant_pad_nd", x, [1, 2, -1, 1], 0.5),
        graph.add("aten.upsample_nearest2d.vec", x, None, [2.0, 2.0]),
        graph.add("aten.upsample_bilinear2d.vec", x, [5, 11], False, None),
        graph.add("aten.upsample_bilinear2d.vec", x, [5, 11], True, None),
        graph.add("aten.upsample_bicubic2d.vec", x, None, False, [2.0, 2.0]),
    ]


@family
def products(graph: Graph) -> list[Value]:
    x = sequence(graph)
    flat = graph.add("aten.reshape", x, [-1, 8])
    add = graph.add
    return [
        add("aten.linear", x, weight(graph, 5, 8), weight(graph, 5)),
        add("aten.linear", flat, weight(graph, 5, 8), weight(graph, 5)),
        add("aten.addmm", weight(graph, 5), flat, weight(graph, 8, 5)),
        add("aten.matmul", x, add("aten.transpose.int", x, 1, 2)),
        add("aten.einsum", "bij,bkj->bik", [x, x]),
    ]


@family
def attention(graph: Graph) -> list[Value]:
    x, y = image(graph), sequence(graph, name="y")
    fewer = graph.add("aten.slice.Tensor", x, 1, 0, 2)
    op = "aten.scaled_dot_product_attention"
    hidden = torch.ones(8, 8, dtype=torch.bool).tril()
    hidden[3] = False
    some = graph.add("aten.gt.Scalar", graph.add("aten.slice.Tensor", x, 1, 0, 1), 0.0)
    return [
        graph.add(op, x, x, x),
        graph.add(op, y, y, y),
        graph.add(op, x, x, x, is_causal=True),
        graph.add(op, x, x, x, graph.constant(hidden, "nothing_visible_in_a_row")),
        graph.add(op, x, x, x, some),
        graph.add(op, x, x, x, weight(graph, 8, 8), scale=0.3),
        graph.add(op, x, fewer, fewer, enable_gqa=True),
    ]


@family
def elementwise(graph: Graph) -> list[Value]:
    x, c = image(graph), weight(graph, 4, 1, 1)
    small = graph.add("aten.lt.Scalar", x, 1)
    add = graph.add
    return [
        *[add(f"aten.{name}.Tensor", x, c) for name in ("add", "sub", "mul", "div")],
        *[add(f"aten.{name}.Scalar", x, 2) for name in ("add", "sub", "mul", "div", "rsub")],
        add("aten.add.Tensor", x, c, alpha=0.5),
        add("aten.addcmul", x, x, c, value=0.5),
        add("aten.div.Tensor_mode", x, c, rounding_mode="floor"),
        add("aten.pow.Tensor_Scalar", x, 2),
        add("aten.pow.Scalar", 2.0, x),
        add("aten.clamp", x, -0.5, 0.5),
        add("aten.clamp_min", x, 0.1),
        add("aten.minimum", x, c),
        add("aten.min.other", x, c),
        add("aten.where.self", small, x, c),
        add("aten.where.ScalarOther", small, x, 0.0),
        add("aten.masked_fill.Scalar", x, small, -3.0),
        add("aten.bitwise_not", small),
        add("aten.__and__.Tensor", small, add("aten.gt.Scalar", x, 0)),
        add("aten.to.dtype", x, torch.float64),
        add("aten.copy", x, c),
        add("aten.fill.Scalar", x, 3.0),
        add("aten.full_like", x, 2.5),
    ]


@family
def indices(graph: Graph) -> list[Value]:
    ids, x = tokens(graph), sequence(graph)
    batch = graph.add("aten.sym_size.int", x, 0)
    some = graph.constant(torch.tensor([1, 3, 5]), "some")
    last = graph.add("aten.argmax", x, -1, True)
    add = graph.add
    return [
        add("aten.embedding", weight(graph, 10, 8), ids),
        add("aten.index.Tensor", weight(graph, 10, 8), [ids]),
        add("aten.index.Tensor", x, [None, some]),
        add("aten.index.Tensor", x, [None, some, some]),
        add("aten.index_select", x, 1, some),
        add("aten.gather", x, 2, last),
        add("aten.cumsum", add("aten.ne.Scalar", ids, 1), 1),
        add("aten.cumsum", x, 1),
        add("aten.diff", ids),
        add("aten.ge.Scalar", ids, 2),
        add("aten.eq.Tensor", ids, add("aten.slice.Tensor", ids, 1, 0, 1)),
        add("aten.le.Tensor", ids, add("aten.slice.Tensor", ids, 1, 0, 1)),
        add("aten.remainder.Scalar", ids, 3),
        add("aten.add.Tensor", add("aten.arange", batch), 1),
        add("aten.arange.start", 2, 10),
        add("aten.new_ones", x, [batch, 3]),
        add("aten.new_zeros", x, [3]),
        add("aten.type_as", ids, x),
        add("aten.index_put", x, [None, some], weight(graph, 3, 8)),
    ]


def inputs_of(graph: Graph, batch: int) -> list[Tensor]:
    tensors = []
    for value in graph.inputs:
        shape = [batch if dimension in value.free else n for dimension, n in enumerate(value.shape)]
        floating = value.dtype.is_floating_point
        tensors.append(torch.randn(shape) if floating else torch.randint(0, 10, shape))
    return tensors


@pytest.mark.parametrize("build", families, ids=lambda build: build.__name__)
def test_family(build: Build, tmp_path: Path) -> None:
    graph = Graph({"batch": 2})
    graph.set_outputs(list(build(graph)))
    exported = export_onnx(graph, tmp_path / "model.onnx")
    assert exported.verdict is not None
    assert exported.verdict.error <= FLOOR
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = inputs_of(graph, 3)
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    results = map(torch.from_numpy, session.run(None, feed))
    exact = reference.run(graph, inputs, dtype=torch.float64)
    for value, result, expected in zip(graph.outputs, results, exact, strict=True):
        assert isinstance(value, Value)
        assert result.shape == expected.shape, value
        assert result.dtype == value.dtype, value
        assert relative_error(result, expected.to(torch.float64)) <= FLOOR, value
