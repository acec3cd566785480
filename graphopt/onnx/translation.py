"""ONNX for the operators that ATen lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx_ir import DataType
from onnxscript.onnx_opset import all_opsets

from graphopt.errors import ExportError

HIGHEST_OPSET = max(version for domain, version in all_opsets if domain == "")
"""The newest that onnxscript, in which translations are written, knows."""

_BITS = {
    DataType.INT8: 8,
    DataType.UINT8: 8,
    DataType.INT16: 16,
    DataType.UINT16: 16,
    DataType.INT32: 32,
}


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The exporter's ``custom_translation_table`` for an opset: QuantizeLinear and
    DequantizeLinear in the form that it has."""
    op: Any = all_opsets["", opset]

    # The range of steps is that of the type here: `graphopt.onnx.lowering` has clipped to others.
    def quantize(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size=None):
        kind = DataType(dtype)
        attributes = _attributes(opset, axis, block_size, kind, most_bits=16)
        scale, zero_point = _parameters(op, scale, zero_point, axis, kind)
        if zero_point is None:
            # The result takes its type from the zero point.
            zeros = op.Mul(scale, op.CastLike(0.0, scale))
            zero_point = op.Cast(zeros, to=kind)
        return op.QuantizeLinear(x, scale, zero_point, **attributes)

    def dequantize(x, scale, zero_point, axis, quant_min, quant_max, dtype, block_size=None):
        kind = DataType(dtype)
        attributes = _attributes(opset, axis, block_size, kind, most_bits=32)
        scale, zero_point = _parameters(op, scale, zero_point, axis, kind)
        return op.DequantizeLinear(x, scale, zero_point, **attributes)

    return {
        torch.ops.graphopt.quantize.default: quantize,
        torch.ops.graphopt.dequantize.default: dequantize,
    }


def _attributes(
    opset: int, axis: int | None, block_size: int | None, kind: DataType, most_bits: int
) -> dict[str, int]:
    bits = _BITS.get(kind)
    if bits is None or bits > most_bits:
        raise ExportError(f"ONNX has no quantization with {kind.name.lower()} values")
    if opset < 21 and (block_size is not None or bits == 16):
        what = f"{kind.name.lower()} values" if block_size is None else "a block size"
        raise ExportError(f"quantization with {what} needs opset 21; pass opset=21")
    attributes = {} if axis is None else {"axis": axis}
    if block_size is not None:
        attributes["block_size"] = block_size
    return attributes


def _parameters(
    op: Any, scale: Any, zero_point: Any, axis: int | None, kind: DataType
) -> tuple[Any, Any]:
    """Scale and zero point, of rank 0 for the whole tensor, the latter in the data's type."""
    if zero_point is not None and zero_point.dtype != kind:
        zero_point = op.Cast(zero_point, to=kind)
    if axis is None:
        whole = op.Constant(value_ints=[])
        scale = op.Reshape(scale, whole)
        if zero_point is not None:
            zero_point = op.Reshape(zero_point, whole)
    return scale, zero_point
