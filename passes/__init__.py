"""The passes that come with graphopt, one per file. Importing this registers all of them."""

from graphopt.passes.common_subexpressions import CommonSubexpressions
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.passes.dead_code import DeadCode
from graphopt.passes.simplification import Simplification

__all__ = ["EXACT", "CommonSubexpressions", "ConstantFolding", "DeadCode", "Simplification"]

# What `graphopt.optimize` runs before and after the passes that it is given.
EXACT = (
    "dead-code",
    "simplification",
    "constant-folding",
    "common-subexpressions",
    "dead-code",
)
