"""Faults in generated kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planted import changed, changed_text, fault, in_a_child, substituted, test_of

from graphopt.kernels import convolution, matmul, pointwise, sparse_strips


def _of_turned_weights(pack: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(self: Any, constants: Any) -> Any:
        weight = constants[1].swapaxes(-1, -2).reshape(constants[1].shape)
        return pack(self, [constants[0], weight, *constants[2:]])

    return faulty


fault(
    "the remainder of a row lacks its last element",
    test_of("kernels/test_pointwise.py", "test_broadcasting_between_guard_pages", (5, 7), (5, 7)),
    changed(
        pointwise.ElementwiseLoop._part, "mask_first(count - i, F", "mask_first(count - i - 1, F"
    ),
)
fault(
    "the remainder of a row writes past its end",
    in_a_child(
        test_of("kernels/test_pointwise.py", "test_broadcasting_between_guard_pages", (7,), (7,))
    ),
    changed(
        pointwise.ElementwiseLoop._part, "mask_first(count - i, F", "mask_first(count - i + 1, F"
    ),
)
fault(
    "a linear layer's weight is packed transposed",
    test_of("kernels/test_matmul.py", "test_linear", 37, 390, 390),
    changed(
        matmul.MatmulCandidate._panels_of,
        "for stride in product.b_strides]",
        "for stride in reversed(product.b_strides)]",
    ),
)
fault(
    "the last rows of a product are left out",
    test_of("kernels/test_matmul.py", "test_linear", 37, 390, 390),
    changed_text(
        matmul,
        "_BODY",
        "last_row = min((row_block + 1) * tiles // row_blocks * HEIGHT, height)",
        "last_row = min((row_block + 1) * tiles // row_blocks * HEIGHT, height - 1)",
    ),
)
fault(
    "a convolution's weight is packed with height and width exchanged",
    test_of("kernels/test_convolution.py", "test_any_shape"),
    substituted(convolution.ConvolutionCandidate, "pack", _of_turned_weights),
)
fault(
    "threads use one panel together",
    in_a_child(test_of("kernels/test_matmul.py", "test_two_tensors", 37, 390, 390, (False, False))),
    changed(matmul.MatmulCandidate.scratch_bytes, "threads * self._panel_bytes", "64"),
)
fault(
    "a tile of a strip writes into the next row",
    in_a_child(test_of("kernels/test_sparse_strips.py", "test_shapes", "narrow", 1)),
    changed_text(
        sparse_strips,
        "_FINISH",
        "end = lane + min(lanes, out_width - tile_column)",
        "end = lane + lanes",
    ),
)
fault(
    "the rows of a strip are looked for as if there were no stride",
    test_of("kernels/test_sparse_strips.py", "test_shapes", "stride 2", 1),
    changed(sparse_strips.Strips.place, "row // self.stride", "row"),
)
