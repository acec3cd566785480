"""Golden tests of rewrite rules: a graph's text before and after, and numbers that must stay."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import torch

from graphopt import reference
from graphopt.ir import Graph, TensorType
from graphopt.ir.rewriting import Rule, closest_miss
from graphopt.pipeline import Pipeline

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan"), 1e-40, 3.0]


def graph_of(inputs: str, body: str) -> Graph:
    lines = textwrap.indent(textwrap.dedent(body).strip(), "  ")
    graph = Graph.from_text(f"graph({inputs}) {{\n{lines}\n}}")
    graph.verify()
    return graph


def body_of(graph: Graph) -> str:
    """The text without its frame and without where nodes come from."""
    lines = [re.sub(r"  #.*", "", line).strip() for line in str(graph).splitlines()[1:-1]]
    return "\n".join(lines)


def assert_becomes(inputs: str, before: str, after: str, *passes: Any) -> Graph:
    """The passes turn one text into the other, keep every bit, and find nothing to do again."""
    graph = graph_of(inputs, before)
    source = graph.clone()
    assert Pipeline(passes).run(graph).changed
    assert body_of(graph) == "\n".join(line.strip() for line in after.strip().splitlines())
    assert_same_bits(source, graph)
    assert not Pipeline(passes).run(graph).changed
    return graph


def assert_stays(inputs: str, text: str, *passes: Any, rule: Rule, reason: str) -> None:
    """The passes change nothing, and the rule says why it does not apply."""
    graph = graph_of(inputs, text)
    before = str(graph)
    assert not Pipeline(passes).run(graph).changed
    assert str(graph) == before
    miss = closest_miss(rule, graph)
    assert miss is not None, "no node has an operator of the rule's root"
    assert reason in miss.reason, miss.reason


def assert_same_bits(before: Graph, after: Graph) -> None:
    """Equal outputs, signs of zeros included, for numbers of every kind and under every
    assignment of the free sizes, in the graphs' own precision and in float64."""
    for k in range(len(before.assignments)):
        inputs = [special_input(value.types[k], seed) for seed, value in enumerate(before.inputs)]
        for dtype in (None, torch.float64):
            expected = reference.run(before, inputs, dtype=dtype)
            actual = reference.run(after, inputs, dtype=dtype)
            assert len(expected) == len(actual)
            for wanted, given in zip(expected, actual, strict=True):
                _assert_same(wanted, given)


def special_input(kind: Any, seed: int) -> torch.Tensor:
    assert isinstance(kind, TensorType)
    generator = torch.Generator().manual_seed(seed)
    if kind.dtype == torch.bool:
        return torch.randint(0, 2, kind.shape, generator=generator).bool()
    if not (kind.dtype.is_floating_point or kind.dtype.is_complex):
        lowest = 0 if kind.dtype == torch.uint8 else -9
        return torch.randint(lowest, 9, kind.shape, generator=generator).to(kind.dtype)
    pick = torch.randint(0, len(SPECIAL), kind.shape, generator=generator)
    return torch.tensor(SPECIAL)[pick].to(kind.dtype)


def _assert_same(wanted: Any, given: Any) -> None:
    assert type(wanted) is type(given)
    if not isinstance(wanted, torch.Tensor):
        assert wanted == given
        return
    assert (wanted.dtype, wanted.shape) == (given.dtype, given.shape)
    torch.testing.assert_close(given, wanted, rtol=0, atol=0, equal_nan=True)
    if wanted.is_floating_point():
        numbers = ~wanted.isnan()
        assert torch.equal(wanted[numbers].signbit(), given[numbers].signbit())
