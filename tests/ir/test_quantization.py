"""quantize, dequantize and fake_quantize, against closed forms and torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.errors import GraphError
from graphopt.ir import Graph, TensorType
from graphopt.ir.quantization import dequantize, fake_quantize, quantize

INT8 = (-128, 127, torch.int8)
UINT8 = (0, 255, torch.uint8)
INT4 = (-8, 7, torch.int8)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def test_halves_round_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49])
    steps = quantize(x, scalar(1.0), None, None, *INT8)
    assert steps.tolist() == [-2, -2, 0, 0, 2, 2, 3]
    assert steps.dtype == torch.int8


def test_values_outside_are_clamped():
    x = torch.tensor([-1e9, -129.0, -128.4, 127.4, 128.0, 1e9, float("inf"), -float("inf")])
    steps = quantize(x, scalar(1.0), None, None, *INT8)
    assert steps.tolist() == [-128, -128, -128, 127, 127, 127, 127, -128]
    assert quantize(x, scalar(1.0), None, None, *INT4).tolist() == [-8, -8, -8, 7, 7, 7, 7, -8]


def test_the_zero_point_comes_after_rounding():
    x = torch.tensor([0.5, 1.5, -0.5])
    steps = quantize(x, scalar(1.0), torch.tensor(3, dtype=torch.uint8), None, *UINT8)
    assert steps.tolist() == [3, 5, 3]  # not round(x + 3) = 4, 4, 2


def test_unsigned_zero_points_do_not_wrap():
    zero = torch.tensor(200, dtype=torch.uint8)
    steps = torch.tensor([0, 200, 255], dtype=torch.uint8)
    assert dequantize(steps, scalar(0.5), zero, None, *UINT8).tolist() == [-100, 0, 27.5]
    signed = torch.tensor(-128, dtype=torch.int8)
    steps = torch.tensor([127, -128], dtype=torch.int8)
    assert dequantize(steps, scalar(1.0), signed, None, *INT8).tolist() == [255, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_an_axis_as_torch_does(axis: int):
    x = torch.randn(3, 4, 5)
    size = x.shape[axis]
    scale = torch.rand(size) * 0.05 + 0.01
    zero = torch.randint(-5, 5, (size,), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, axis, -128, 127)
    ours = fake_quantize(x, scale, zero.to(torch.int8), axis, *INT8)
    # torch multiplies by the scale's inverse, which may round the other way by one step.
    steps = (ours - expected).abs() / scale.reshape([-1 if d == axis else 1 for d in range(3)])
    assert (steps > 1e-3).float().mean() < 0.02
    assert steps.max() < 1.001


def test_negative_axes():
    x = torch.randn(3, 4)
    scale = torch.rand(4) + 0.1
    assert torch.equal(quantize(x, scale, None, -1, *INT8), quantize(x, scale, None, 1, *INT8))


@pytest.mark.parametrize(("size", "block_size"), [(6, 2), (6, 6), (7, 3), (5, 8)])
def test_blocks(size: int, block_size: int):
    """Blocks of one size along an axis, the last perhaps shorter, against a loop."""
    x = torch.randn(2, size)
    blocks = -(-size // block_size)
    scale = torch.rand(2, blocks) * 0.1 + 0.01
    zero = torch.randint(-4, 4, (2, blocks), dtype=torch.int8)
    steps = quantize(x, scale, zero, 1, *INT8, block_size)
    back = dequantize(steps, scale, zero, 1, *INT8, block_size)
    for row in range(2):
        for column in range(size):
            s, z = scale[row, column // block_size], zero[row, column // block_size]
            wanted = (torch.round(x[row, column] / s) + z).clamp(-128, 127)
            assert steps[row, column] == wanted
            assert back[row, column] == (wanted - z) * s


def test_the_error_is_at_most_half_a_step():
    x = torch.linspace(-1, 1, 1001)
    scale = scalar(1 / 127)
    back = dequantize(quantize(x, scale, None, None, *INT8), scale, None, None, *INT8)
    assert (back - x).abs().max() <= scale / 2 + 1e-6


def test_dtypes():
    x = torch.ones(3, dtype=torch.float64)
    steps = quantize(x, scalar(0.5).double(), None, None, -(2**31), 2**31 - 1, torch.int32)
    assert steps.dtype == torch.int32
    assert dequantize(steps, scalar(0.5).double(), None, None, *INT8).dtype == torch.float64
    assert fake_quantize(x.float(), scalar(0.5), None, None, *INT8).dtype == torch.float32


def test_the_gradient_passes_where_nothing_is_clamped():
    x = torch.tensor([-1e3, -128.4, -1.3, 0.0, 127.4, 128.6], requires_grad=True)
    weights = torch.arange(1.0, 7.0)
    (fake_quantize(x, scalar(1.0), None, None, *INT8) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_the_gradient_with_a_zero_point_per_channel():
    x = torch.tensor([[-1.0, 5.0], [250.0, 260.0]], requires_grad=True)
    zero = torch.tensor([0, 5], dtype=torch.uint8)
    scale = torch.ones(2)
    fake_quantize(x, scale, zero, 0, *UINT8).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1], [1, 0]]


def test_fake_quantize_is_quantize_and_dequantize():
    x = torch.randn(4, 6)
    scale, zero = torch.rand(4) * 0.1 + 0.01, torch.randint(-9, 9, (4,), dtype=torch.int8)
    parameters = (scale, zero, 0, *INT8)
    expected = dequantize(quantize(x, *parameters), *parameters)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fake_quantize(x, *parameters), expected)
    with torch.no_grad():
        assert not fake_quantize(x.requires_grad_(), *parameters).requires_grad


@pytest.mark.parametrize("name", ["quantize", "dequantize", "fake_quantize"])
def test_torchs_own_checks(name: str):
    x = torch.randn(4, 6, requires_grad=name == "fake_quantize")
    given = torch.zeros(4, 6, dtype=torch.int8) if name == "dequantize" else x
    scale, zero = torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.int8)
    torch.library.opcheck(getattr(torch.ops.graphopt, name).default, (given, scale, zero, 0, *INT8))


@pytest.mark.parametrize("operator", [quantize, dequantize, fake_quantize])
def test_tracing_keeps_the_operators_whole(operator):
    scale = torch.rand(4) + 0.1
    target = getattr(torch.ops.graphopt, operator.__name__)
    x = torch.zeros(4, 6, dtype=torch.int8) if operator is dequantize else torch.randn(4, 6)
    traced = make_fx(lambda x: target(x, scale, None, 0, *INT8))(x)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [target.default]


def test_in_a_graph():
    graph = Graph({"batch": 2})
    x = graph.add_input("x", TensorType(torch.float32, (2, 6)), {0: "batch"})
    scale = graph.constant(torch.ones(()), "scale")
    steps = graph.add("graphopt.quantize", x, scale, None, None, *INT8)
    back = graph.add("graphopt.dequantize", steps, scale, None, None, *INT8)
    graph.set_outputs([back])
    assert steps.types[1] == TensorType(torch.int8, (5, 6))
    assert back.types == x.types
    graph.verify()
    twin = Graph.from_text(graph.to_text())
    assert twin.to_text() == graph.to_text()


@pytest.mark.parametrize(
    ("shape", "axis", "block_size"),
    [((3,), None, None), ((3,), 0, None), ((1,), 1, None), ((4, 2), 1, 4), ((4,), 1, 2)],
)
def test_scales_that_do_not_fit(shape, axis, block_size):
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (4, 6)))
    scale = graph.constant(torch.ones(shape), "scale")
    if (shape, axis, block_size) == ((4, 2), 1, 4):
        graph.add("graphopt.quantize", x, scale, None, axis, *INT8, block_size)
        block_size = 2
    for op in ("quantize", "fake_quantize"):
        with pytest.raises(GraphError, match="is not valid"):
            graph.add(f"graphopt.{op}", x, scale, None, axis, *INT8, block_size)
