"""Random graphs, the inputs that go with them, and the check that a change kept their numbers.

A graph is built from a `Recipe`: a list of steps, each a name and some bytes that decide its
choices. Steps that find nothing to work on are skipped, so every recipe gives a graph, and a
recipe shrinks by losing steps and by smaller bytes, which mean simpler choices.
`benchmarks/random_graphs.py` runs as many as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from agreement import assert_same_form, bound, largest_error
from graph_builder import Choices
from hypothesis import strategies as st
from random_patterns import PATTERNS
from random_steps import STEPS, declare_outputs, start

from graphopt import Context, Pipeline, reference
from graphopt.engine import Selection, compile_graph
from graphopt.ir import Graph, TensorType, Value
from graphopt.ir.inference import map_operand
from graphopt.registry import as_pass, registered_passes

LONGEST_RECIPE = 14
BYTES_PER_STEP = 16


@dataclass(frozen=True)
class Recipe:
    """What a random graph is made from; equal recipes give equal graphs."""

    start: bytes
    steps: tuple[tuple[str, bytes], ...]
    end: bytes


@dataclass
class Case:
    """A verified graph with inputs for each of its assignments of the free sizes."""

    recipe: Recipe
    graph: Graph
    inputs: tuple[list[torch.Tensor], ...]

    def in_double(self) -> Case:
        """The same computation in float64 throughout, so that constants which a pass makes are
        exact too, and results can be compared tightly."""
        inputs = tuple([_doubled(tensor) for tensor in tensors] for tensors in self.inputs)
        return Case(self.recipe, _graph_in_double(self.graph), inputs)

    def __repr__(self) -> str:
        return f"{self.recipe}\n{self.graph}"


EVERY_STEP = {**STEPS, **PATTERNS}


def build(recipe: Recipe) -> Case:
    """The graph of a recipe, verified."""
    builder = start(Choices(recipe.start))
    for name, data in recipe.steps:
        builder.run(EVERY_STEP[name], data)
    builder.choices = Choices(recipe.end)
    declare_outputs(builder)
    builder.graph.verify()
    return Case(recipe, builder.graph, builder.inputs)


def recipes(names: Sequence[str] = (), longest: int = LONGEST_RECIPE) -> st.SearchStrategy[Recipe]:
    """Recipes of all steps, or of those that are named.

    Whole patterns, such as a convolution before a batch norm, are as frequent as single
    operators.
    """
    decisions = st.binary(min_size=BYTES_PER_STEP, max_size=BYTES_PER_STEP)
    kinds = (
        st.sampled_from(list(names))
        if names
        else st.one_of(st.sampled_from(list(STEPS)), st.sampled_from(list(PATTERNS)))
    )
    steps = st.lists(st.tuples(kinds, decisions), min_size=2, max_size=longest)
    return st.builds(Recipe, decisions, steps.map(tuple), decisions)


def cases(names: Sequence[str] = (), longest: int = LONGEST_RECIPE) -> st.SearchStrategy[Case]:
    """Verified graphs with inputs; see `recipes`."""
    return recipes(names, longest).map(build)


def _doubled(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.double() if leaf.is_floating_point() else leaf
    if isinstance(leaf, TensorType):
        return TensorType(_doubled(leaf.dtype), leaf.shape)
    return torch.float64 if leaf == torch.float32 else leaf


def _graph_in_double(graph: Graph) -> Graph:
    twin = Graph(graph.sizes, graph.guards)
    values: dict[Value, Value] = {}
    for value in graph.values:
        if value.is_input:
            values[value] = twin.add_input(value.name, _doubled(value.type), value.free)
        elif value.constant is not None:
            tensor = _doubled(value.constant)
            values[value] = twin.constant(tensor, value.name, trainable=value.trainable)

    def convert(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Value) else _doubled(leaf)

    for node in graph.nodes:
        operands = {name: map_operand(operand, convert) for name, operand in node.operands.items()}
        made = twin.add_node(node.op, **node.operator.bind((), operands))
        values.update(zip(node.outputs, made.outputs, strict=True))
    twin.set_outputs([convert(output) for output in graph.outputs])
    return twin


# -- the check ------------------------------------------------------------------------------


def check(
    before: Graph,
    after: Graph,
    inputs: Sequence[Sequence[torch.Tensor]],
    *,
    tolerance: float = 1e-9,
    signed_zeros: bool = False,
) -> None:
    """Raises AssertionError unless two graphs compute the same.

    Types must be equal under every assignment of the free sizes. Values are compared in float64.
    A pass that makes constants rounds them to the graph's dtype: give it `Case.in_double`.

    Args:
        before: the graph as it was.
        after: the graph as it has become.
        inputs: one list of tensors per assignment of the free sizes.
        tolerance: largest difference, relative to the output's largest value (or to 1).
        signed_zeros: zeros must have the same sign. (Not all bits: torch rounds differently
            for another layout of an operand.)
    """
    assert [v.types for v in after.inputs] == [v.types for v in before.inputs]
    assert len(after.outputs) == len(before.outputs)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        old_types = old.types if isinstance(old, Value) else old
        new_types = new.types if isinstance(new, Value) else new
        assert new_types == old_types, f"an output was {old_types} and is {new_types}"
    for k, tensors in enumerate(inputs):
        expected = reference.run(before, tensors, dtype=torch.float64)
        results = reference.run(after, tensors, dtype=torch.float64)
        for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            where = f"output {position} for {[tuple(t.shape) for t in tensors]}"
            _assert_close(result, wanted, tolerance, where)
            if signed_zeros and isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                zeros = (result == 0) & (wanted == 0)
                same = torch.equal(result[zeros].signbit(), wanted[zeros].signbit())
                assert same, f"{where}: signs of zeros differ"
        _assert_native(after, tensors, k, expected)


def _assert_native(graph: Graph, tensors: Sequence[torch.Tensor], k: int, expected: Any) -> None:
    """In its own dtypes, a graph gives results of its types, not far from the exact ones."""
    results = reference.run(graph, tensors)
    for output, result, wanted in zip(graph.outputs, results, expected, strict=True):
        if isinstance(result, torch.Tensor):
            assert isinstance(output, Value)
            assert TensorType.of(result) == output.types[k], f"%{output.name}"
            result = _doubled(result)
        _assert_close(result, wanted, 1e-2, f"{output} in its own dtype")


def _assert_close(result: Any, wanted: Any, tolerance: float, where: str) -> None:
    if not isinstance(wanted, torch.Tensor):
        assert type(result) is type(wanted), where
        assert result == wanted, where
        return
    assert result.shape == wanted.shape, f"{where}: {result.shape} instead of {wanted.shape}"
    if not wanted.is_floating_point():
        assert torch.equal(result, wanted), where
        return
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(
        result, wanted, rtol=0, atol=tolerance * scale, msg=lambda m: f"{where}: {m}"
    )


# -- what is checked of passes and engine -----------------------------------------------------

# Passes that move, merge and drop what is there, but compute nothing anew.
STRUCTURAL = frozenset({"common-subexpressions", "constant-folding", "dead-code", "simplification"})


def exact_passes() -> list[str]:
    """The names of the registered passes that promise to keep the numbers."""
    return [name for name, known in registered_passes().items() if known.accuracy == "exact"]


def check_pass(case: Case, name: str) -> None:
    """Raises AssertionError unless a pass keeps the numbers of a graph, says truly whether it
    changed anything, and has nothing left to do when it runs again."""
    changed = case.graph.clone()
    one = as_pass(name)
    says = one.function(changed, Context())
    changed.verify()
    differs = changed.to_text() != case.graph.to_text()
    assert says == differs, f"{name} says {says}, but the graph is {'' if differs else 'not '}new"
    check(case.graph, changed, case.inputs, signed_zeros=name in STRUCTURAL)
    settled = changed.to_text()
    again = one.function(changed, Context())
    assert not again, f"{name} is not idempotent:\n{settled}\n{changed}"


def check_passes(case: Case, names: Sequence[str]) -> None:
    """Raises AssertionError unless passes, one after the other, keep the numbers of a graph."""
    changed = case.graph.clone()
    Pipeline(names).run(changed)
    check(case.graph, changed, case.inputs)


def check_engine(case: Case, threads: int = 2) -> None:
    """Raises AssertionError unless the engine's results have the graph's types and are about as
    close to float64 as torch's own float32 results."""
    plan = None
    for sizes, tensors in zip(case.graph.assignments, case.inputs, strict=True):
        plan = compile_graph(
            case.graph, sizes, threads=threads, selection=Selection(measure=False), like=plan
        )
        computed = iter(plan.run(*tensors))
        results = [
            next(computed) if is_computed else literal
            for is_computed, literal in zip(plan.is_computed, plan.literals, strict=True)
        ]
        exact = reference.run(case.graph, tensors, dtype=torch.float64)
        single = reference.run(case.graph, tensors)
        assert_same_form(results, single)
        for position, (result, wanted, torchs) in enumerate(
            zip(results, exact, single, strict=True)
        ):
            error, allowed = largest_error(result, wanted), bound(torchs, wanted)
            assert error <= allowed, f"output {position}, {sizes}: error {error}, bound {allowed}"
