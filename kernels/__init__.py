"""Kernel families, one per file; they know problems, not graphs.

Importing this package registers the built-in families. `registry` says how to write another.
"""

from graphopt.kernels import (
    attention,
    convolution,
    copy,
    depthwise,
    direct_convolution,
    dynamic_matmul,
    gather,
    integer_convolution,
    integer_layout,
    integer_matmul,
    integer_windows,
    matmul,
    normalization,
    pointwise,
    pooling,
    reduction,
    softmax,
    sparse_convolution,
    sparse_integer_convolution,
    sparse_matmul,
    sparse_vector,
    weight_only_matmul,
    winograd,
)
from graphopt.kernels.registry import candidates

__all__ = [
    "attention",
    "candidates",
    "convolution",
    "copy",
    "depthwise",
    "direct_convolution",
    "dynamic_matmul",
    "gather",
    "integer_convolution",
    "integer_layout",
    "integer_matmul",
    "integer_windows",
    "matmul",
    "normalization",
    "pointwise",
    "pooling",
    "reduction",
    "softmax",
    "sparse_convolution",
    "sparse_integer_convolution",
    "sparse_matmul",
    "sparse_vector",
    "weight_only_matmul",
    "winograd",
]
