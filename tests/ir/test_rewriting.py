"""The driver: where rules apply, what it refuses, how it ends, and what it reports."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from graphopt import reference
from graphopt.errors import GraphError, PassError
from graphopt.ir import Graph, Origin, Value
from graphopt.ir.rewriting import (
    Decline,
    Match,
    Rule,
    closest_miss,
    constant,
    limit_applications,
    literal,
    op,
    operand,
    rewrite,
    rule,
    value,
)


def graph_of(inputs: str, body: str) -> Graph:
    return Graph.from_text(f"graph({inputs}) {{\n{body}\n}}")


def body_of(graph: Graph) -> list[str]:
    return [line.strip() for line in str(graph).splitlines()[1:-1]]


X = "%x: f32[batch=2, 3]"


@rule(
    "(x * a) * b => x * (a * b)",
    op("aten.mul.Tensor", op("aten.mul.Tensor", value("x"), constant("a")), constant("b")),
)
def merge_factors(graph: Graph, match: Match) -> Value:
    product = match["a"].constant * match["b"].constant
    return graph.add("aten.mul.Tensor", match["x"], graph.constant(product, "product"))


@rule("-(-x) => x", op("aten.neg", op("aten.neg", value("x"), single_use=False)))
def double_negation(graph: Graph, match: Match) -> Value:
    result: Value = match["x"]
    return result


CHAIN = """
  %a: f32[3] = constant [1.0, 2.0, 3.0]
  %m: f32[2, 3] = aten.mul.Tensor(%x, %a)  # first
  %b: f32[3] = constant [2.0, 2.0, 2.0]
  %n: f32[2, 3] = aten.mul.Tensor(%b, %m)  # second
  %c: f32[3] = constant [5.0, 5.0, 5.0]
  %o: f32[2, 3] = aten.mul.Tensor(%n, %c)  # third
  %y: f32[2, 3] = aten.relu(%o)
  return %y
"""


def test_rules_are_applied_until_none_applies() -> None:
    graph = graph_of(X, CHAIN)
    source = graph.clone()
    with graph.making("merging"):
        assert rewrite(graph, [merge_factors])
    graph.verify()
    assert body_of(graph) == [
        "%product_1: f32[3] = constant [10.0, 20.0, 30.0]",
        "%o: f32[2, 3] = aten.mul.Tensor(%x, %product_1)  # third by merging",
        "%y: f32[2, 3] = aten.relu(%o)",
        "return %y",
    ]
    inputs = [torch.randn(5, 3)]
    torch.testing.assert_close(reference.run(graph, inputs), reference.run(source, inputs))
    assert not rewrite(graph, [merge_factors])


def test_new_nodes_stand_before_the_root_and_keep_its_origin() -> None:
    """A made node with the operator of a matched one comes from where that one came from."""

    @rule(
        "relu(conv) => relu(clamp(conv))",
        op("aten.relu", op("aten.mul.Tensor", value("x"), constant("w"), name="mul")),
    )
    def rule_(graph: Graph, match: Match) -> Value:
        scaled = graph.add("aten.mul.Tensor", match["x"], match["w"])
        return graph.add("aten.clamp", scaled, 0.0)

    graph = graph_of(
        X,
        """
          %w: f32[3] = constant [1.0, 2.0, 3.0]
          %m: f32[2, 3] = aten.mul.Tensor(%x, %w)  # layer
          %r: f32[2, 3] = aten.relu(%m)  # activation
          %z: f32[2, 3] = aten.neg(%r)
          return %z
        """,
    )
    mul = graph.value("m").producer
    assert mul is not None
    mul.origin = Origin("layer", "Linear")
    rewrite(graph, [rule_])
    assert [node.op for node in graph.nodes] == ["aten.mul.Tensor", "aten.clamp", "aten.neg"]
    assert [str(node.origin) for node in graph.nodes[:2]] == ["layer", "activation"]
    assert graph.nodes[0].origin.module_type == "Linear"


def test_a_result_keeps_its_name() -> None:
    graph = graph_of(X, CHAIN)
    rewrite(graph, [merge_factors])
    assert graph.value("o").producer is graph.nodes[0]


def test_what_is_left_unused_goes_with_the_match() -> None:
    graph = graph_of(
        X,
        """
          %r: f32[2, 3] = aten.relu(%x)
          %s: f32[2, 3] = aten.sin(%r)
          %z: f32[2, 3] = aten.mul.Tensor(%s, 0.0)
          return %z
        """,
    )

    @rule("x * 0 => zeros", op("aten.mul.Tensor", value("x"), 0.0))
    def to_zero(graph: Graph, match: Match) -> Value:
        return graph.add("aten.zeros_like", graph.value("x"))

    rewrite(graph, [to_zero])
    assert [node.op for node in graph.nodes] == ["aten.zeros_like"]


# -- several users, outputs, convexity --------------------------------------------------------


def test_a_value_with_another_user_is_not_swallowed() -> None:
    graph = graph_of(
        X,
        """
          %a: f32[3] = constant [1.0, 2.0, 3.0]
          %m: f32[2, 3] = aten.mul.Tensor(%x, %a)
          %n: f32[2, 3] = aten.mul.Tensor(%m, %a)
          %r: f32[2, 3] = aten.relu(%m)
          return %n, %r
        """,
    )
    assert not rewrite(graph, [merge_factors])
    miss = closest_miss(merge_factors, graph)
    assert str(miss) == (
        "'(x * a) * b => x * (a * b)' does not apply at %n: "
        "%m has 2 users, outside of the match: %r"
    )


def test_an_output_of_the_graph_is_not_swallowed() -> None:
    graph = graph_of(
        X,
        """
          %a: f32[3] = constant [1.0, 2.0, 3.0]
          %m: f32[2, 3] = aten.mul.Tensor(%x, %a)
          %n: f32[2, 3] = aten.mul.Tensor(%m, %a)
          return %n, %m
        """,
    )
    assert not rewrite(graph, [merge_factors])
    miss = closest_miss(merge_factors, graph)
    assert miss is not None
    assert miss.reason == "%m is an output of the graph"


def test_a_value_may_survive_where_the_rule_says_so() -> None:
    graph = graph_of(
        X,
        """
          %m: f32[2, 3] = aten.neg(%x)
          %n: f32[2, 3] = aten.neg(%m)
          %r: f32[2, 3] = aten.relu(%m)
          return %n, %r
        """,
    )
    assert rewrite(graph, [double_negation])
    assert body_of(graph) == [
        "%m: f32[2, 3] = aten.neg(%x)",
        "%r: f32[2, 3] = aten.relu(%m)",
        "return %x, %r",
    ]


def test_single_use_of_a_leaf() -> None:
    seen = op("aten.relu", value("x", single_use=True))

    @rule("relu(x) => clamp(x)", seen)
    def clamp(graph: Graph, match: Match) -> Value:
        return graph.add("aten.clamp", match["x"], 0.0)

    graph = graph_of(
        X,
        """
          %w: f32[3] = constant [1.0, 2.0, 3.0]
          %m: f32[2, 3] = aten.mul.Tensor(%x, %w)
          %r: f32[2, 3] = aten.relu(%m)
          %s: f32[2, 3] = aten.neg(%m)
          return %r, %s
        """,
    )
    assert not rewrite(graph, [clamp])
    assert "%m has 2 users" in str(closest_miss(clamp, graph))


@rule(
    "linear(x, v), linear(x, w) => split(linear(x, [v, w]))",
    op("aten.linear", value("x"), constant("v")),
    op("aten.linear", value("x"), constant("w")),
)
def merge_linears(graph: Graph, match: Match) -> list[Value]:
    weights = [match["v"].constant, match["w"].constant]
    both = graph.constant(torch.cat(weights), "both")
    merged = graph.add("aten.linear", match["x"], both)
    sizes = [weight.shape[0] for weight in weights]
    return graph.add_node("aten.split_with_sizes", merged, sizes, -1).outputs


def test_several_roots() -> None:
    graph = graph_of(
        X,
        """
          %v: f32[1, 3] = constant [[1.0, 2.0, 3.0]]
          %a: f32[2, 1] = aten.linear(%x, %v)  # q
          %r: f32[2, 1] = aten.relu(%a)
          %w: f32[2, 3] = constant [[1.0, 0.0, 3.0], [4.0, 5.0, 6.0]]
          %b: f32[2, 2] = aten.linear(%x, %w)  # k
          return %r, %b
        """,
    )
    source = graph.clone()
    assert rewrite(graph, [merge_linears])
    graph.verify()
    assert body_of(graph)[1:] == [
        "%linear: f32[2, 3] = aten.linear(%x, %both)  # q",
        "%a: f32[2, 1], %b: f32[2, 2] = aten.split_with_sizes(%linear, [1, 2], -1)  # q",
        "%r: f32[2, 1] = aten.relu(%a)",
        "return %r, %b",
    ]
    inputs = [torch.randn(4, 3)]
    torch.testing.assert_close(reference.run(graph, inputs), reference.run(source, inputs))


def test_roots_that_depend_on_each_other_are_not_merged() -> None:
    """A way from one root out of the match and back into it: merged, both would wait for each
    other."""
    roots = (
        op("aten.mul.Tensor", value("x"), value("a"), name="first"),
        op("aten.add.Tensor", value("x"), value("b"), name="second"),
    )

    @rule("x * a, x + b => addcmul(x, x, a), x + b", *roots)
    def both(graph: Graph, match: Match) -> Any:
        raise AssertionError("must not be reached")

    graph = graph_of(
        "%x: f32[3]",
        """
          %s: f32[3] = aten.sin(%x)
          %m: f32[3] = aten.mul.Tensor(%x, %s)
          %r: f32[3] = aten.relu(%m)
          %y: f32[3] = aten.add.Tensor(%x, %r)
          return %y, %m
        """,
    )
    assert not rewrite(graph, [both])
    miss = closest_miss(both, graph)
    assert miss is not None
    assert "depends on another root" in miss.reason


def test_roots_are_not_merged_where_no_place_suits_all() -> None:
    graph = graph_of(
        "%x: f32[2, 3]",
        """
          %a: f32[2, 3] = aten.mul.Tensor(%x, 2.0)
          %r: f32[2, 3] = aten.relu(%a)
          %l: f32[2, 3] = aten.sin(%x)
          %b: f32[2, 3] = aten.add.Tensor(%x, %l)
          return %r, %b
        """,
    )

    @rule(
        "x * 2, x + b => both",
        op("aten.mul.Tensor", value("x"), 2.0),
        op("aten.add.Tensor", value("x"), value("b")),
    )
    def both(graph: Graph, match: Match) -> Any:
        doubled = graph.add("aten.mul.Tensor", match["x"], 2.0)
        return [doubled, graph.add("aten.add.Tensor", match["x"], match["b"])]

    assert not rewrite(graph, [both])
    miss = closest_miss(both, graph)
    assert miss is not None
    assert miss.reason == "%r comes before %l, which the match reads"


def test_unused_results_need_no_replacement() -> None:
    @rule("native_layer_norm => layer_norm", op("aten.native_layer_norm", ..., name="norm"))
    def plain(graph: Graph, match: Match) -> Any:
        norm = match["norm"]
        operands = [norm[name] for name in ("input", "normalized_shape", "weight", "bias", "eps")]
        return graph.add("aten.layer_norm", *operands), None, None

    results = "%y: f32[2, 3], %mean: f32[2, 1], %rstd: f32[2, 1]"
    text = f"{results} = aten.native_layer_norm(%x, [3], None, None, 1e-05)\nreturn %y"
    graph = graph_of(X, text)
    assert rewrite(graph, [plain])
    assert [node.op for node in graph.nodes] == ["aten.layer_norm"]
    graph = graph_of(X, text.replace("return %y", "return %y, %mean"))
    with pytest.raises(PassError, match="returned None for %mean, which is used"):
        rewrite(graph, [plain])


# -- declines and failures --------------------------------------------------------------------


def test_a_decline_undoes_what_was_begun() -> None:
    @rule("relu(x) => ...", op("aten.relu", value("x")))
    def hesitant(graph: Graph, match: Match) -> Any:
        graph.add("aten.neg", graph.add("aten.sin", match["x"]))
        return Decline("on second thoughts")

    graph = graph_of(X, "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    text, version = str(graph), graph.version
    assert not rewrite(graph, [hesitant])
    assert (str(graph), graph.version) == (text, version)
    assert str(closest_miss(hesitant, graph)).endswith("at %y: on second thoughts")
    assert (str(graph), graph.version) == (text, version)


def test_after_a_decline_other_ways_and_rules_are_tried() -> None:
    @rule("a + b => a", op("aten.add.Tensor", value("a"), value("b")))
    def picky(graph: Graph, match: Match) -> Any:
        return match["b"] if match["a"].name == "z" else Decline("wrong way round")

    graph = graph_of("%x: f32[3], %z: f32[3]", "%y: f32[3] = aten.add.Tensor(%x, %z)\nreturn %y")
    assert rewrite(graph, [picky])
    assert body_of(graph) == ["return %x"]


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (lambda g, m: g.add("aten.sum", m["x"]), r"replacement %sum is f32\[\], not f32\[2, 3\]"),
        (lambda g, m: [m["x"], m["x"]], "returned 2 values for 1 results"),
        (lambda g, m: 3.0, r"returned 3\.0, which is no value"),
        (lambda g, m: g.add("aten.conv2d", m["x"], m["x"]), "is not valid"),
        (lambda g, m: m["y"], "no name 'y'"),
    ],
)
def test_a_faulty_replacement_names_its_rule(replacement: Any, message: str) -> None:
    faulty = Rule("relu(x) => nonsense", (op("aten.relu", value("x")),), replacement)
    graph = graph_of(X, "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    text = str(graph)
    with pytest.raises(PassError, match=message) as caught:
        rewrite(graph, [faulty])
    assert "the rule 'relu(x) => nonsense' failed at %y" in str(caught.value)
    assert "--> %y: f32[2, 3] = aten.relu(%x)" in caught.value.__notes__[0]
    assert str(graph) == text
    graph.verify()


def test_types_must_agree_under_both_assignments() -> None:
    """As f32[2, 3] the values agree for the example's batch alone."""

    @rule("relu(x) => z", op("aten.relu", value("x")))
    def fixed(graph: Graph, match: Match) -> Value:
        return graph.value("z")

    graph = graph_of(X + ", %z: f32[2, 3]", "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    with pytest.raises(PassError, match="not f32"):
        rewrite(graph, [fixed])


def test_a_rule_must_change_something() -> None:
    idle = Rule("x => x", (op("aten.relu", ..., name="relu"),), lambda g, m: m["relu"].output)
    graph = graph_of(X, "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    with pytest.raises(PassError, match="'x => x' says that it applied, but changed nothing"):
        rewrite(graph, [idle])


def test_a_change_in_place() -> None:
    @rule("clamp(x, 0) => clamp(x, 1)", op("aten.clamp", value("x"), 0.0, name="clamp"))
    def raise_bound(graph: Graph, match: Match) -> Value:
        graph.set_operand(match["clamp"], "min", 1.0)
        result: Value = match["clamp"].output
        return result

    graph = graph_of(X, "%y: f32[2, 3] = aten.clamp(%x, 0.0)\nreturn %y")
    assert rewrite(graph, [raise_bound])
    assert body_of(graph) == ["%y: f32[2, 3] = aten.clamp(%x, 1.0)", "return %y"]


def test_mistakes_in_rules_are_errors() -> None:
    with pytest.raises(GraphError, match="has no pattern"):
        rule("nothing => x")
    with pytest.raises(GraphError, match="must be op"):
        rule("x => x", value("x"))


# -- termination ------------------------------------------------------------------------------


@rule("x + y => y + x", op("aten.add.Tensor", value("x"), value("y")))
def swap(graph: Graph, match: Match) -> Value:
    return graph.add("aten.add.Tensor", match["y"], match["x"])


@rule("relu(x) => clamp(x, 0)", op("aten.relu", value("x")))
def to_clamp(graph: Graph, match: Match) -> Value:
    return graph.add("aten.clamp", match["x"], 0.0)


@rule("clamp(x, 0) => max(x, 0)", op("aten.clamp", value("x"), 0.0))
def to_clamp_min(graph: Graph, match: Match) -> Value:
    return graph.add("aten.clamp_min", match["x"], 0)


@rule("max(x, 0) => relu(x)", op("aten.clamp_min", value("x"), 0))
def to_relu(graph: Graph, match: Match) -> Value:
    return graph.add("aten.relu", match["x"])


@pytest.mark.parametrize(
    ("line", "rules", "cycle"),
    [
        ("aten.add.Tensor(%x, %z)", [swap], {swap}),
        ("aten.relu(%x)", [to_clamp, to_clamp_min, to_relu], {to_clamp, to_clamp_min, to_relu}),
        (
            "aten.relu(%x)",
            [swap, to_relu, to_clamp_min, to_clamp],
            {to_clamp, to_clamp_min, to_relu},
        ),
    ],
)
def test_a_cycle_of_rules_is_named(line: str, rules: list[Rule], cycle: set[Rule]) -> None:
    graph = graph_of("%x: f32[3], %z: f32[3]", f"%y: f32[3] = {line}\nreturn %y")
    with pytest.raises(PassError, match="rewriting does not end: after 51 applications") as caught:
        rewrite(graph, rules, limit=50)
    assert set(re.findall("'(.*?)'", str(caught.value))) == {rule.name for rule in cycle}


def test_growth_without_a_cycle_of_the_graph_ends_too() -> None:
    grow = Rule(
        "relu(x) => relu(neg(x))",
        (op("aten.relu", value("x")),),
        lambda g, m: g.add("aten.relu", g.add("aten.neg", m["x"])),
    )
    graph = graph_of(X, "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    with pytest.raises(PassError, match="'relu"):
        rewrite(graph, [grow], limit=20)


def test_many_applications_are_no_cycle() -> None:
    lines = ["%y0: f32[3] = aten.relu(%x)"]
    lines += [f"%y{k}: f32[3] = aten.relu(%y{k - 1})" for k in range(1, 1200)]
    graph = graph_of("%x: f32[3]", "\n".join([*lines, "return %y1199"]))
    assert rewrite(graph, [to_clamp])
    assert {node.op for node in graph.nodes} == {"aten.clamp"}


# -- bisection and reports --------------------------------------------------------------------


def test_the_number_of_applications_can_be_limited() -> None:
    graph = graph_of(X, CHAIN)
    with limit_applications(1) as applied:
        assert rewrite(graph, [merge_factors])
        assert not rewrite(graph, [merge_factors])
    assert applied == ["'(x * a) * b => x * (a * b)' at %n"]
    assert len(graph) == 3
    assert rewrite(graph, [merge_factors])
    assert len(graph) == 2


def test_the_closest_miss_is_none_where_a_rule_applies_or_nothing_is_near() -> None:
    assert closest_miss(merge_factors, graph_of(X, CHAIN)) is None
    graph = graph_of(X, "%y: f32[2, 3] = aten.relu(%x)\nreturn %y")
    assert closest_miss(merge_factors, graph) is None


def test_the_closest_miss_is_the_one_that_came_furthest() -> None:
    graph = graph_of(
        X,
        """
          %a: f32[2, 3] = aten.mul.Tensor(%x, 2.0)
          %c: f32[3] = constant [1.0, 2.0, 3.0]
          %b: f32[2, 3] = aten.mul.Tensor(%a, %c)
          return %b
        """,
    )
    miss = closest_miss(merge_factors, graph)
    assert miss is not None
    assert miss.node is graph.value("b").producer
    assert miss.reason == "`a` (2.0) is not a constant"


def test_literal_and_operand_names_reach_the_replacement() -> None:
    @rule(
        "slice => narrow",
        op("aten.slice.Tensor", value("x"), literal("dim"), operand("a"), operand("b")),
    )
    def narrow(graph: Graph, match: Match) -> Any:
        length = match["b"] - match["a"]
        return graph.add("aten.narrow", match["x"], match["dim"], match["a"], length)

    graph = graph_of(X, "%y: f32[2, 2] = aten.slice.Tensor(%x, 1, 1, 3)\nreturn %y")
    assert rewrite(graph, [narrow])
    assert body_of(graph) == ["%y: f32[2, 2] = aten.narrow(%x, 1, 1, 2)", "return %y"]
