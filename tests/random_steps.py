"""The steps of random graphs: one operator each, with what it needs around it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import torch
from graph_builder import Builder, Choices, Unsuitable

from graphopt.ir import Graph, TensorType, Value

Step = Callable[[Builder], object]
STEPS: dict[str, Step] = {}

SCALARS = (1.0, 0.0, 2.0, -1.0, 0.5, 1, 0, 3, -0.0, 6.0, 0.25)
UNARY = (
    "relu sigmoid tanh silu gelu hardswish hardsigmoid hardtanh leaky_relu elu softplus mish abs "
    "neg square exp sin cos relu6 log_sigmoid erf sign floor round reciprocal sqrt rsqrt log "
    "isnan selu celu expm1 hardshrink"
).split()
VIEWS = "contiguous clone alias detach lift_fresh_copy".split()


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


# -- beginning and end ------------------------------------------------------------------------


def start(choices: Choices) -> Builder:
    """An empty graph with one to three inputs, in half of the cases with free sizes."""
    freedom = choices.byte() % 8
    batch = choices.pick([2, 3, 1, 5, 0]) if freedom < 4 else choices.pick([2, 3, 4, 1])
    length = choices.pick([3, 4, 5, 2, 7, 1]) if freedom >= 6 else choices.pick([3, 4, 1, 5, 7, 0])
    channels = choices.pick([4, 2, 3, 6, 8, 1, 5, 0])
    side = choices.pick([4, 5, 7, 8, 1, 3])
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...], dict[int, str]]] = {
        "image": (torch.float32, (batch, channels, side, side + 1), {0: "batch"}),
        "tokens": (torch.float32, (batch, length, channels), {0: "batch", 1: "tokens"}),
        "features": (torch.float32, (batch, channels), {0: "batch"}),
        "signal": (torch.float32, (batch, channels, length), {0: "batch", 2: "tokens"}),
        "ids": (torch.int64, (batch, length), {0: "batch", 1: "tokens"}),
        "mask": (torch.bool, (batch, length), {0: "batch", 1: "tokens"}),
        "scalar": (torch.float32, (), {}),
    }
    chosen = [choices.pick(["image", "image", "tokens", "features", "signal"])]
    chosen += [choices.pick([*kinds, "image"]) for _ in range(choices.byte() // 86)]
    wanted = {"batch"} if 4 <= freedom < 6 else {"batch", "tokens"} if freedom >= 6 else set()
    borne = {name for kind in chosen for name in kinds[kind][2].values()}
    sizes = {n: size for n, size in (("batch", batch), ("tokens", length)) if n in wanted & borne}
    restrictions = {"batch": f"batch % {max(batch, 1)} == 0", "tokens": f"tokens <= {length + 8}"}
    graph = Graph(sizes, [restrictions[name] for name in sizes if choices.byte() >= 224])
    builder = Builder(
        graph,
        choices,
        inputs=tuple([] for _ in graph.assignments),
        environments=[{} for _ in graph.assignments],
    )
    for name in chosen:
        dtype, shape, named = kinds[name]
        free = {d: size for d, size in named.items() if size in sizes}
        builder.add_input(name, TensorType(dtype, shape), free)
    return builder


def declare_outputs(builder: Builder) -> None:
    """Return most of what nobody uses, and at times an intermediate, an input, a constant, a
    size, a literal, or one value twice."""
    graph, choices = builder.graph, builder.choices
    unused = [v for v in builder.pool if v.producer is not None and not v.users]
    outputs: list[object] = list(unused[-4:]) or [builder.pool[-1]]
    if choices.rarely():
        outputs.append(choices.pick(builder.pool))
    if choices.rarely():
        outputs.append(choices.pick(graph.inputs))
    if choices.rarely():
        outputs.append(builder.constant(*choices.pick([(), (3,), (2, 2)])))
    if choices.rarely():
        outputs.append(choices.pick(outputs))
    if choices.rarely():
        outputs.append(choices.pick([1, None, 0.5]))
    scalars = [v for v in graph.values if not v.is_tensor]
    if scalars and choices.rarely():
        outputs.append(choices.pick(scalars))
    graph.set_outputs(outputs)


# -- elementwise --------------------------------------------------------------------------------


@step
def unary(b: Builder) -> Value:
    x = b.tensor()
    name = b.choices.pick(UNARY)
    if name in ("reciprocal", "sqrt", "rsqrt", "log"):
        x = b.apply("aten.add.Tensor", b.apply("aten.abs", x), 0.5)
    if name == "gelu":
        return b.apply("aten.gelu", x, approximate=b.choices.pick(["none", "tanh"]))
    if name == "leaky_relu":
        return b.apply("aten.leaky_relu", x, b.choices.pick([0.01, 0.2, 1.0]))
    if name == "hardtanh":
        return b.apply("aten.hardtanh", x, *b.choices.pick([(), (0.0, 6.0)]))
    return b.apply(f"aten.{name}", x)


@step
def clamp(b: Builder) -> Value:
    x = b.tensor()
    kind = b.choices.pick(["clamp", "clamp_min", "clamp_max"])
    if kind == "clamp":
        return b.apply("aten.clamp", x, *b.choices.pick([(0.0, 6.0), (-1.0, 1.0), (None, 0.5)]))
    return b.apply(f"aten.{kind}", x, b.choices.pick([0.0, 1.0, -0.5]))


@step
def with_scalar(b: Builder) -> Value:
    x, scalar = b.tensor(), b.choices.pick(SCALARS)
    op = b.choices.pick(["mul", "add", "sub", "div", "rsub", "pow", "floor", "maximum"])
    if op in ("add", "sub") and b.choices.rarely():
        return b.apply(f"aten.{op}.Tensor", x, scalar, alpha=b.choices.pick([2, 0, 1]))
    if op in ("mul", "add", "sub", "div"):
        return b.apply(f"aten.{op}.{b.choices.pick(['Tensor', 'Scalar'])}", x, scalar)
    if op == "rsub":
        return b.apply("aten.rsub.Scalar", x, scalar)
    if op == "pow":
        return b.apply("aten.pow.Tensor_Scalar", x, b.choices.pick([2, 1, 2.0, 3, 0, 1.0]))
    if op == "floor":
        return b.apply("aten.div.Tensor_mode", x, 2.0, rounding_mode="floor")
    return b.apply("aten.maximum", x, b.known(torch.tensor(float(scalar))))


@step
def with_tensor(b: Builder) -> Value:
    """Two values of the graph, broadcast against each other."""
    x = b.tensor()
    y = b.tensor(lambda v: _broadcast(x, v))
    op = b.choices.pick(["add", "mul", "sub", "maximum", "minimum", "div"])
    if op in ("add", "sub") and b.choices.rarely():
        return b.apply(f"aten.{op}.Tensor", x, y, alpha=b.choices.pick([2, 0.5, -1]))
    if op == "div":
        return b.apply("aten.div.Tensor", x, b.apply("aten.add.Tensor", b.apply("aten.abs", y), 1))
    return b.apply(f"aten.{op}" + (".Tensor" if op in ("add", "mul", "sub") else ""), x, y)


@step
def with_constant(b: Builder) -> Value:
    """A constant that is 0-dimensional, per channel, or of the whole shape; at times ones, zeros
    or an integer."""
    x = b.tensor()
    shapes: list[tuple[int, ...]] = [()]
    fixed = [x.fixed_size(d) for d in range(x.rank)]
    if x.rank and fixed[-1] is not None:
        shapes.append((fixed[-1],))
    if x.rank > 1 and fixed[1] is not None:
        shapes.append((fixed[1],) + (1,) * (x.rank - 2))
        shapes.append((1, fixed[1]) + (1,) * (x.rank - 2))
    if x.rank and all(size is not None for size in fixed[1:]):
        shapes.append((1, *(size for size in fixed[1:] if size is not None)))
    shape = b.choices.pick(shapes)
    filling = b.choices.byte()
    if filling >= 240:
        other = b.known(torch.ones(shape))
    elif filling >= 224:
        other = b.known(torch.zeros(shape))
    elif filling >= 200:
        other = b.constant(*shape, dtype=torch.int64)
    else:
        other = b.constant(*shape, positive=True)
    op = b.choices.pick(["mul.Tensor", "add.Tensor", "sub.Tensor", "maximum", "div.Tensor"])
    pair = (x, other) if op == "div.Tensor" or b.choices.often() else (other, x)
    return b.apply(f"aten.{op}", *pair)


def mask_of(b: Builder) -> Value:
    """A bool tensor; a new comparison if there is none."""
    if any(v.dtype == torch.bool for v in b.pool):
        return b.of_dtype(torch.bool)
    return b.apply("aten.gt.Scalar", b.tensor(), 0.3)


@step
def comparison(b: Builder) -> Value:
    x = b.tensor()
    op = b.choices.pick(["gt", "le", "lt", "ge", "ne", "eq"])
    if b.choices.often():
        return b.apply(f"aten.{op}.Scalar", x, b.choices.pick([0.3, -0.7, 1.1]))
    return b.apply(f"aten.{op}.Tensor", x, b.tensor(lambda v: _broadcast(x, v)))


@step
def logic(b: Builder) -> Value:
    x = mask_of(b)
    op = b.choices.pick(["logical_not", "bitwise_not", "logical_and", "logical_or", "bitwise_and"])
    if op.endswith("not"):
        return b.apply(f"aten.{op}", x)
    y = b.choices.recent([v for v in b.pool if v.dtype == torch.bool and _broadcast(x, v)])
    return b.apply(f"aten.{op}" + (".Tensor" if op == "bitwise_and" else ""), x, y)


@step
def masking(b: Builder) -> Value:
    mask = mask_of(b)
    x = b.tensor(lambda v: _broadcast(mask, v))
    kind = b.choices.pick(["where", "masked_fill", "where_scalar", "multiply"])
    if kind == "where":
        return b.apply("aten.where.self", mask, x, b.tensor(lambda v: _broadcast(x, v)))
    if kind == "masked_fill":
        return b.apply("aten.masked_fill.Scalar", x, mask, b.choices.pick([0.0, -4.0]))
    if kind == "where_scalar":
        return b.apply("aten.where.ScalarOther", mask, x, b.choices.pick([0.0, 1.0]))
    return b.apply("aten.mul.Tensor", x, mask)


def integers_of(b: Builder) -> Value:
    """An int64 tensor; a new one made of a mask if there is none."""
    if any(v.dtype == torch.int64 for v in b.pool):
        return b.of_dtype(torch.int64)
    return b.apply("aten.to.dtype", mask_of(b), torch.int64)


@step
def integers(b: Builder) -> Value:
    n = integers_of(b)
    op = b.choices.pick(["add", "mul", "remainder", "to", "sub", "eq", "float"])
    if op == "remainder":
        return b.apply("aten.remainder.Scalar", n, b.choices.pick([3, 5, 2]))
    if op == "to":
        return b.apply("aten.to.dtype", n, b.choices.pick([torch.float32, torch.int64, torch.bool]))
    if op == "eq":
        return b.apply("aten.eq.Scalar", n, b.choices.pick([0, 1, 2]))
    if op == "float":
        return b.apply("aten.mul.Tensor", n, 0.5)
    return b.apply(f"aten.{op}.Tensor", n, b.choices.pick([1, 0, 2, -1]))


@step
def cast(b: Builder) -> Value:
    x = b.choices.recent(b.pool)
    return b.apply("aten.to.dtype", x, b.choices.pick([torch.float32, torch.float64, torch.bool]))


# -- views --------------------------------------------------------------------------------------


@step
def copy(b: Builder) -> Value:
    x = b.choices.recent(b.pool)
    if b.choices.rarely():
        return b.apply("aten.dropout", x, 0.5, False)
    return b.apply(f"aten.{b.choices.pick(VIEWS)}", x)


@step
def reshape(b: Builder) -> Value:
    """Merge two dimensions, split one, insert a 1, or change nothing."""
    x = b.tensor(lambda v: v.rank > 0)
    kind = b.choices.pick(["merge", "split", "insert", "same", "flatten", "free"])
    d = b.choices.byte() % x.rank
    if kind == "flatten":
        return b.apply("aten.flatten.using_ints", x, b.choices.byte() % 2 % x.rank)
    if kind == "free":  # whatever is left, in one dimension
        return b.apply("aten.reshape", x, [-1, *b.sizes(x)[1:]])
    shape = b.sizes(x)
    if kind == "merge" and x.rank > 1:
        d %= x.rank - 1
        first, second = shape[d], shape[d + 1]
        if isinstance(first, int) and isinstance(second, int):
            merged: int | Value = first * second
        elif b.choices.often():
            merged = -1
        else:
            merged = b.apply("operator.mul", first, second)
        shape[d : d + 2] = [merged]
    elif kind == "split":
        size = shape[d]
        if not isinstance(size, int):
            raise Unsuitable
        factor = b.choices.pick([n for n in (2, 3, 1, 4, 5) if size % n == 0])
        shape[d : d + 1] = [size // factor, factor]
    elif kind == "insert":
        shape.insert(d, 1)
    return b.apply("aten.reshape", x, shape)


@step
def permute(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 1)
    first, second = b.choices.byte() % x.rank, b.choices.byte() % x.rank
    if b.choices.often():
        return b.apply("aten.transpose.int", x, first, second - x.rank)
    order = list(range(x.rank))
    order.insert(first, order.pop(second))
    return b.apply("aten.permute", x, order)


@step
def slice(b: Builder) -> Value:
    x = b.choices.recent([v for v in b.pool if v.rank > 0])
    d = b.choices.byte() % x.rank
    bounds = b.choices.pick([(1, None), (0, 9223372036854775807), (0, 2), (None, -1), (-2, None)])
    return b.apply("aten.slice.Tensor", x, d, *bounds, step=b.choices.pick([1, 1, 2]))


@step
def select(b: Builder) -> Value:
    x = b.choices.recent([v for v in b.pool if v.rank > 0])
    return b.apply("aten.select.int", x, b.choices.byte() % x.rank, b.choices.pick([0, -1, 1]))


@step
def squeeze(b: Builder) -> Value:
    x = b.choices.recent(b.pool)
    if b.choices.often() or not x.rank:
        return b.apply("aten.unsqueeze", x, b.choices.byte() % (x.rank + 1))
    return b.apply("aten.squeeze.dim", x, b.choices.byte() % x.rank)


@step
def expand(b: Builder) -> Value:
    x = b.tensor(lambda v: 1 in v.shape or v.rank < 3)
    target: list[int | Value] = [
        b.choices.pick([3, -1, 1, 2]) if x.fixed_size(d) == 1 else -1 for d in range(x.rank)
    ]
    if b.choices.rarely():
        target.insert(0, 2)
    elif x.rank and x.fixed_size(0) == 1:
        target[0] = b.size(b.graph.inputs[0], 0)
    return b.apply("aten.expand", x, target)


@step
def concatenate(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 0)
    d = b.choices.byte() % x.rank
    parts = [x]
    for _ in range(1 + b.choices.byte() // 128):
        parts.append(b.tensor(lambda v: _alike(x, v, d)))
    if b.choices.rarely():
        return b.apply("aten.stack", [part for part in parts if part.types == x.types], d)
    return b.apply("aten.cat", parts, d - x.rank if b.choices.rarely() else d)


@step
def split(b: Builder) -> list[Value]:
    x = b.tensor(lambda v: any(v.fixed_size(d) for d in range(v.rank)))
    d = b.choices.pick([d for d in range(x.rank) if x.fixed_size(d)])
    size = x.shape[d]
    kind = b.choices.pick(["split", "chunk", "split_with_sizes", "unbind"])
    if kind == "split":
        return b.apply_all("aten.split.Tensor", x, b.choices.pick([max(size // 2, 1), 2, 1]), d)
    if kind == "chunk":
        return b.apply_all("aten.chunk", x, b.choices.pick([2, 3]), d)
    if kind == "unbind":
        return b.apply_all("aten.unbind.int", x, d)
    first = b.choices.byte() % (size + 1)
    return b.apply_all("aten.split_with_sizes", x, [first, size - first], d)


@step
def rearrange(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 0)
    d = b.choices.byte() % x.rank
    kind = b.choices.pick(["flip", "roll", "repeat", "shuffle"])
    if kind == "flip":
        return b.apply("aten.flip", x, [d])
    if kind == "roll":
        return b.apply("aten.roll", x, [b.choices.pick([1, -1, 2])], [d])
    if kind == "repeat":
        return b.apply("aten.repeat", x, [1] * d + [2] + [1] * (x.rank - d - 1))
    return b.apply("aten.pixel_shuffle", x, 2)


@step
def pad(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 1)
    amounts = [b.choices.pick([1, 0, 2, -1]) for _ in range(2 * (1 + b.choices.byte() // 128))]
    if b.choices.often():
        return b.apply("aten.constant_pad_nd", x, amounts, b.choices.pick([0, 0.0, 1.5]))
    mode = b.choices.pick(["constant", "reflect", "replicate"])
    return b.apply("aten.pad", x, amounts, mode)


# -- layers -------------------------------------------------------------------------------------


def image(b: Builder) -> Value:
    """A tensor that a two-dimensional layer can take."""
    return b.tensor(lambda v: v.rank == 4 and bool(v.fixed_size(1)))


def convolve(b: Builder, x: Value, **options: object) -> Value:
    """A convolution of one or two dimensions, with random geometry except for the options."""
    channels, dimensions = x.shape[1], x.rank - 2
    groups = options.get("groups") or b.choices.pick(
        [n for n in (1, 1, channels, 2) if channels % n == 0]
    )
    assert isinstance(groups, int)
    out = groups * b.choices.pick([2, 1, 3, 4])
    smallest = [min(t.shape[2 + d] for t in tensor_types(x)) for d in range(dimensions)]
    kernel = [b.choices.pick([k for k in (3, 1, 2, 5) if k <= max(n, 1)]) for n in smallest]
    dilation = b.choices.pick([1, 1, 1, 2])
    fits = all(dilation * (k - 1) < n for k, n in zip(kernel, smallest, strict=True))
    geometry: dict[str, object] = {
        "stride": [b.choices.pick([1, 1, 2, 3])] * dimensions,
        "padding": [b.choices.pick([1, 0, 2]) for _ in range(dimensions)],
        "dilation": [dilation if fits else 1] * dimensions,
        "groups": groups,
        **options,
    }
    fan_in = channels // groups * reduce(operator.mul, kernel, 1)
    weight = b.constant(out, channels // groups, *kernel, scale=fan_in**-0.5, name="weight")
    bias = b.constant(out, name="bias") if b.choices.often() else None
    return b.apply(f"aten.conv{dimensions}d", x, weight, bias, **geometry)


@step
def convolution(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank in (3, 4) and bool(v.fixed_size(1)))
    if x.rank == 4 and b.choices.byte() >= 224:
        weight = b.constant(2, x.shape[1], 3, 3, scale=0.3, name="weight")
        padding = b.choices.pick(["same", "valid"])
        return b.apply("aten.conv2d.padding", x, weight, padding=padding)
    return convolve(b, x)


def convolve_transposed(b: Builder, x: Value) -> Value:
    channels, dimensions = x.shape[1], x.rank - 2
    groups = b.choices.pick([1, 1, channels])
    out = b.choices.pick([2, 1, 3])
    stride = b.choices.pick([2, 1, 3])
    weight = b.constant(channels, out, *[3] * dimensions, scale=0.3, name="weight")
    bias = b.constant(out * groups, name="bias") if b.choices.often() else None
    op = f"aten.conv_transpose{dimensions}d" + (".input" if dimensions == 2 else "")
    return b.apply(
        op,
        x,
        weight,
        bias,
        stride=[stride] * dimensions,
        padding=[b.choices.pick([1, 0])] * dimensions,
        output_padding=[b.choices.byte() % stride] * dimensions,
        groups=groups,
    )


@step
def transposed_convolution(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank in (3, 4) and bool(v.fixed_size(1)))
    return convolve_transposed(b, x)


def project(b: Builder, x: Value, out: int) -> Value:
    """A linear layer over the last dimension, which must be fixed."""
    features = x.shape[-1]
    weight = b.constant(out, features, scale=max(features, 1) ** -0.5, name="weight")
    bias = b.constant(out, name="bias") if b.choices.often() else None
    return b.apply("aten.linear", x, weight, bias)


def sequence(b: Builder, lowest: int = 1) -> Value:
    """A tensor whose last dimension is fixed."""
    return b.tensor(lambda v: v.rank >= lowest and v.fixed_size(v.rank - 1) is not None)


@step
def linear(b: Builder) -> Value:
    return project(b, sequence(b), b.choices.pick([4, 3, 8, 1, 5]))


@step
def product(b: Builder) -> Value:
    """matmul with a constant or with a value of the graph, addmm, bmm."""
    x = sequence(b)
    kind = b.choices.pick(["constant", "value", "addmm", "bmm", "self"])
    width = b.choices.pick([3, 4, 1, 5])
    if kind == "constant":
        return b.apply("aten.matmul", x, b.constant(x.shape[-1], width, scale=0.5, name="weight"))
    if kind == "addmm":
        weight = b.constant(x.shape[-1], width, scale=0.5, name="weight")
        return b.apply("aten.addmm", b.constant(width, name="bias"), x, weight)
    if kind == "self":
        x = b.tensor(lambda v: v.rank > 1)
        return b.apply("aten.matmul", x, b.apply("aten.transpose.int", x, -2, -1))
    y = b.tensor(lambda v: v.rank > 1 and v.shape[-2] == x.shape[-1])
    return b.apply("aten.bmm" if kind == "bmm" else "aten.matmul", x, y)


def normalize_batch(b: Builder, x: Value) -> Value:
    channels = x.shape[1]
    affine = b.choices.often()
    weight = b.constant(channels, positive=True, name="weight") if affine else None
    bias = b.constant(channels, name="bias") if affine else None
    mean = b.constant(channels, name="running_mean")
    variance = b.constant(channels, positive=True, name="running_var")
    eps = b.choices.pick([1e-5, 1e-3, 0.1])
    arguments = (x, weight, bias, mean, variance)
    if b.choices.byte() >= 224:
        op = "aten._native_batch_norm_legit_no_training"
        result, *statistics = b.apply_all(op, *arguments, 0.1, eps)
        # Nothing may use these: on the CPU they are empty, and fake tensors say otherwise.
        b.pool = [v for v in b.pool if v not in statistics]
        return result
    return b.apply("aten.batch_norm", *arguments, False, 0.1, eps, False)


@step
def batch_norm(b: Builder) -> Value:
    return normalize_batch(b, b.tensor(lambda v: v.rank in (2, 3, 4) and bool(v.fixed_size(1))))


@step
def layer_norm(b: Builder) -> Value:
    x = sequence(b)
    b.require_spread(x, -1)
    width = x.shape[-1]
    weight = b.constant(width, positive=True, name="weight") if b.choices.often() else None
    bias = b.constant(width, name="bias") if b.choices.often() else None
    return b.apply("aten.layer_norm", x, [width], weight, bias, b.choices.pick([1e-5, 1e-2]))


@step
def group_norm(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 2 and bool(v.fixed_size(1)))
    b.require_spread(x, -1)
    groups = b.choices.pick([n for n in (1, 2, 3, 4) if x.shape[1] % n == 0])
    weight = b.constant(x.shape[1], positive=True, name="weight") if b.choices.often() else None
    return b.apply("aten.group_norm", x, groups, weight, None)


@step
def softmax(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 0)
    op = b.choices.pick(["softmax", "softmax", "log_softmax"])
    return b.apply(f"aten.{op}.int", x, b.choices.pick([-1, b.choices.byte() % x.rank]))


@step
def pooling(b: Builder) -> Value:
    x = image(b)
    kind = b.choices.pick(["max", "average", "adaptive", "global", "upsample"])
    if kind == "adaptive":
        return b.apply("aten.adaptive_avg_pool2d", x, b.choices.pick([[1, 1], [2, 3]]))
    if kind == "global":
        return b.apply("aten.mean.dim", x, [2, 3], b.choices.often())
    if kind == "upsample":
        return b.apply("aten.upsample_nearest2d.vec", x, None, [2.0, 2.0])
    window = [b.choices.pick([2, 3, 1]), b.choices.pick([2, 3])]
    stride = [b.choices.pick([1, 2, 3])] * 2
    padding, ceil = [b.choices.pick([0, 0, 1])] * 2, b.choices.rarely()
    if kind == "max":
        return b.apply("aten.max_pool2d", x, window, stride, padding, [1, 1], ceil)
    return b.apply("aten.avg_pool2d", x, window, stride, padding, ceil, b.choices.often())


@step
def reduction(b: Builder) -> Value:
    x = b.tensor(lambda v: v.rank > 0)
    d, keep = b.choices.byte() % x.rank, b.choices.often()
    op = b.choices.pick(
        ["mean.dim", "sum.dim_IntList", "amax", "mean", "sum", "cumsum", "max.dim", "argmax", "var"]
    )
    if op in ("mean", "sum"):
        return b.apply(f"aten.{op}", x)
    if op == "cumsum":
        return b.apply("aten.cumsum", x, d)
    if op in ("max.dim", "argmax"):
        return b.apply_all(f"aten.{op}", x, d, keep)[-1]
    if op == "var":
        if any(kind.shape[d] == 0 for kind in tensor_types(x)):
            raise Unsuitable
        return b.apply("aten.var.correction", x, [d], correction=0, keepdim=keep)
    return b.apply(f"aten.{op}", x, [d], keep)


@step
def embedding(b: Builder) -> Value:
    ids = b.apply("aten.remainder.Scalar", integers_of(b), 5)
    if b.choices.often():
        return b.apply("aten.embedding", b.constant(5, b.choices.pick([4, 3]), name="weight"), ids)
    return b.apply("aten.index.Tensor", b.constant(5, 4), [ids])


# -- sizes and what is made of them -------------------------------------------------------------


@step
def from_size(b: Builder) -> Value:
    """A tensor made of the size of another, which may be free."""
    x = b.choices.recent([v for v in b.pool if v.rank > 0])
    size = b.size(x, b.choices.byte() % x.rank)
    kind = b.choices.pick(["arange", "full", "scale", "doubled", "ones"])
    if kind == "arange":
        return b.apply("aten.arange", size, dtype=b.choices.pick([torch.int64, torch.float32]))
    if kind == "full":
        return b.apply("aten.full", [size, 2], 0.5, dtype=torch.float32)
    if kind == "ones":
        return b.apply("aten.new_ones", x, [size, 1], dtype=torch.float32)
    if isinstance(size, int):
        raise Unsuitable
    if kind == "scale":
        return b.apply("aten.mul.Tensor", b.tensor(), size)
    doubled = b.apply("operator.mul", size, 2)
    return b.apply("aten.full", [b.apply("operator.add", doubled, 1)], 1.5, dtype=torch.float32)


# -- shapes -------------------------------------------------------------------------------------


def tensor_types(value: Value) -> list[TensorType]:
    """The types of a tensor under every assignment of the free sizes."""
    return [kind for kind in value.types if isinstance(kind, TensorType)]


def _broadcast(x: Value, y: Value) -> bool:
    """Whether two values broadcast, under every assignment of the free sizes."""
    for one, other in zip(tensor_types(x), tensor_types(y), strict=True):
        pairs = zip(reversed(one.shape), reversed(other.shape), strict=False)
        if any(m != n and 1 not in (m, n) for m, n in pairs):
            return False
    return True


def _alike(x: Value, y: Value, dimension: int) -> bool:
    """Whether two values differ in the size of one dimension at most."""
    return all(
        one.rank == other.rank
        and one.dtype == other.dtype
        and one.shape[:dimension] == other.shape[:dimension]
        and one.shape[dimension + 1 :] == other.shape[dimension + 1 :]
        for one, other in zip(tensor_types(x), tensor_types(y), strict=True)
    )
