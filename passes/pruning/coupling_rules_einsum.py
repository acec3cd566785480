"""Coupling rule of Einstein sums, by the letters of their equations."""

from __future__ import annotations

from itertools import chain

from graphopt.ir import Node, Value
from graphopt.passes.pruning.axes import Axis
from graphopt.passes.pruning.coupling import Axes, Coupling, Rule, describe
from graphopt.passes.pruning.coupling_rules_elementwise import is_one
from graphopt.passes.pruning.coupling_rules_layers import is_weight

EINSUM = "aten.einsum"


def einsum_labels(node: Node) -> tuple[list[list[str]], list[str]]:
    """The label of every dimension of each operand, and of the result.

    A label is a letter; the dimensions that an ellipsis stands for are numbered from the last,
    ``"-1"``, since they are broadcast.
    """
    terms, arrow, result = node["equation"].replace(" ", "").partition("->")
    operands = [
        _labels(term, value.rank)
        for term, value in zip(terms.split(","), node["tensors"], strict=True)
    ]
    if arrow:
        return operands, _labels(result, node.output.rank)
    every = list(chain(*operands))
    hidden = sorted({label for label in every if len(label) > 1}, key=int)
    return operands, hidden + sorted(x for x in set(every) if len(x) == 1 and every.count(x) == 1)


def _labels(term: str, rank: int) -> list[str]:
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(str(k) for k in range(-hidden, 0)), *after]


def _einsum(c: Coupling, node: Node) -> list[Axes]:
    """Dimensions of one label go together. What is summed over must contribute nothing where it
    is masked: one of its operands is a weight."""
    operands, result = einsum_labels(node)
    found: dict[str, Axis] = {}
    owners: dict[str, set[Value]] = {}
    for value, labels in zip(node["tensors"], operands, strict=True):
        for label, axis in zip(labels, c.axes[value], strict=True):
            known = found.get(label)
            if known is None or is_one(known):
                found[label] = axis
            elif not is_one(axis):
                found[label] = c.tie(known, axis, node)
            if not is_one(axis):  # those are broadcast
                owners.setdefault(label, set()).add(value)
    is_product = not found.keys() <= set(result)
    for label, own in owners.items():
        activations = {value for value in own if not is_weight(value)}
        if label not in result and activations == own:
            c.pin(found[label], f"{describe(node)} sums over it, and no operand of it is a weight")
        elif label in result and is_product and len(activations) > 1:
            c.mark_heads(found[label])
    return [tuple(found[label] for label in result)]


EINSUM_RULES: dict[str, Rule] = {EINSUM: _einsum}
