"""Layers between dequantize and quantize nodes become integer kernels, and stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quantized_graphs import (
    bias,
    dequantized,
    layer,
    quantized,
    through_bytes,
    weight,
)
from test_lowering import new_graph, plan_of
from torch import nn

import graphopt
from graphopt import reference
from graphopt.engine import Plan
from graphopt.ir import Graph, Value
from graphopt.kernels.integer_convolution import TILE
from graphopt.passes import Quantize


def check(
    graph: Graph,
    *shapes: tuple[int, ...],
    steps: float = 1.0,
    step: float = 0.05,
    halves: bool = False,
) -> Plan:
    """Run, and compare with the operators one after another, within ``steps`` of size ``step``.

    With ``halves``, many results are halves of a step, which roundings before decide.
    """
    graph.verify()
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    plan = plan_of(graph)
    results = plan.run(*inputs)
    for result, expected in zip(results, reference.run(graph, inputs), strict=True):
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        difference = (result.double() - expected.double()).abs()
        assert difference.max() <= steps * step * 1.001
        # Both round the same sums: they part only where these are near a half.
        assert halves or (difference > 0.01 * step).double().mean() < 0.01
        assert expected.double().std() > step
    return plan


def kernels_of(plan: Plan) -> list[str]:
    return [step.kernel for step in plan.steps]


def integer_kernels(plan: Plan) -> list[str]:
    assert not plan.call_backs
    return [name for name in kernels_of(plan) if "integer" in name]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_convolution_with_bias_and_activation_is_one_kernel(per_channel: bool) -> None:
    graph, (x,) = new_graph((2, 8, 9, 9))
    x = through_bytes(graph, x, 0.03, 120)
    y = layer(
        graph, x, "aten.conv2d", 12, 8, 3, 3, scale=0.03, per_channel=per_channel, padding=[1, 1]
    )
    y = through_bytes(graph, graph.add("aten.relu", y), 0.05, 0)
    graph.set_outputs([y])
    plan = check(graph, (2, 8, 9, 9))
    names = kernels_of(plan)
    assert names == ["quantize image", f"integer convolution {TILE}", "dequantize image"]


ACTIVATIONS: dict[str, Callable[[Graph, Value], Value]] = {
    "relu6": lambda graph, y: graph.add("aten.relu6", y),
    "hardtanh": lambda graph, y: graph.add("aten.hardtanh", y, -0.5, 0.75),
    "default hardtanh": lambda graph, y: graph.add("aten.hardtanh", y),
    "clamp": lambda graph, y: graph.add("aten.clamp", y, -0.3, None),
    "clamp_max": lambda graph, y: graph.add("aten.clamp_max", y, 0.7),
    "two": lambda graph, y: graph.add("aten.clamp_min", graph.add("aten.clamp_max", y, 0.7), -0.2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_clamp_are_bounds(name: str) -> None:
    graph, (x,) = new_graph((1, 8, 9, 9))
    x = through_bytes(graph, x, 0.03, 120)
    y = layer(graph, x, "aten.conv2d", 8, 8, 1, 1, scale=0.03)
    graph.set_outputs([through_bytes(graph, ACTIVATIONS[name](graph, y), 0.02, 60)])
    plan = check(graph, (1, 8, 9, 9), step=0.02)
    assert len(plan.steps) == 3


def test_a_residual_is_added_inside() -> None:
    graph, (x,) = new_graph((1, 8, 9, 9))
    x = through_bytes(graph, x, 0.03, 120)
    y = layer(graph, x, "aten.conv2d", 8, 8, 3, 3, scale=0.03, padding=[1, 1])
    y = graph.add("aten.relu", graph.add("aten.add.Tensor", y, x))
    graph.set_outputs([through_bytes(graph, y, 0.04, 0)])
    plan = check(graph, (1, 8, 9, 9), step=0.04)
    assert integer_kernels(plan) == [f"integer convolution {TILE}"]


def test_two_images_are_added() -> None:
    graph, (x, y) = new_graph((1, 6, 9, 9), (1, 6, 9, 9))
    x, y = through_bytes(graph, x, 0.03, 120), through_bytes(graph, y, 0.02, 100)
    z = graph.add("aten.relu", graph.add("aten.add.Tensor", x, y))
    graph.set_outputs([through_bytes(graph, z, 0.05, 3)])
    assert integer_kernels(check(graph, (1, 6, 9, 9), (1, 6, 9, 9))) == ["integer sum"]


def test_images_side_by_side() -> None:
    graph, (x, y) = new_graph((1, 8, 5, 5), (1, 3, 5, 5))
    parts = [through_bytes(graph, x, 0.03, 120), through_bytes(graph, y, 0.02, 100)]
    graph.set_outputs([through_bytes(graph, graph.add("aten.cat", parts, 1), 0.03, 120)])
    plan = check(graph, (1, 8, 5, 5), (1, 3, 5, 5), step=0.03)
    assert integer_kernels(plan) == ["integer concatenation"]


def test_channels_that_fill_no_word_are_put_side_by_side_as_floats() -> None:
    graph, (x, y) = new_graph((1, 3, 5, 5), (1, 3, 5, 5))
    parts = [through_bytes(graph, x, 0.03, 120), through_bytes(graph, y, 0.02, 100)]
    graph.set_outputs([through_bytes(graph, graph.add("aten.cat", parts, 1), 0.03, 120)])
    assert not integer_kernels(check(graph, (1, 3, 5, 5), (1, 3, 5, 5), step=0.03))


POOLS: dict[str, tuple[str, tuple[object, ...]]] = {
    "maximum": ("aten.max_pool2d", ([3, 3], [2, 2], [1, 1])),
    "average": ("aten.avg_pool2d", ([2, 2],)),
    "padded average": ("aten.avg_pool2d", ([3, 3], [1, 1], [1, 1])),
    "global average": ("aten.adaptive_avg_pool2d", ([1, 1],)),
    "mean": ("aten.mean.dim", ([2, 3], True)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_keeps_bytes(name: str) -> None:
    op, operands = POOLS[name]
    graph, (x,) = new_graph((2, 8, 8, 9))
    x = through_bytes(graph, x, 0.03, 120)
    graph.set_outputs([through_bytes(graph, graph.add(op, x, *operands), 0.03, 120)])
    plan = check(graph, (2, 8, 8, 9), step=0.03, halves=name == "average")
    assert len(integer_kernels(plan)) == 1
    assert len(plan.steps) == 3


def test_pooling_that_divides_by_other_numbers_is_left_to_floats() -> None:
    graph, (x,) = new_graph((1, 8, 8, 8))
    x = through_bytes(graph, x, 0.03, 120)
    y = graph.add("aten.avg_pool2d", x, [3, 3], [2, 2], [1, 1], False, False)
    graph.set_outputs([through_bytes(graph, y, 0.03, 120)])
    assert not integer_kernels(check(graph, (1, 8, 8, 8), step=0.03))


@pytest.mark.parametrize("early", [True, False])
def test_the_end_of_a_classifier(early: bool) -> None:
    graph, (x,) = new_graph((2, 8, 5, 5))
    x = through_bytes(graph, x, 0.03, 120)
    y = graph.add("aten.adaptive_avg_pool2d", x, [1, 1])
    if early:
        y = through_bytes(graph, y, 0.01, 120)
    y = graph.add("aten.flatten.using_ints", y, 1)
    y = through_bytes(graph, y, 0.01, 120)
    y = layer(graph, y, "aten.linear", 10, 8, scale=0.01)
    graph.set_outputs([y])
    plan = check(graph, (2, 8, 5, 5), steps=2.0, step=0.01)
    assert kernels_of(plan) == ["quantize image", "integer global average", "integer matmul"]


def test_a_linear_layer_of_rows() -> None:
    graph, (x,) = new_graph((2, 3, 20))
    x = through_bytes(graph, x, 0.03, 120)
    y = graph.add("aten.relu", layer(graph, x, "aten.linear", 12, 20, scale=0.03))
    graph.set_outputs([through_bytes(graph, y, 0.02, 0)])
    assert integer_kernels(check(graph, (2, 3, 20), step=0.02)) == ["integer matmul"]


@pytest.mark.parametrize("floating", [True, False])
def test_a_linear_layer_of_rows_skips_blocks_of_zeros(floating: bool) -> None:
    graph, (x,) = new_graph((2, 64, 96))
    x = through_bytes(graph, x, 0.03, 120)
    values = torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    values *= torch.rand(32, 24).lt(0.1).repeat_interleave(2, 0).repeat_interleave(4, 1)
    tail = (graph.constant(torch.tensor(0.003)), None, None, -127, 127, torch.int8)
    own = graph.add("graphopt.dequantize", graph.constant(values), *tail)
    y = graph.add("aten.linear", x, own)
    graph.set_outputs([y if floating else through_bytes(graph, y, 0.03, 120)])
    (kernel,) = integer_kernels(check(graph, (2, 64, 96), step=1e-4 if floating else 0.03))
    assert kernel.startswith("sparse integer matmul 2x")


def test_a_layer_with_a_float_result() -> None:
    graph, (x,) = new_graph((1, 8, 9, 9))
    x = through_bytes(graph, x, 0.03, 120)
    y = layer(graph, x, "aten.conv2d", 6, 8, 3, 3, scale=0.03)
    graph.set_outputs([graph.add("aten.sigmoid", y)])
    assert integer_kernels(check(graph, (1, 8, 9, 9))) == [f"integer convolution {TILE}"]


def test_zeros_around_an_image_are_its_zero_point() -> None:
    graph, (x,) = new_graph((1, 8, 9, 9))
    x = graph.add("aten.constant_pad_nd", through_bytes(graph, x, 0.03, 120), [1, 2, 0, 1], 0.0)
    y = layer(graph, x, "aten.conv2d", 8, 8, 3, 3, scale=0.03)
    graph.set_outputs([through_bytes(graph, y, 0.05, 128)])
    assert len(check(graph, (1, 8, 9, 9)).steps) == 3


def test_biases_of_other_kinds() -> None:
    for kind in ("none", "float", "other steps"):
        graph, (x,) = new_graph((1, 8, 5, 5))
        x = through_bytes(graph, x, 0.03, 120)
        own, scales = weight(graph, 8, 8, 1, 1)
        added = None
        if kind == "float":
            added = graph.constant(torch.linspace(-1, 1, 8))
        elif kind == "other steps":
            added = bias(graph, 0.05, scales, 8)
        y = graph.add("aten.conv2d", x, own, added)
        graph.set_outputs([through_bytes(graph, y, 0.05, 128)])
        assert len(check(graph, (1, 8, 5, 5)).steps) == 3, kind


def test_an_image_that_both_kinds_of_kernels_read() -> None:
    graph, (x,) = new_graph((1, 8, 9, 9))
    x = through_bytes(graph, x, 0.03, 120)
    y = through_bytes(graph, layer(graph, x, "aten.conv2d", 8, 8, 1, 1, scale=0.03), 0.05, 128)
    graph.set_outputs([graph.add("aten.mul.Tensor", y, graph.add("aten.sigmoid", x))])
    check(graph, (1, 8, 9, 9), step=0.05)


DTYPES = pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])


@DTYPES
def test_bytes_that_are_an_output_lie_in_plain_order(dtype: torch.dtype) -> None:
    graph, (x,) = new_graph((1, 6, 5, 5))
    x = through_bytes(graph, x, 0.03, 120, dtype)
    y = layer(graph, x, "aten.conv2d", 6, 6, 1, 1, scale=0.03)
    graph.set_outputs([quantized(graph, y, 0.05, 128, dtype)])
    check(graph, (1, 6, 5, 5), step=1.0)


@DTYPES
def test_bytes_read_with_another_scale_lie_in_plain_order(dtype: torch.dtype) -> None:
    graph, (x,) = new_graph((1, 6, 5, 5))
    q = quantized(graph, x, 0.03, 120, dtype)
    graph.set_outputs([dequantized(graph, q, 0.05), dequantized(graph, q)])
    check(graph, (1, 6, 5, 5), step=0.03)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 6, 5, 5), (4, 7)])
def test_bytes_that_other_operators_read_are_as_they_are(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    graph, (x,) = new_graph(shape)
    q = quantized(graph, x, 0.03, 120, dtype)
    more = graph.add("aten.to.dtype", q, torch.int32)
    graph.set_outputs([dequantized(graph, q), more, graph.add("aten.cumsum", q, 1)])
    check(graph, shape, step=0.03)


@DTYPES
def test_a_network_keeps_bytes_between_its_layers(dtype: torch.dtype) -> None:
    graph, (x,) = new_graph((1, 3, 20, 20), batch=False)
    x = through_bytes(graph, x, 0.03, 120, dtype)
    y = layer(graph, x, "aten.conv2d", 8, 3, 3, 3, scale=0.03, stride=[2, 2], padding=[1, 1])
    y = through_bytes(graph, graph.add("aten.relu6", y), 0.03, 0, dtype)
    y = layer(graph, y, "aten.conv2d", 8, 1, 3, 3, scale=0.03, padding=[1, 1], groups=8)
    y = first = through_bytes(graph, graph.add("aten.relu6", y), 0.02, 0, dtype)
    y = layer(graph, y, "aten.conv2d", 8, 8, 1, 1, scale=0.02)
    y = through_bytes(graph, graph.add("aten.add.Tensor", y, first), 0.03, 80, dtype)
    y = graph.add("aten.flatten.using_ints", graph.add("aten.mean.dim", y, [2, 3], True), 1)
    y = layer(graph, through_bytes(graph, y, 0.01, 80, dtype), "aten.linear", 10, 8, scale=0.01)
    graph.set_outputs([y])
    plan = check(graph, (1, 3, 20, 20), steps=8, step=0.01)
    assert len(plan.steps) == 6
    assert len(integer_kernels(plan)) == 5


@DTYPES
def test_a_network_of_signals(dtype: torch.dtype) -> None:
    graph, (x,) = new_graph((2, 3, 50))
    x = through_bytes(graph, x, 0.03, 120, dtype)
    y = layer(graph, x, "aten.conv1d", 8, 3, 5, scale=0.03, stride=[2], padding=[2])
    y = through_bytes(graph, graph.add("aten.relu", y), 0.03, 0, dtype)
    y = graph.add("aten.max_pool1d", y, [3], [2], [1])
    y = first = through_bytes(graph, y, 0.03, 0, dtype)
    y = graph.add("aten.constant_pad_nd", y, [2, 0], 0.0)
    y = layer(graph, y, "aten.conv1d", 8, 1, 3, scale=0.03, groups=8)
    y = through_bytes(graph, graph.add("aten.relu6", y), 0.02, 0, dtype)
    y = layer(graph, y, "aten.conv1d.padding", 8, 8, 3, scale=0.02, padding="same", dilation=[2])
    y = through_bytes(graph, graph.add("aten.add.Tensor", y, first), 0.03, 80, dtype)
    y = through_bytes(graph, graph.add("aten.avg_pool1d", y, [3]), 0.03, 80, dtype)
    y = graph.add("aten.flatten.using_ints", graph.add("aten.adaptive_avg_pool1d", y, [1]), 1)
    y = layer(graph, through_bytes(graph, y, 0.01, 80, dtype), "aten.linear", 10, 8, scale=0.01)
    graph.set_outputs([y])
    plan = check(graph, (2, 3, 50), steps=12, step=0.01)
    kernels = integer_kernels(plan)
    assert len(plan.steps) == 8
    assert kernels[1] == "integer pooling"
    assert kernels[-2:] == ["integer global average", "integer matmul"]
    assert len(kernels) == 7


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_convolution_of_signals_with_a_float_result(density: float) -> None:
    graph, (x,) = new_graph((2, 64, 70))
    x = through_bytes(graph, x, 0.03, 120)
    values = torch.randint(-127, 128, (32, 64, 3), dtype=torch.int8)
    values *= torch.rand(32, 16, 1, 3).repeat_interleave(4, 1).lt(density).reshape(32, 64, 3)
    tail = (graph.constant(torch.tensor(0.001)), None, None, -127, 127, torch.int8)
    own = graph.add("graphopt.dequantize", graph.constant(values), *tail)
    graph.set_outputs([graph.add("aten.conv1d", x, own)])
    plan = check(graph, (2, 64, 70), step=1e-4)
    kind = "integer" if density == 1 else "sparse integer"
    assert kernels_of(plan)[-1].startswith(f"{kind} convolution")


def test_rows_beside_signals_are_rows() -> None:
    graph, (x,) = new_graph((2, 8, 20))
    x = through_bytes(graph, x, 0.03, 120)
    signal = layer(graph, x, "aten.conv1d", 6, 8, 3, scale=0.03)
    rows = through_bytes(graph, graph.add("aten.tanh", x), 0.01, 128)
    y = layer(graph, rows, "aten.linear", 12, 20, scale=0.01)
    graph.set_outputs([signal, through_bytes(graph, y, 0.02, 100)])
    plan = check(graph, (2, 8, 20), step=0.02)
    assert integer_kernels(plan) == [f"integer convolution {TILE}", "integer matmul"]


@DTYPES
def test_bytes_that_a_reduction_yields_are_kept_for_a_layer(dtype: torch.dtype) -> None:
    graph, (x,) = new_graph((3, 20, 5))
    y = through_bytes(graph, graph.add("aten.mean.dim", x, [2]), 0.02, 120, dtype)
    y = layer(graph, y, "aten.linear", 12, 20, scale=0.02)
    graph.set_outputs([through_bytes(graph, y, 0.02, 100, dtype)])
    assert integer_kernels(check(graph, (3, 20, 5), step=0.02)) == ["integer matmul"]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [None, 16])
def test_a_linear_layer_whose_weight_alone_is_quantized(
    block: int | None, bits: int, rows: int
) -> None:
    torch.manual_seed(1)
    graph, (x,) = new_graph((rows, 32))
    limit = 2 ** (bits - 1)
    values = graph.constant(torch.randint(-limit, limit, (24, 32), dtype=torch.int8))
    scale = graph.constant(torch.rand(24, 2) if block else torch.rand(24))
    operands = (None, 1 if block else 0, -limit, limit - 1, torch.int8, block)
    own = graph.add("graphopt.dequantize", values, scale, *operands)
    y = graph.add("aten.linear", x, own, graph.constant(torch.randn(24)))
    graph.set_outputs([graph.add("aten.relu", y)])
    plan = plan_of(graph)
    assert not plan.call_backs
    assert any("weight-only" in name for name in kernels_of(plan)) == (rows <= 4)
    given = torch.randn(rows, 32)
    (expected,) = reference.run(graph, [given], dtype=torch.float64)
    torch.testing.assert_close(plan.run(given)[0].double(), expected, rtol=1e-5, atol=1e-4 * limit)


@pytest.mark.parametrize("least", [-127, -128])
@pytest.mark.parametrize("division", ["aten.div.Tensor", "aten.div.Scalar"])
@pytest.mark.parametrize("shape", [(1, 32), (2, 5, 32)])
def test_a_linear_layer_whose_rows_are_quantized_on_the_way(
    shape: tuple[int, ...], division: str, least: int
) -> None:
    graph, (x,) = new_graph(shape)
    largest = graph.add("aten.amax", graph.add("aten.abs", x), [-1], True)
    scale = graph.add("aten.clamp_min", graph.add(division, largest, 127.0), 2.0**-100)
    scheme_of_rows = (scale, None, len(shape) - 1, least, 127, torch.int8, 32)
    q = graph.add("graphopt.quantize", x, *scheme_of_rows)
    rows = graph.add("graphopt.dequantize", q, *scheme_of_rows)
    own, _ = weight(graph, 24, 32)
    y = graph.add("aten.linear", rows, own, graph.constant(torch.randn(24)))
    graph.set_outputs([graph.add("aten.relu", y)])
    plan = plan_of(graph)
    assert kernels_of(plan)[0] == "dynamic matmul"
    assert len(plan.steps) == 2
    given = torch.randn(shape)
    (expected,) = reference.run(graph, [given], dtype=None)
    torch.testing.assert_close(plan.run(given)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_the_pass_makes_of_layers_without_calibration_has_kernels() -> None:
    model = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 16)).eval()
    x = torch.randn(5, 32)
    graph = graphopt.optimize(model, x, [Quantize(activations="dynamic")]).graph
    plan = plan_of(graph)
    # Nothing else: the kernels find the scales of rows, and no step computes their magnitudes.
    assert kernels_of(plan) == ["dynamic matmul", "pointwise gelu", "dynamic matmul"]
    (expected,) = reference.run(graph, [x])
    torch.testing.assert_close(plan.run(x)[0], expected, rtol=1e-5, atol=1e-5)
