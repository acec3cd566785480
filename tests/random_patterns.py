"""Steps of random graphs that write out what passes look for: several operators each."""

from __future__ import annotations

import math

import torch
from graph_builder import Builder, Unsuitable
from random_steps import (
    Step,
    convolve,
    convolve_transposed,
    image,
    normalize_batch,
    project,
    sequence,
)

from graphopt.ir import Value

PATTERNS: dict[str, Step] = {}


def pattern(function: Step) -> Step:
    PATTERNS[function.__name__] = function
    return function


def _spatial(b: Builder) -> Value:
    return b.tensor(lambda v: v.rank in (3, 4) and bool(v.fixed_size(1)))


def _per_channel(b: Builder, x: Value) -> Value:
    shape = (x.shape[1],) + (1,) * (x.rank - 2)
    return b.constant(*(shape if b.choices.often() else (1, *shape)), positive=True)


def _activate(b: Builder, x: Value) -> Value:
    return b.apply(f"aten.{b.choices.pick(['relu', 'silu', 'hardswish', 'gelu'])}", x)


def _split_use(b: Builder, x: Value) -> None:
    """At times a second user of an intermediate, which forbids to fuse it away."""
    if b.choices.rarely():
        b.apply("aten.sigmoid", x)


# -- layers with neighbours -----------------------------------------------------------------


@pattern
def convolution_then_batch_norm(b: Builder) -> None:
    y = convolve(b, _spatial(b))
    _split_use(b, y)
    z = normalize_batch(b, y)
    if b.choices.often():
        _activate(b, z)


@pattern
def batch_norm_then_convolution(b: Builder) -> None:
    y = normalize_batch(b, _spatial(b))
    _split_use(b, y)
    if b.choices.often():
        convolve(b, y, padding=[0] * (y.rank - 2))
    else:
        convolve(b, y)


@pattern
def transposed_convolution_then_batch_norm(b: Builder) -> None:
    y = convolve_transposed(b, _spatial(b))
    _split_use(b, y)
    normalize_batch(b, y)


@pattern
def linear_then_batch_norm(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank == 2 and v.fixed_size(1) is not None)
    y = project(b, x, b.choices.pick([3, 4]))
    _split_use(b, y)
    normalize_batch(b, y)


@pattern
def convolution_then_arithmetic(b: Builder) -> None:
    y = convolve(b, _spatial(b))
    _split_use(b, y)
    op = b.choices.pick(["mul", "add", "sub", "div"])
    other = b.choices.pick([None, 2.0]) or _per_channel(b, y)
    b.apply(f"aten.{op}.Tensor", y, other)


@pattern
def arithmetic_then_convolution(b: Builder) -> None:
    x = _spatial(b)
    y = b.apply(f"aten.{b.choices.pick(['mul', 'add'])}.Tensor", x, _per_channel(b, x))
    _split_use(b, y)
    convolve(b, y)


@pattern
def linear_then_arithmetic(b: Builder) -> None:
    y = project(b, sequence(b), 4)
    _split_use(b, y)
    other = b.choices.pick([None, 0.5]) or b.constant(4, positive=True)
    b.apply(f"aten.{b.choices.pick(['mul', 'add', 'sub'])}.Tensor", y, other)


@pattern
def arithmetic_then_linear(b: Builder) -> None:
    x = sequence(b)
    y = b.apply(
        f"aten.{b.choices.pick(['mul', 'add'])}.Tensor", x, b.constant(x.shape[-1], positive=True)
    )
    project(b, y, 3)


@pattern
def pad_then_convolution(b: Builder) -> None:
    x = image(b)
    amounts = [b.choices.pick([1, 0, 2]) for _ in range(4)]
    value = b.choices.pick([0, 0.0, 1.0])
    y = b.apply("aten.constant_pad_nd", x, amounts, value)
    _split_use(b, y)
    convolve(b, y, padding=[b.choices.pick([0, 1])] * 2)


@pattern
def parallel_linears(b: Builder) -> None:
    x = sequence(b)
    outs = [project(b, x, b.choices.pick([4, 2, 3])) for _ in range(2 + b.choices.byte() // 128)]
    if b.choices.often():
        b.apply("aten.cat", outs, -1)


@pattern
def parallel_convolutions(b: Builder) -> None:
    x = image(b)
    outs = [convolve(b, x, stride=[1, 1], groups=1) for _ in range(2)]
    if outs[0].shape[2:] == outs[1].shape[2:]:
        b.apply("aten.cat", outs, 1)


@pattern
def residual(b: Builder) -> None:
    x = image(b)
    weight = b.constant(x.shape[1], x.shape[1], 3, 3, scale=0.2, name="weight")
    y = normalize_batch(b, b.apply("aten.conv2d", x, weight, None, [1, 1], [1, 1]))
    b.apply("aten.relu", b.apply("aten.add.Tensor", y, x))


@pattern
def squeeze_and_excite(b: Builder) -> None:
    x = image(b)
    pooled = b.apply("aten.mean.dim", x, [2, 3], True)
    narrow = b.apply("aten.relu", convolve(b, pooled, padding=[0, 0], stride=[1, 1], groups=1))
    weight = b.constant(x.shape[1], narrow.shape[1], 1, 1, scale=0.5, name="weight")
    b.apply("aten.mul.Tensor", x, b.apply("aten.sigmoid", b.apply("aten.conv2d", narrow, weight)))


@pattern
def class_token(b: Builder) -> None:
    """A constant row for every element of the batch, put before a sequence."""
    x = b.tensor(lambda v: v.rank == 3 and v.fixed_size(2) is not None)
    token = b.constant(1, 1, x.shape[2], name="token")
    rows = b.apply("aten.expand", token, [b.size(x, 0), -1, -1])
    b.apply("aten.cat", [rows, x], 1)


# -- what exporters write out -----------------------------------------------------------------


@pattern
def hard_swish_written_out(b: Builder) -> None:
    x = b.tensor()
    shifted = b.apply("aten.add.Tensor", x, 3)
    if b.choices.often():
        gate = b.apply("aten.clamp", shifted, 0.0, 6.0)
    else:
        gate = b.apply("aten.relu6", shifted)
    _split_use(b, gate)
    scaled = b.apply("aten.div.Tensor", gate, 6)
    if b.choices.often():
        b.apply("aten.mul.Tensor", *b.choices.pick([(x, scaled), (scaled, x)]))


@pattern
def gelu_written_out(b: Builder) -> None:
    x = b.tensor()
    if b.choices.often():
        inner = b.apply("aten.erf", b.apply("aten.mul.Tensor", x, math.sqrt(0.5)))
    else:
        cube = b.apply("aten.mul.Tensor", b.apply("aten.pow.Tensor_Scalar", x, 3.0), 0.044715)
        sum_ = b.apply("aten.add.Tensor", x, cube)
        inner = b.apply("aten.tanh", b.apply("aten.mul.Tensor", sum_, math.sqrt(2 / math.pi)))
    gate = b.apply("aten.add.Tensor", inner, 1)
    b.apply("aten.mul.Tensor", b.apply("aten.mul.Tensor", x, 0.5), gate)


@pattern
def silu_written_out(b: Builder) -> None:
    x = b.tensor()
    b.apply("aten.mul.Tensor", x, b.apply("aten.sigmoid", x))


@pattern
def layer_norm_written_out(b: Builder) -> None:
    x = sequence(b)
    b.require_spread(x, -1)
    centered = b.apply("aten.sub.Tensor", x, b.apply("aten.mean.dim", x, [-1], True))
    variance = b.apply("aten.mean.dim", b.apply("aten.pow.Tensor_Scalar", centered, 2), [-1], True)
    raised = b.apply("aten.add.Tensor", variance, b.choices.pick([1e-5, 1e-3]))
    if b.choices.often():
        y = b.apply("aten.mul.Tensor", centered, b.apply("aten.rsqrt", raised))
    else:
        y = b.apply("aten.div.Tensor", centered, b.apply("aten.sqrt", raised))
    if b.choices.often():
        y = b.apply("aten.mul.Tensor", y, b.constant(x.shape[-1], positive=True, name="weight"))
        b.apply("aten.add.Tensor", y, b.constant(x.shape[-1], name="bias"))


@pattern
def attention(b: Builder) -> None:
    """Query, key and value from one input, heads split and joined, written out or fused."""
    x = b.tensor(lambda v: v.rank == 3 and v.fixed_size(2) is not None)
    heads, width = b.choices.pick([2, 1]), b.choices.pick([2, 3])
    batch, length = b.sizes(x)[:2]

    def split_heads(y: Value) -> Value:
        apart = b.apply("aten.reshape", y, [batch, length, heads, width])
        return b.apply("aten.transpose.int", apart, 1, 2)

    query, key, value = (split_heads(project(b, x, heads * width)) for _ in range(3))
    if b.choices.often():
        scores = b.apply("aten.matmul", query, b.apply("aten.transpose.int", key, -2, -1))
        op = b.choices.pick(["div", "mul"])
        factor = math.sqrt(width) if op == "div" else width**-0.5
        scores = b.apply(f"aten.{op}.Tensor", scores, factor)
        fixed = x.fixed_size(1)
        if fixed is not None and b.choices.rarely():
            mask = torch.full((fixed, fixed), -1e4).triu(1)
            scores = b.apply("aten.add.Tensor", scores, b.known(mask, "mask"))
        y = b.apply("aten.matmul", b.apply("aten.softmax.int", scores, -1), value)
    else:
        op = "aten.scaled_dot_product_attention"
        y = b.apply(op, query, key, value, is_causal=b.choices.rarely())
    joined = b.apply("aten.transpose.int", y, 1, 2)
    b.apply("aten.reshape", joined, [batch, length, heads * width])


# -- what simplification removes ------------------------------------------------------------


@pattern
def identity(b: Builder) -> None:
    x = b.tensor()
    op, operand = b.choices.pick(
        [
            ("mul", 1),
            ("add", 0),
            ("mul", 1.0),
            ("add", 0.0),
            ("sub", 0),
            ("div", 1.0),
            ("add", -0.0),
        ]
    )
    y = b.apply(f"aten.{op}.Tensor", x, operand)
    if b.choices.rarely():
        b.apply("aten.mul.Tensor", y, b.known(torch.tensor(1.0)))


@pattern
def signed_zeros(b: Builder) -> None:
    """Zeros of both signs, and an operation that keeps or loses the sign."""
    x = b.tensor()
    rectified = b.apply("aten.neg", b.apply("aten.relu", x))
    op, operand = b.choices.pick([("add", 0.0), ("sub", 0.0), ("add", -0.0), ("mul", 1.0)])
    b.apply(f"aten.{op}.Tensor", rectified, operand)


@pattern
def double_transpose(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 1)
    d = b.choices.byte() % (x.rank - 1)
    y = b.apply("aten.transpose.int", x, d, d + 1)
    if b.choices.rarely():
        y = _activate(b, y)
    b.apply("aten.transpose.int", y, *b.choices.pick([(d, d + 1), (d + 1, d - x.rank)]))


@pattern
def double_permute(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 2)
    order = [*range(1, x.rank), 0]
    inverse = [x.rank - 1, *range(x.rank - 1)]
    y = b.apply("aten.permute", x, order)
    b.apply("aten.permute", y, b.choices.pick([inverse, order]))


@pattern
def reshape_chain(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 1)
    shape = b.sizes(x)
    flat = b.apply("aten.flatten.using_ints", x, b.choices.byte() % 2)
    if b.choices.rarely():
        flat = b.apply("aten.unsqueeze", flat, 0)
    b.apply("aten.reshape", flat, shape if b.choices.often() else [*shape[:-1], 1, shape[-1]])


@pattern
def concatenate_then_split(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 0 and bool(v.fixed_size(v.rank - 1)))
    y = b.apply(f"aten.{b.choices.pick(['neg', 'relu'])}", x)
    size = x.shape[-1]
    joined = b.apply("aten.cat", [x, y], -1)
    _split_use(b, joined)
    sizes = b.choices.pick([[size, size], [2 * size - 1, 1]])
    b.apply_all("aten.split_with_sizes", joined, sizes, -1)


@pattern
def split_then_concatenate(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 0 and bool(v.fixed_size(v.rank - 1)))
    parts = b.apply_all("aten.split.Tensor", x, b.choices.pick([1, 2]), -1)
    if b.choices.rarely():
        parts.reverse()
    b.apply("aten.cat", parts, -1)


@pattern
def slice_chain(b: Builder) -> None:
    x = b.tensor(lambda v: v.rank > 0)
    d = b.choices.byte() % x.rank
    y = b.apply("aten.slice.Tensor", x, d, b.choices.pick([1, 0]), b.choices.pick([5, -1]))
    b.apply("aten.slice.Tensor", y, d, b.choices.pick([0, 1, -2]), 3, b.choices.pick([1, 2]))


@pattern
def repeated(b: Builder) -> None:
    """The same operator applied twice to the same operands."""
    found = [n for n in b.graph.nodes if len(n.outputs) == 1 and n.outputs[0].is_tensor]
    node = b.choices.recent(found)
    args, kwargs = node.operator.arguments(node.operands)
    twin = b.apply(node.op, *args, **kwargs)
    if b.choices.often() and twin.dtype.is_floating_point:
        b.apply("aten.add.Tensor", twin, node.outputs[0])


@pattern
def on_constants(b: Builder) -> None:
    """A subgraph of constants, at times one that would grow when folded."""
    x = b.constant(3, 2)
    op = b.choices.pick(["add", "mul", "transpose", "expand", "cat"])
    if op == "transpose":
        y = b.apply("aten.transpose.int", x, 0, 1)
    elif op == "expand":
        y = b.apply("aten.expand", b.apply("aten.unsqueeze", x, 0), [64, -1, -1])
    elif op == "cat":
        y = b.apply("aten.cat", [x, b.constant(1, 2)])
    else:
        y = b.apply(f"aten.{op}.Tensor", x, b.constant(2))
    total = b.apply("aten.sum", y)
    b.apply("aten.add.Tensor", b.tensor(), total)


@pattern
def cancelled_cast(b: Builder) -> None:
    x = b.tensor(lambda v: v.dtype == torch.float32)
    wide = b.apply("aten.to.dtype", x, torch.float64)
    b.apply("aten.to.dtype", wide, torch.float32)


@pattern
def masked_mean(b: Builder) -> None:
    """A mask over positions made of a comparison of sizes, as pooling of sentences does."""
    x = b.tensor(lambda v: v.rank == 3)
    length = b.size(x, 1)
    positions = b.apply("aten.arange", length)
    mask = b.apply("aten.lt.Scalar", positions, b.choices.pick([2, 1]))
    weights = b.apply("aten.to.dtype", mask, x.dtype)
    column = b.apply("aten.unsqueeze", weights, -1)
    total = b.apply("aten.sum.dim_IntList", b.apply("aten.mul.Tensor", x, column), [1])
    count = b.apply("aten.clamp_min", b.apply("aten.sum", weights), 1.0)
    b.apply("aten.div.Tensor", total, count)


@pattern
def depthwise_separable(b: Builder) -> None:
    x = image(b)
    channels = x.shape[1]
    if channels < 2:
        raise Unsuitable
    depthwise = b.constant(channels, 1, 3, 3, scale=0.3, name="weight")
    y = b.apply("aten.conv2d", x, depthwise, None, [1, 1], [1, 1], groups=channels)
    y = b.apply("aten.relu6", normalize_batch(b, y))
    pointwise = b.constant(6, channels, 1, 1, scale=0.5, name="weight")
    normalize_batch(b, b.apply("aten.conv2d", y, pointwise))
