"""Each kind of pattern: what it matches, what it must not match, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.errors import GraphError
from graphopt.ir import Graph, Node
from graphopt.ir.patterns import (
    COMMUTATIVE,
    Decline,
    Match,
    Misses,
    Pattern,
    constant,
    constant_tensor,
    either,
    literal,
    op,
    operand,
    optional,
    value,
)

GRAPH = """
graph(%x: f32[batch=2, 3], %z: f32[batch=2, 3]) {
  %c: f32[3] = constant [1.0, 2.0, 3.0]
  %a: f32[2, 3] = aten.relu(%x)
  %b: f32[2, 3] = aten.add.Tensor(%a, %c)
  %b2: f32[2, 3] = aten.add.Tensor(%a, %c, alpha=2)
  %s: f32[2, 3] = aten.sub.Tensor(%a, %c)
  %m: f32[2, 3] = aten.mul.Tensor(%b, 2.0)
  %d: f32[2, 3] = aten.mul.Tensor(%x, %x)
  %e: f32[2, 6] = aten.cat([%x, %z], 1)
  %p: f32[2, 2], %q: f32[2, 4] = aten.split_with_sizes(%e, [2, 4], 1)
  %n: f32[2, 3] = aten.clamp(%x, None, 6.0)
  %i: i8[3] = constant [1, 2, 3]
  %k: f32[] = constant 0.5
  %w: f32[3] = graphopt.dequantize(%i, %k, None, None, -128, 127, torch.int8)
  %y: f32[2, 3] = aten.mul.Tensor(%d, %w)
  return %b, %b2, %s, %m, %p, %q, %n, %y
}
"""


@pytest.fixture
def graph() -> Graph:
    return Graph.from_text(GRAPH)


def node(graph: Graph, name: str) -> Node:
    producer = graph.value(name).producer
    assert producer is not None
    return producer


def matches(pattern: Pattern, graph: Graph, name: str) -> list[Match]:
    return list(pattern.match(graph.value(name), Match(), None))


def miss(pattern: Pattern, graph: Graph, name: str) -> str:
    misses = Misses()
    assert not list(pattern.match(graph.value(name), Match(), misses))
    return misses.reason


def names_of(match: Match) -> dict[str, Any]:
    return {name: getattr(what, "name", what) for name, what in match.names.items()}


def test_names_stand_for_values_nodes_and_literals(graph: Graph) -> None:
    pattern = op("aten.mul.Tensor", value("x"), literal("factor"), name="mul")
    (match,) = matches(pattern, graph, "m")
    assert match["x"] is graph.value("b")
    assert match["factor"] == 2.0
    assert match["mul"] is node(graph, "m")
    assert match.nodes == (node(graph, "m"),)
    with pytest.raises(GraphError, match="no name 'y'; it has: mul, x, factor"):
        match["y"]


def test_the_same_name_twice_is_the_same_value(graph: Graph) -> None:
    squared = op("aten.mul.Tensor", value("x"), value("x"))
    assert matches(squared, graph, "d")
    assert miss(squared, graph, "y") == "`x` (%w) is %d elsewhere in the pattern"


def test_the_same_node_twice(graph: Graph) -> None:
    graph = Graph.from_text("""
    graph(%x: f32[2]) {
      %a: f32[2] = aten.relu(%x)
      %b: f32[2] = aten.relu(%x)
      %y: f32[2] = aten.mul.Tensor(%a, %a)
      %z: f32[2] = aten.mul.Tensor(%a, %b)
      return %y, %z
    }""")
    relu = op("aten.relu", value("x"), name="relu")
    assert matches(op("aten.mul.Tensor", relu, relu), graph, "y")
    assert not matches(op("aten.mul.Tensor", relu, relu), graph, "z")
    assert matches(
        op("aten.mul.Tensor", op("aten.relu", value()), op("aten.relu", ...)), graph, "z"
    )


def test_commutative_operators_are_tried_both_ways(graph: Graph) -> None:
    forward = op("aten.add.Tensor", op("aten.relu", ...), constant("c"))
    backward = op("aten.add.Tensor", constant("c"), op("aten.relu", ...))
    assert matches(forward, graph, "b")
    assert matches(backward, graph, "b")
    assert not matches(op("aten.sub.Tensor", constant(), op("aten.relu", ...)), graph, "s")
    both = op("aten.add.Tensor", value("a"), value("b"))
    assert [names_of(m) for m in matches(both, graph, "b")] == [
        {"a": "a", "b": "c"},
        {"a": "c", "b": "a"},
    ]


def test_an_alpha_keeps_operands_in_their_places(graph: Graph) -> None:
    scaled = op("aten.add.Tensor", constant("c"), value("a"), alpha=literal("alpha"))
    assert not matches(scaled, graph, "b2")
    assert matches(op("aten.add.Tensor", value(), constant(), alpha=2), graph, "b2")


@pytest.mark.parametrize("name", sorted(COMMUTATIVE))
def test_what_is_called_commutative_commutes(name: str) -> None:
    from graphopt.ir.operators import resolve

    operator = resolve(name)
    if operator.is_size_arithmetic:
        assert all(
            operator.target(a, b) == operator.target(b, a) for a in range(5) for b in range(5)
        )
        return
    kind = torch.int64 if "bitwise" in name else torch.float32
    a, b = torch.randn(50).mul(5).to(kind), torch.randn(50).mul(5).to(kind)
    a[::3] = b[::3]
    assert torch.equal(operator.target(a, b), operator.target(b, a))


def test_operands_that_are_not_mentioned_must_have_their_defaults(graph: Graph) -> None:
    closed = op("aten.add.Tensor", value("a"), value("b"))
    assert miss(closed, graph, "b2") == "%b2 has alpha=2"
    assert matches(op("aten.add.Tensor", value("a"), value("b"), ...), graph, "b2")
    assert matches(op("aten.add.Tensor", ...), graph, "b2")


def test_operands_by_name_and_defaults(graph: Graph) -> None:
    assert matches(op("aten.add.Tensor", value(), value(), alpha=1), graph, "b")
    assert matches(op("aten.clamp", value(), None, 6.0), graph, "n")
    assert matches(op("aten.clamp", value(), max=6.0), graph, "n")
    assert not matches(op("aten.clamp", value(), max=6), graph, "n")  # an int is another literal
    assert not matches(op("aten.clamp", value(), 0.0, 6.0), graph, "n")


def test_optional_operands(graph: Graph) -> None:
    pattern = op("aten.clamp", value("x"), optional(operand("low")), optional(literal("high")))
    (match,) = matches(pattern, graph, "n")
    assert names_of(match) == {"x": "x", "low": None, "high": 6.0}
    nested = op("aten.clamp", value("x"), optional(op("aten.relu", value("y"), name="relu")), ...)
    (match,) = matches(nested, graph, "n")
    assert match["y"] is None
    assert match["relu"] is None


def test_alternatives(graph: Graph) -> None:
    maybe_relu = either(op("aten.relu", value("x")), value("x"))
    found = matches(op("aten.sub.Tensor", maybe_relu, constant()), graph, "s")
    assert [names_of(m) for m in found] == [{"x": "x"}, {"x": "a"}]
    any_sum = op(("aten.add.Tensor", "aten.sub.Tensor"), value(), constant("c"))
    assert matches(any_sum, graph, "b")
    assert matches(any_sum, graph, "s")
    reason = miss(any_sum, graph, "m")
    assert reason == "%m is aten.mul.Tensor, not aten.add.Tensor or aten.sub.Tensor"


def test_backtracking_undoes_what_was_bound(graph: Graph) -> None:
    """The first alternative fits until `x` turns out to be something else."""
    pattern = op(
        "aten.mul.Tensor",
        either(op("aten.mul.Tensor", value("x"), value()), value("x")),
        value("w"),
    )
    found = matches(pattern, graph, "y")
    assert {names_of(m)["x"] for m in found} == {"x", "d", "w"}


def test_lists(graph: Graph) -> None:
    assert matches(op("aten.cat", [value("a"), value("b")], 1), graph, "e")
    assert miss(op("aten.cat", [value("a")], 1), graph, "e") == "[%x, %z] is not a list of 1"
    split = op("aten.split_with_sizes", value(), [2, literal("rest")], 1)
    (match,) = matches(split, graph, "p")
    assert match["rest"] == 4
    (match,) = matches(op("aten.cat", operand("all"), ...), graph, "e")
    assert [v.name for v in match["all"]] == ["x", "z"]


def test_several_results(graph: Graph) -> None:
    split = op("aten.split_with_sizes", value("x"), ..., name="split")
    assert matches(split, graph, "p")
    assert miss(split, graph, "q") == "%q is not result 0"
    assert matches(split.output(1), graph, "q")
    assert matches(op("aten.split_with_sizes", ..., output=None), graph, "q")
    with pytest.raises(GraphError, match="needs a name"):
        op("aten.split_with_sizes", ...).output(1)


def test_constants(graph: Graph) -> None:
    assert matches(constant("c"), graph, "c")
    assert miss(constant("c"), graph, "x") == "`c` (%x) is not a constant"
    assert miss(constant("c"), graph, "w") == "`c` (%w) is not a constant"
    assert matches(constant("c", dequantized=True), graph, "w")
    assert not matches(constant("c", dequantized=True), graph, "d")


def test_constant_tensor(graph: Graph) -> None:
    assert torch.equal(constant_tensor(graph.value("w")), torch.tensor([0.5, 1.0, 1.5]))
    assert constant_tensor(graph.value("c")) is graph.value("c").constant
    assert constant_tensor(graph.value("d")) is None
    assert constant_tensor(2.0) is None


def test_the_dequantize_of_something_computed_is_no_constant() -> None:
    graph = Graph.from_text("""
    graph(%x: i8[3]) {
      %k: f32[] = constant 0.5
      %w: f32[3] = graphopt.dequantize(%x, %k, None, None, -128, 127, torch.int8)
      return %w
    }""")
    assert constant_tensor(graph.value("w")) is None


def test_predicates(graph: Graph) -> None:
    def is_vector(v: Any) -> bool:
        return v.rank == 1

    assert matches(value("v", is_vector), graph, "c")
    assert miss(value("v", is_vector), graph, "x") == "is_vector does not hold for `v` (%x)"
    assert (
        miss(value("v", lambda v: False), graph, "x") == "the predicate does not hold for `v` (%x)"
    )
    declined = value("v", lambda v: Decline(f"%{v.name} is too wide"))
    assert miss(declined, graph, "x") == "%x is too wide"
    on_node = op("aten.relu", ..., where=lambda n: n["self"].is_constant)
    assert miss(on_node, graph, "a") == "the predicate does not hold for %a"


def test_values_and_literals_are_told_apart(graph: Graph) -> None:
    two_values = op("aten.mul.Tensor", value("a"), value("b"))
    assert miss(two_values, graph, "m") == "`b` (2.0) is not a value"
    assert matches(op("aten.mul.Tensor", operand(), operand()), graph, "m")
    assert not matches(op("aten.mul.Tensor", value(), 2), graph, "m")
    assert not matches(op("aten.cat", literal("parts"), ...), graph, "e")


def test_mistakes_in_patterns_are_errors() -> None:
    with pytest.raises(GraphError, match=r"unknown operator 'aten\.rellu'"):
        op("aten.rellu", value("x"))
    with pytest.raises(GraphError, match="has no operand 'wieght'"):
        op("aten.conv2d", ..., wieght=constant())
    with pytest.raises(GraphError, match="only 1 operands"):
        op("aten.relu", value(), value())


def test_the_closest_attempt_is_remembered(graph: Graph) -> None:
    """The alternative that came further, not the one that was tried last."""
    pattern = op(
        "aten.mul.Tensor",
        op("aten.add.Tensor", op("aten.relu", value("x")), literal("number")),
        operand("factor"),
    )
    assert miss(pattern, graph, "m") == "`number` (%c) is not a literal"
