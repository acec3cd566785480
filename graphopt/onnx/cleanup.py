"""What an exported model does not need: foldable nodes, identities, duplicates."""

from __future__ import annotations

import onnx_ir
import onnxscript.optimizer

_KEPT = ("QuantizeLinear", "DequantizeLinear")
_LARGEST_FOLDED = 2**26


def clean(model: onnx_ir.Model) -> None:
    """Fold and simplify, in place. The dequantize of a constant stays, to keep the weight small."""
    onnxscript.optimizer.optimize_ir(
        model,
        num_iterations=4,
        input_size_limit=_LARGEST_FOLDED,
        output_size_limit=_LARGEST_FOLDED,
        should_fold=lambda node: node.op_type not in _KEPT,
    )
