"""Where quantize and dequantize go, as text."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from pass_support import Net

from graphopt.ir import Graph, Value
from graphopt.passes import Quantize
from graphopt.pipeline import Pipeline


def quantized(graph: Graph, **options: object) -> Graph:
    x = torch.randn(graph.inputs[0].shape, generator=torch.Generator().manual_seed(0))
    given = {"method": "nearest", "correct_bias": False, **options}
    Pipeline([Quantize(data=[x], **given)]).run(graph)  # type: ignore[arg-type]
    return graph


def shown(graph: Graph) -> str:
    """Every node in short: its operands without literals; of a quantization, whose scale it has;
    dequantized constants are left out."""
    lines = []
    for node in graph.nodes:
        if node.op in ("graphopt.quantize", "graphopt.dequantize"):
            if node["x"].is_constant:
                continue
            operands = f"%{node['x'].name} by {node['scale'].name.removesuffix('.scale')}"
        else:
            names = [v.name for v in node.input_values() if _is_data(v)]
            operands = " ".join(f"%{name}" for name in names)
        lines.append(f"{node.name} = {node.op.split('.')[1]} {operands}")
    outputs = ", ".join(f"%{v.name}" for v in graph.outputs)
    return "\n".join([*lines, f"return {outputs}"])


def _is_data(value: Value) -> bool:
    producer = value.producer
    if producer is None:
        return not value.is_constant
    return producer.op != "graphopt.dequantize" or not producer["x"].is_constant


def assert_scheme(graph: Graph, expected: str) -> None:
    assert shown(graph) == textwrap.dedent(expected).strip()


def test_a_layer_its_activation_and_a_linear_layer_that_returns_floats() -> None:
    net = Net(3, 6, 6)
    y = net("aten.relu", net.convolution(net.x, 4))
    z = net("aten.flatten.using_ints", y, 1)
    graph = quantized(net.done(net.linear(z, 5)))
    assert_scheme(
        graph,
        """
        x_q = quantize %x by x
        x_dq = dequantize %x_q by x
        conv2d = conv2d %x_dq
        relu = relu %conv2d
        relu_q = quantize %relu by relu
        relu_dq = dequantize %relu_q by relu
        flatten = flatten %relu_dq
        flatten_q = quantize %flatten by relu
        flatten_dq = dequantize %flatten_q by relu
        linear = linear %flatten_dq
        return %linear
        """,
    )


def residual_block() -> Graph:
    net = Net(4, 6, 6)
    first = net("aten.relu", net.convolution(net.x, 4, 1))
    inner = net("aten.hardtanh", net.convolution(first, 4, 3, padding=[1, 1]), 0.0, 6.0)
    second = net.convolution(inner, 4, 1)
    total = net("aten.relu", net("aten.add.Tensor", first, second))
    return net.done(net.convolution(total, 2, 1))


def test_a_residual_addition_is_fused_to_the_later_layer() -> None:
    graph = quantized(residual_block())
    assert_scheme(
        graph,
        """
        x_q = quantize %x by x
        x_dq = dequantize %x_q by x
        conv2d = conv2d %x_dq
        relu = relu %conv2d
        relu_q = quantize %relu by relu
        relu_dq = dequantize %relu_q by relu
        conv2d_1 = conv2d %relu_dq
        hardtanh = hardtanh %conv2d_1
        hardtanh_q = quantize %hardtanh by hardtanh
        hardtanh_dq = dequantize %hardtanh_q by hardtanh
        conv2d_2 = conv2d %hardtanh_dq
        add = add %relu_dq %conv2d_2
        relu_1 = relu %add
        relu_1_q = quantize %relu_1 by relu_1
        relu_1_dq = dequantize %relu_1_q by relu_1
        conv2d_3 = conv2d %relu_1_dq
        return %conv2d_3
        """,
    )


def test_a_residual_addition_by_itself() -> None:
    graph = quantized(residual_block(), fuse_additions=False)
    assert "add = add %relu_dq %conv2d_2_dq" in shown(graph)


def test_concatenation_and_pooling_share_their_scale() -> None:
    net = Net(3, 8, 8)
    a = net("aten.relu", net.convolution(net.x, 4, 1))
    b = net("aten.relu", net.convolution(net.x, 2, 1))
    both = net("aten.max_pool2d", net("aten.cat", [a, b], 1), [2, 2], [2, 2])
    graph = quantized(net.done(net.convolution(both, 2, 1)))
    lines = shown(graph).splitlines()
    scales = {line.split()[-1] for line in lines if "= quantize" in line}
    assert len(scales) == 2
    shared = {line.split()[0] for line in lines if "= quantize" in line and "%x " not in line}
    assert shared == {"relu_q", "relu_1_q", "cat_q", "max_pool2d_q"}
    assert "cat = cat %relu_dq %relu_1_dq" in lines


def test_zero_padding_stays_between_dequantize_and_layer() -> None:
    net = Net(3, 6, 6)
    y = net("aten.relu", net.convolution(net.x, 4))
    padded = net("aten.pad", y, [0, 1, 0, 1], "constant", 0.0)
    graph = quantized(net.done(net.convolution(padded, 2, stride=[2, 2])))
    assert "pad = pad %relu_dq\nconv2d_1 = conv2d %pad" in shown(graph)


def test_an_activation_whose_operand_others_read_keeps_the_scale() -> None:
    net = Net(3, 6, 6)
    y = net.convolution(net.x, 4, 1)
    z = net.convolution(net("aten.relu", y), 4, 1)
    total = net("aten.add.Tensor", y, z)
    graph = quantized(net.done(net.convolution(total, 2, 1)))
    text = shown(graph)
    assert "relu = relu %conv2d_dq\nrelu_q = quantize %relu by conv2d" in text
    assert "add = add %conv2d_dq %conv2d_1" in text


def test_an_activation_that_is_no_clamp_reads_a_quantized_convolution() -> None:
    net = Net(3, 6, 6)
    y = net("aten.silu", net.convolution(net.x, 4, 1))
    text = shown(quantized(net.done(net.convolution(y, 2, 1))))
    assert "silu = silu %conv2d_dq\nsilu_q = quantize %silu by silu" in text


def test_a_convolution_that_floats_read_is_quantized_after_its_activation() -> None:
    net = Net(3, 6, 6)
    y = net("aten.relu", net.convolution(net.x, 4, 1))
    assert_scheme(
        quantized(net.done(net("aten.mean.dim", y, [2, 3]))),
        """
        x_q = quantize %x by x
        x_dq = dequantize %x_q by x
        conv2d = conv2d %x_dq
        relu = relu %conv2d
        relu_q = quantize %relu by relu
        relu_dq = dequantize %relu_q by relu
        mean = mean %relu_dq
        return %mean
        """,
    )


def test_what_the_network_returns_is_not_quantized() -> None:
    net = Net(3, 6, 6)
    text = shown(quantized(net.done(net("aten.relu", net.convolution(net.x, 4, 1)))))
    assert text.endswith("conv2d = conv2d %x_dq\nrelu = relu %conv2d\nreturn %relu")


def test_floats_around_linear_layers_stay_floats() -> None:
    """A normalisation is read by a layer and by an addition; only the layer reads integers."""
    net = Net(5, 8)
    y = net("aten.layer_norm", net.x, [8], None, None)
    total = net("aten.add.Tensor", y, net("aten.gelu", net.linear(y, 8)))
    assert_scheme(
        quantized(net.done(total)),
        """
        layer_norm = layer_norm %x
        layer_norm_q = quantize %layer_norm by layer_norm
        layer_norm_dq = dequantize %layer_norm_q by layer_norm
        linear = linear %layer_norm_dq
        gelu = gelu %linear
        add = add %layer_norm %gelu
        return %add
        """,
    )


def test_pairs_are_not_repeated() -> None:
    graph = quantized(residual_block())
    quantizes = [node["x"] for node in graph.nodes if node.op == "graphopt.quantize"]
    assert len(set(quantizes)) == len(quantizes)
    for value in quantizes:
        assert value.producer is None or value.producer.op != "graphopt.dequantize"


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_after_a_relu_zero_is_the_lowest_step(dtype: str) -> None:
    net = Net(3, 6, 6)
    y = net("aten.relu", net.convolution(net.x, 4, 1))
    graph = quantized(net.done(net.convolution(y, 2, 1)), activations=dtype)
    steps = graph.value("relu_q").producer
    assert steps is not None
    limits = torch.iinfo(getattr(torch, dtype))
    assert (steps["quant_min"], steps["quant_max"]) == (limits.min, limits.max)
    assert steps["zero_point"].constant.item() == limits.min


def test_the_text_of_a_layer() -> None:
    net = Net(2, 3, 3)
    graph = quantized(net.done(net.convolution(net.x, 2, 1)))
    text = re.sub(r"constant \[.*\]|constant [\d.e-]+$", "constant", graph.to_text(), flags=re.M)
    expected = """
      %x.scale: f32[] = constant
      %x.zero_point: u8[] = constant
      %x_q: u8[2, 2, 3, 3] = graphopt.quantize(%x, %x.scale, %x.zero_point, None, 0, 255, \
torch.uint8)  # by quantize
      %x_dq: f32[2, 2, 3, 3] = graphopt.dequantize(%x_q, %x.scale, %x.zero_point, None, 0, 255, \
torch.uint8)  # by quantize
      %conv.weight_quantized: i8[2, 2, 1, 1] = constant
      %conv.weight_scale: f32[2] = constant
      %conv_weight_dq: f32[2, 2, 1, 1] = graphopt.dequantize(%conv.weight_quantized, \
%conv.weight_scale, None, 0, -127, 127, torch.int8)  # by quantize
      %conv.bias_quantized: i32[2] = constant
      %conv.bias_scale: f32[2] = constant
      %conv_bias_dq: f32[2] = graphopt.dequantize(%conv.bias_quantized, %conv.bias_scale, None, 0, \
-2147483648, 2147483647, torch.int32)  # by quantize
      %conv2d: f32[2, 2, 3, 3] = aten.conv2d(%x_dq, %conv_weight_dq, %conv_bias_dq)
      return %conv2d
    """
    got = "\n".join(line.strip() for line in text.splitlines()[1:-1])
    wanted = "\n".join(line.strip() for line in textwrap.dedent(expected).strip().splitlines())
    assert got == wanted
