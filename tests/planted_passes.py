"""Faults in passes, which the random graphs must notice, or the pass's own tests."""

from __future__ import annotations

from planted import changed, fault, pass_on_random_graphs, test_of

from graphopt.passes import (
    affine_folding,
    batch_norm_folding,
    channels,
    common_subexpressions,
    constant_folding,
    identity_rules,
    layers,
    linear_merging,
    padding_folding,
)

RANDOM = "%a: f32[2, 3] = aten.rand_like(%x)\n%b: f32[2, 3] = aten.rand_like(%x)"
ONES = (
    "%i: i64[2, 3] = aten.to.dtype(%x, torch.int64)\n"
    "%a: i64[2, 3] = aten.mul.Tensor(%i, 1)\n%b: f32[2, 3] = aten.mul.Tensor(%i, 1.0)"
)

fault(
    "a batch norm with a shift folds into a convolution that pads",
    pass_on_random_graphs("fold-batch-norm", "batch_norm_then_convolution"),
    changed(layers.Layer.has_padding, "return not _always(padding, 0)", "return False"),
)
fault(
    "a fold does not see the second user",
    pass_on_random_graphs("fold-batch-norm", "convolution_then_batch_norm"),
    changed(
        channels.fold_into_producer,
        "[user for user in value.users if _reads(user, value)] != [reader]",
        "not value.users",
    ),
)
fault(
    "a batch norm's eps is ignored",
    pass_on_random_graphs("fold-batch-norm", "convolution_then_batch_norm"),
    changed(batch_norm_folding.batch_norm_affine, 'variance + node["eps"]', "variance"),
)
fault(
    "channels of a group are scaled as those of another",
    pass_on_random_graphs("fold-channel-affine", "arithmetic_then_convolution", count=100),
    changed(
        channels.fold_into_consumers,
        "scale = affine.scale.expand(groups * channels).reshape(groups, 1, channels, 1)",
        "scale = affine.scale.expand(groups * channels).reshape(channels, groups).T"
        ".reshape(groups, 1, channels, 1)",
    ),
)
fault(
    "a transposed convolution's weight is read the wrong way round",
    pass_on_random_graphs("fold-batch-norm", "transposed_convolution_then_batch_norm"),
    changed(layers.Layer.taps, "if self.is_transposed", "if False"),
)
fault(
    "a subtraction is folded as an addition",
    pass_on_random_graphs("fold-channel-affine", "convolution_then_arithmetic"),
    changed(affine_folding._effect, '"sub": (1, -alpha)', '"sub": (1, alpha)'),
)
fault(
    "padding by another number than zero becomes a convolution's",
    pass_on_random_graphs("fold-padding", "pad_then_convolution"),
    changed(padding_folding._into_convolution.replacement, "if found.value != 0:", "if False:"),
)
fault(
    "padding that differs before and after becomes symmetric",
    pass_on_random_graphs("fold-padding", "pad_then_convolution"),
    changed(padding_folding._asymmetry, "if actual != symmetric:", "if False:"),
)
fault(
    "random operators are merged",
    test_of("passes/test_common_subexpressions.py", "test_nodes_that_differ", RANDOM),
    changed(common_subexpressions._merge_nodes, "node.operator.is_random or", ""),
)
fault(
    "operators with different attributes are merged",
    pass_on_random_graphs("common-subexpressions", "permute", "slice", count=100),
    changed(
        common_subexpressions._merge_nodes,
        "tuple((name, _key(operand)) for name, operand in node.operands.items())",
        "tuple(node.input_values())",
    ),
)
fault(
    "1 and 1.0 are one operand",
    test_of("passes/test_common_subexpressions.py", "test_nodes_that_differ", ONES),
    changed(common_subexpressions._key, "(type(operand), repr(operand))", "operand"),
)
fault(
    "a free size is folded",
    pass_on_random_graphs("constant-folding", "from_size", "attention", "masked_mean"),
    changed(constant_folding._is_fixed_size, "not in x.free", "is not None"),
)
fault(
    "adding 0.0 counts as nothing",
    pass_on_random_graphs("simplification", "signed_zeros"),
    changed(identity_rules.neutral_summand.replacement, "math.copysign(1.0, added) > 0", "False"),
)
fault(
    "a no-op is judged by the example's sizes",
    pass_on_random_graphs("simplification", "class_token"),
    changed(identity_rules.same_type, "x.types == result.types", "x.type == result.type"),
)
fault(
    "linear layers are joined without the biases that some lack",
    pass_on_random_graphs("merge-linears", "parallel_linears"),
    changed(linear_merging._joined, "if all(", "if any("),
)
