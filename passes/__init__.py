"""The passes that come with graphopt, one per file. Importing this registers all of them."""

from graphopt.passes.activation_canonicalization import CanonicalizeActivations
from graphopt.passes.affine_folding import FoldChannelAffine
from graphopt.passes.attention_canonicalization import CanonicalizeAttention
from graphopt.passes.batch_norm_decomposition import DecomposeBatchNorm
from graphopt.passes.batch_norm_folding import FoldBatchNorm
from graphopt.passes.common_subexpressions import CommonSubexpressions
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.passes.dead_code import DeadCode
from graphopt.passes.einsum_canonicalization import CanonicalizeEinsum
from graphopt.passes.layer_norm_canonicalization import CanonicalizeLayerNorm
from graphopt.passes.linear_canonicalization import CanonicalizeLinear
from graphopt.passes.linear_merging import MergeLinears
from graphopt.passes.low_rank.low_rank import LowRank
from graphopt.passes.padding_folding import FoldPadding
from graphopt.passes.pruning.prune import Prune
from graphopt.passes.pruning.zeros import keep_zeros
from graphopt.passes.quantization.batch_norm_reestimation import BatchNormReestimation
from graphopt.passes.quantization.bias_absorption import HighBiasAbsorption
from graphopt.passes.quantization.bias_correction import BiasCorrection
from graphopt.passes.quantization.equalisation import CrossLayerEqualisation
from graphopt.passes.quantization.quantize import Quantize
from graphopt.passes.quantization.smooth import SmoothQuant
from graphopt.passes.quantization.weight_only import Gptq, Reconstruction
from graphopt.passes.simplification import Simplification

__all__ = [
    "EXACT",
    "BatchNormReestimation",
    "BiasCorrection",
    "CanonicalizeActivations",
    "CanonicalizeAttention",
    "CanonicalizeEinsum",
    "CanonicalizeLayerNorm",
    "CanonicalizeLinear",
    "CommonSubexpressions",
    "ConstantFolding",
    "CrossLayerEqualisation",
    "DeadCode",
    "DecomposeBatchNorm",
    "FoldBatchNorm",
    "FoldChannelAffine",
    "FoldPadding",
    "Gptq",
    "HighBiasAbsorption",
    "LowRank",
    "MergeLinears",
    "Prune",
    "Quantize",
    "Reconstruction",
    "Simplification",
    "SmoothQuant",
    "keep_zeros",
]

# What `graphopt.optimize` runs before and after the passes that it is given: patterns are looked
# for when what hides them is gone, and what they leave behind is cleared away.
EXACT = (
    "dead-code",
    "constant-folding",
    "simplification",
    "common-subexpressions",
    "canonicalize-einsum",
    "canonicalize-linear",
    "canonicalize-layer-norm",
    "canonicalize-attention",
    "canonicalize-activations",
    "fold-padding",
    "fold-batch-norm",
    "decompose-batch-norm",
    "fold-channel-affine",
    "merge-linears",
    "constant-folding",
    "simplification",
    "common-subexpressions",
    "dead-code",
)
