"""Types of values: tensors with a dtype and a shape, and scalars with their value."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

Scalar = int | float | bool

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "bool",
    torch.float8_e4m3fn: "f8e4m3fn",
    torch.float8_e5m2: "f8e5m2",
    torch.complex32: "c32",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dense tensor's dtype and shape. Strides are the engine's business, not the graph's."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        name = DTYPE_NAMES.get(self.dtype, str(self.dtype))
        return f"{name}[{', '.join(map(str, self.shape))}]"

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        return TensorType(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number, usually a size, with the value it has under one assignment of sizes."""

    value: Scalar

    @property
    def kind(self) -> type:
        return type(self.value)

    def __str__(self) -> str:
        return f"{self.kind.__name__}={self.value!r}"

    def __eq__(self, other: object) -> bool:
        # 1, 1.0 and True are equal to Python and different to type promotion.
        return isinstance(other, ScalarType) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


Type = TensorType | ScalarType
