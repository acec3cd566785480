"""Small quantized graphs, made by hand: quantize and dequantize nodes around layers."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir import Graph, Value


def quantized(
    graph: Graph, x: Value, scale: float, zero_point: int, dtype: torch.dtype = torch.uint8
) -> Value:
    """A value as bytes; the zero point is that of unsigned ones, signed ones are 128 less each."""
    limits = torch.iinfo(dtype)
    parameters = (
        graph.constant(torch.tensor(scale, dtype=torch.float32)),
        graph.constant(torch.tensor(zero_point + limits.min, dtype=dtype)),
    )
    tail = (None, limits.min, limits.max, dtype)
    return graph.add("graphopt.quantize", x, *parameters, *tail)


def dequantized(graph: Graph, q: Value, scale: float | None = None) -> Value:
    """Bytes as floats again, of the scale by which they were made, or another."""
    made = q.producer
    assert made is not None
    own = made["scale"] if scale is None else graph.constant(torch.tensor(scale))
    tail = (None, made["quant_min"], made["quant_max"], made["dtype"])
    return graph.add("graphopt.dequantize", q, own, made["zero_point"], *tail)


def through_bytes(
    graph: Graph, x: Value, scale: float, zero_point: int, dtype: torch.dtype = torch.uint8
) -> Value:
    """A value quantized and dequantized."""
    return dequantized(graph, quantized(graph, x, scale, zero_point, dtype))


def weight(
    graph: Graph, *shape: int, seed: int = 0, per_channel: bool = True
) -> tuple[Value, torch.Tensor]:
    """A dequantized int8 weight of about unit gain, and its scales."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    fan_in = values[0].numel()
    count = shape[0] if per_channel else 1
    scales = (0.5 + torch.rand(count, generator=generator)) / (74 * fan_in**0.5)
    scale = graph.constant(scales if per_channel else scales.reshape(()))
    axis = 0 if per_channel else None
    constant = graph.constant(values)
    made = graph.add("graphopt.dequantize", constant, scale, None, axis, -127, 127, torch.int8)
    return made, scales


def bias(graph: Graph, scale: float, scales: torch.Tensor, count: int, seed: int = 0) -> Value:
    """A dequantized int32 bias."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-5000, 5000, (count,), generator=generator, dtype=torch.int32)
    steps = graph.constant((scales * scale).expand(count).contiguous())
    limits = (-(2**31), 2**31 - 1, torch.int32)
    return graph.add("graphopt.dequantize", graph.constant(values), steps, None, 0, *limits)


def layer(
    graph: Graph,
    x: Value,
    op: str,
    *shape: int,
    scale: float,
    per_channel: bool = True,
    **options: Any,
) -> Value:
    """A layer of ``x``, which was dequantized with ``scale``."""
    own, scales = weight(graph, *shape, per_channel=per_channel)
    return graph.add(op, x, own, bias(graph, scale, scales, shape[0]), **options)
