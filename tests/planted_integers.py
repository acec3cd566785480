"""Faults in what computes with integers: kernels, the rules that use them, and the quantizer."""

from __future__ import annotations

import torch
from planted import changed, changed_text, fault, test_of

from graphopt.engine import integer_units, quantization
from graphopt.kernels import (
    integer_convolution,
    integer_layout,
    integer_matmul,
    integer_windows,
    requantization,
    sparse_integer_convolution,
    sparse_integer_matmul,
)
from graphopt.passes.quantization import gptq, observers, rounding, weights

CONVOLUTION, SHAPES = "kernels/test_integer_convolution.py", "test_shapes"
RULES = "engine/test_integer_rules.py"
OBSERVERS = "passes/quantization/test_observers.py"
CLAMPED = '"bits = rounded_bits(at_most(at_least(t, low), high))"'
HALVES_UP = (
    '"bits = rounded_bits(floor(at_most(at_least(t, low), high) + broadcast(0.5, FLOAT32)))"'
)

fault(
    "halves of a step round up in a convolution",
    test_of(CONVOLUTION, "test_halves_round_to_even", "single pixels", False),
    changed(requantization.Requantization.word_lines, CLAMPED, HALVES_UP),
)
fault(
    "halves of a step round up in a sum",
    test_of("kernels/test_integer_layout.py", "test_halves_of_a_sum_round_to_even"),
    changed(integer_layout._sum_lines, CLAMPED, HALVES_UP),
)
fault(
    "a linear layer cuts the fraction of a step off",
    test_of("kernels/test_integer_matmul.py", "test_sizes", (5,), 7, 3, False),
    changed(
        integer_matmul._tile_lines,
        "rounded_bits(at_most(at_least(t, low), high))",
        "rounded_bits(truncate(at_most(at_least(t, low), high)))",
    ),
)
fault(
    "results beyond the largest step do not saturate",
    test_of(CONVOLUTION, SHAPES, "3x3", "bytes"),
    changed(
        requantization.Requantization.word_lines,
        "at_most(at_least(t, low), high)",
        "at_least(t, low)",
    ),
)
fault(
    "an image is padded with zeros, not with its zero point",
    test_of(CONVOLUTION, SHAPES, "3x3", "floating"),
    changed(
        requantization.Requantization.prologue,
        "outside = broadcast(read(numbers, INT32), INT32)",
        "outside = broadcast(0, INT32)",
    ),
)
fault(
    "the zero point is added to the bias",
    test_of(CONVOLUTION, SHAPES, "single pixels", "bytes"),
    changed(integer_convolution.corrected_bias, "- zero_point * sums", "+ zero_point * sums"),
)
fault(
    "an average forgets the zero point of its image",
    test_of("kernels/test_integer_windows.py", "test_average", (1, 4, 6, 6), (3, 2), (1, 1), 1),
    changed(
        integer_windows.IntegerPoolingCandidate.pack, "corrected_bias(ones, bias, numbers)", "bias"
    ),
)
fault(
    "the first channels after a tile have the multipliers before it",
    test_of(CONVOLUTION, SHAPES, "many pixels", "bytes"),
    changed_text(
        integer_convolution,
        "_BODY",
        "own = finish + 8 * HEIGHT * (group * tiles + tile)",
        "own = finish + 8 * HEIGHT * (group * tiles + max(tile - 1, 0))",
    ),
)
fault(
    "four depthwise channels share the weights of the first",
    test_of("kernels/test_integer_windows.py", "test_depthwise", 8, (7, 7), 1),
    changed(integer_windows._pack_sums, "GROUP, taps)[:, byte]", "GROUP, taps)[:, 0]"),
)
fault(
    "words of a sparse weight meet the column after theirs",
    test_of("kernels/test_sparse_integer_convolution.py", "test_schedules", "3x3", "bytes", 2),
    changed(
        sparse_integer_convolution._streams,
        "words[places] = steps",
        "words[places] = np.minimum(steps + 1, matrix.shape[1] - 1)",
    ),
)
fault(
    "squares of results begin at the features of their last tile",
    test_of("kernels/test_sparse_integer_matmul.py", "test_schedules", (40,), 64, 72, True, (2, 4)),
    changed_text(
        sparse_integer_matmul, "_SQUARES", "feature = 4 * tile + 4 - filled", "feature = 4 * tile"
    ),
)
fault(
    "the last bytes of a row are left out of a product",
    test_of("kernels/test_integer_matmul.py", "test_sizes", (5,), 7, 3, False),
    changed_text(integer_matmul, "_TILE", "if place < stop_place:", "if place > stop_place:"),
)
fault(
    "a residual's scale is divided the wrong way round",
    test_of(RULES, "test_a_residual_is_added_inside"),
    changed(
        integer_units.layer_constants,
        "residual.scheme.scale / out_scale",
        "out_scale / residual.scheme.scale",
    ),
)
fault(
    "a bias of other steps is taken as it is",
    test_of(RULES, "test_biases_of_other_kinds"),
    changed(
        integer_units._int32_bias,
        "not np.allclose(own, steps, rtol=1e-5, atol=0)",
        "False",
    ),
)
fault(
    "the bound of an activation is a step from zero, not from the zero point",
    test_of(RULES, "test_activations_that_clamp_are_bounds", "clamp_max"),
    changed(quantization.Scheme.step, "(steps + self.zero_point)", "steps"),
)
fault(
    "bytes that other operators read lie like an image's",
    test_of(
        RULES, "test_bytes_that_other_operators_read_are_as_they_are", (1, 6, 5, 5), torch.uint8
    ),
    changed(quantization.is_grouped, "return all(", "return any("),
)
fault(
    "signed steps are kept unsigned where others read them",
    test_of(RULES, "test_bytes_that_other_operators_read_are_as_they_are", (4, 7), torch.int8),
    changed(
        quantization.is_kept_unsigned,
        "_stated(user, DEQUANTIZE) == stated for",
        "_stated(user, DEQUANTIZE) in (stated, None) for",
    ),
)
fault(
    "weights round halves up",
    test_of("passes/quantization/test_weight_format.py", "test_halves_round_to_even"),
    changed(weights.WeightFormat.nearest, ".round()", ".add(0.5).floor()"),
)
fault(
    "an observer keeps the range of the last batch alone",
    test_of(OBSERVERS, "test_min_max_has_zero_in_its_range"),
    changed(
        observers.MinMax.__call__,
        "min(self.low, low.item()), max(self.high, high.item())",
        "min(0.0, low.item()), max(0.0, high.item())",
    ),
)
for method, holder in (
    (rounding.round_by_reconstruction, rounding.round_by_reconstruction),
    (gptq.round_gptq, gptq._columns),
):
    fault(
        f"{method.__name__} moves weights that are zero",
        test_of(
            "passes/quantization/test_rounding.py",
            "test_zeros_do_not_make_good_for_weights_that_are_clipped",
            method,
        ),
        changed(holder, " * kept[:, :, j]", ""),
    )
