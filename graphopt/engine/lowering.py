"""Lowering: the nodes of a graph become problems for kernels, fused where that saves memory.

Every node first becomes a unit of its own: a view, a kernel's problem, elementwise instructions, or
a step of torch. Then elementwise units join the unit that computes one of their operands: as the
epilogue of a layer, or as one more instruction of a fused loop. A union is legal where the graph of
units stays acyclic.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graphopt.engine import (  # noqa: F401 (they register their rules)
    attention_rules,
    matmul_rules,
    normalization_rules,
    pooling_rules,
)
from graphopt.engine.gather_rules import lower_gather
from graphopt.engine.integer_rules import integer_units
from graphopt.engine.layer_rules import LAYERS, Layer
from graphopt.engine.pointwise_rules import Draft, assemble, instructions
from graphopt.engine.quantization import dequantizes_constants, kept_types
from graphopt.engine.view_rules import lower_copy, lower_view
from graphopt.engine.work import (
    ConstantWork,
    Derived,
    KernelWork,
    Scope,
    Work,
    call_back,
)
from graphopt.ir import Graph, Node, Type, Value
from graphopt.kernels.expression import Expression
from graphopt.kernels.problem import PointwiseProblem, Problem
from graphopt.kernels.registry import candidates

MAXIMUM_INSTRUCTIONS = 32
MAXIMUM_OPERANDS = 12


@dataclass(eq=False)
class Unit:
    """Nodes that are computed together.

    Attributes:
        nodes: in topological order.
        works: what a unit that is complete consists of.
        layer: the layer whose epilogue the drafts are.
        drafts: elementwise instructions, with the values that they yield.
    """

    nodes: list[Node]
    works: list[Work] = field(default_factory=list)
    layer: Layer | None = None
    drafts: list[tuple[Value | str, Draft]] = field(default_factory=list)

    @property
    def is_pointwise(self) -> bool:
        return self.layer is None and bool(self.drafts)

    @property
    def result(self) -> Value:
        """The value that the last instruction, or the layer, yields."""
        for value, _ in reversed(self.drafts):
            if isinstance(value, Value):
                return value
        assert self.layer is not None
        return self.layer.output


def lower(graph: Graph, types: Mapping[Value, Type]) -> list[Work]:
    """What has to be done to compute a graph, in order.

    Args:
        graph: what is to be computed.
        types: the type of every value under one assignment of the free sizes.
    """
    scope = Scope(graph, kept_types(graph, types))
    units = _fuse(scope, _units(scope))
    # Complete units need not read what their nodes do: integer kernels read bytes, not floats.
    read = _read(units)
    computing = {node for unit in units if not unit.works for node in unit.nodes}
    done = set(graph.nodes) - computing
    works: list[Work] = []
    for unit in _ordered(units):
        works += _finish(scope, unit, read, done)
    return _needed(graph, works)


def _read(units: Iterable[Unit]) -> set[Value | Derived]:
    """What complete units read."""
    return {value for unit in units for work in unit.works for value in work.inputs}


def _needed(graph: Graph, works: list[Work]) -> list[Work]:
    """The works whose results something reads: a permutation's may lie in its source already."""
    wanted: set[Value | Derived] = {v for v in graph.outputs if isinstance(v, Value)}
    kept = []
    for work in reversed(works):
        if not wanted.isdisjoint(work.outputs):
            wanted.update(work.inputs)
            kept.append(work)
    return kept[::-1]


def _units(scope: Scope) -> list[Unit]:
    units = [Unit(list(unit.nodes), list(unit.works)) for unit in integer_units(scope)]
    for node in _others(scope.graph, units):
        if node.operator.is_size_arithmetic or not any(map(scope.is_tensor, node.outputs)):
            continue
        units.append(_unit(scope, node))
    return units


def _others(graph: Graph, units: list[Unit]) -> list[Node]:
    """The nodes that complete units leave to be computed, in the order of the graph: these units
    may find out for themselves what nodes before them would, such as the scales of rows."""
    claimed = {node for unit in units for node in unit.nodes}
    wanted: set[object] = {value for value in graph.outputs if isinstance(value, Value)}
    wanted |= _read(units)
    others = []
    for node in reversed(list(graph.nodes)):
        if node not in claimed and not wanted.isdisjoint(node.outputs):
            wanted.update(node.input_values())
            others.append(node)
    return others[::-1]


def _unit(scope: Scope, node: Node) -> Unit:
    if dequantizes_constants(node):
        return Unit([node], [ConstantWork(node)])
    works = lower_view(scope, node) or lower_copy(scope, node) or lower_gather(scope, node)
    if works is not None:
        return Unit([node], works)
    rule = LAYERS.get(node.op)
    layer = rule(scope, node) if rule is not None else None
    if layer is not None and _solvable(layer.problem(None, [])):
        return Unit([node], layer=layer)
    drafts = instructions(scope, node)
    if drafts is not None:
        return Unit([node], drafts=drafts)
    return Unit([node], [call_back(scope, node)])


def _solvable(problem: Problem | None) -> bool:
    return problem is not None and bool(candidates(problem))


# -- fusion --------------------------------------------------------------------------------------


class _Fusion:
    """Which unit every node belongs to, while units are joined."""

    def __init__(self, scope: Scope, units: Iterable[Unit]) -> None:
        self.scope = scope
        self.units = list(units)
        self.home = {node: unit for unit in self.units for node in unit.nodes}
        self.kept = _read(self.units)
        self.kept.update(output for output in scope.graph.outputs if isinstance(output, Value))

    def of(self, value: Value) -> Unit | None:
        return self.home.get(value.producer) if value.producer is not None else None

    def join(self, unit: Unit, into: Unit) -> None:
        into.nodes = sorted([*into.nodes, *unit.nodes], key=lambda node: node._key)
        order = {node: place for place, node in enumerate(into.nodes)}
        drafts = [*into.drafts, *unit.drafts]
        into.drafts = sorted(drafts, key=lambda named: order[_node_of(named[0], into)])
        for node in unit.nodes:
            self.home[node] = into
        self.units.remove(unit)

    def is_private(self, value: Value, user: Unit) -> bool:
        """Whether nobody but a unit needs a value."""
        users = (self.home[node] for node in value.users if node in self.home)
        return value not in self.kept and all(home is user for home in users)

    def between(self, early: Unit, late: Unit) -> bool:
        """Whether something outside of two units depends on the one and is needed by the other."""
        inputs = (v for node in late.nodes for v in node.input_values())
        return self.reaches(early, (v for v in inputs if self.of(v) not in (early, late)))

    def reaches(self, target: Unit, start: Iterable[Value]) -> bool:
        """Whether any of the values depends on a unit."""
        horizon = min(node._key for node in target.nodes)
        seen: set[Unit] = set()
        stack = [unit for value in start if (unit := self.of(value)) is not None]
        while stack:
            unit = stack.pop()
            if unit is target:
                return True
            if unit in seen or max(node._key for node in unit.nodes) < horizon:
                continue
            seen.add(unit)
            for node in unit.nodes:
                stack += [u for v in node.input_values() if (u := self.of(v)) is not None]
        return False


def _node_of(name: Value | str, unit: Unit) -> Node:
    if isinstance(name, Value):
        assert name.producer is not None
        return name.producer
    base = name.rpartition(".")[0]
    return next(node for node in unit.nodes if node.name == base)


def _fuse(scope: Scope, units: list[Unit]) -> list[Unit]:
    fusion = _Fusion(scope, units)
    for unit in units:
        if unit.is_pointwise and len(unit.nodes) == 1:
            _join_layer(fusion, unit) or _join_pointwise(fusion, unit)
    return fusion.units


def _join_layer(fusion: _Fusion, unit: Unit) -> bool:
    """Make an elementwise unit the epilogue of the layer that computes one of its operands."""
    scope, node = fusion.scope, unit.nodes[0]
    for value in dict.fromkeys(node.input_values()):
        home = fusion.of(value)
        if home is None or home.layer is None or not home.layer.takes_epilogue:
            continue
        if value is not home.result or not fusion.is_private(value, unit):
            continue
        if scope.shape(node.output) != scope.shape(value):
            continue
        if fusion.between(home, unit):
            continue
        drafts = [*home.drafts, *unit.drafts]
        expression, extra = assemble(scope, drafts, [node.output], (home.layer.output,))
        problem = home.layer.problem(expression, extra[1:])
        if not _solvable(problem):
            continue
        fusion.join(unit, home)
        return True
    return False


def _join_pointwise(fusion: _Fusion, unit: Unit) -> bool:
    """Make an elementwise unit part of the loops that compute its operands."""
    scope, node = fusion.scope, unit.nodes[0]
    joined = False
    for value in dict.fromkeys(node.input_values()):
        current, home = fusion.home[node], fusion.of(value)
        if home is None or home is current or not home.is_pointwise:
            continue
        if scope.shape(home.result) != scope.shape(node.output):
            continue
        if fusion.between(home, current) or fusion.between(current, home):
            continue
        if not _fits(fusion, home, current):
            continue
        fusion.join(current, home)
        joined = True
    return joined


def _fits(fusion: _Fusion, a: Unit, b: Unit) -> bool:
    drafts = [*a.drafts, *b.drafts]
    values = {v for _, (_, operands, _) in drafts for v in operands if isinstance(v, Value)}
    return len(drafts) <= MAXIMUM_INSTRUCTIONS and len(values) <= MAXIMUM_OPERANDS


# -- finishing -----------------------------------------------------------------------------------


def _finish(scope: Scope, unit: Unit, read: set[Value | Derived], done: set[Node]) -> list[Work]:
    """A unit's works; ``read`` is what complete units read. Of the nodes ``done`` some belong to
    them, and others need not be computed at all."""
    if unit.layer is not None:
        return [_finish_layer(scope, unit, unit.layer)]
    if not unit.drafts:
        return unit.works
    returned = {output for output in scope.graph.outputs if isinstance(output, Value)}
    results: list[Value | str] = [
        value
        for node in unit.nodes
        for value in node.outputs
        if value in returned or value in read or not done.union(unit.nodes).issuperset(value.users)
    ]
    if not results:
        return []
    expression, inputs = assemble(scope, unit.drafts, results)
    values = tuple(value for value in results if isinstance(value, Value))
    problem = PointwiseProblem(
        expression,
        tuple(scope.operand(value) for value in inputs),
        tuple(scope.operand(value) for value in values),
    )
    return [KernelWork(problem, tuple(inputs), values, tuple(unit.nodes))]


def _finish_layer(scope: Scope, unit: Unit, layer: Layer) -> KernelWork:
    expression: Expression | None = None
    extra: list[Value] = []
    if unit.drafts:
        expression, inputs = assemble(scope, unit.drafts, [unit.result], (layer.output,))
        extra = inputs[1:]
    problem = layer.problem(expression, extra)
    assert problem is not None
    return KernelWork(problem, layer.values(extra), (unit.result,), tuple(unit.nodes))


def _ordered(units: list[Unit]) -> list[Unit]:
    """Units in an order in which everything is computed before it is used."""
    home = {node: unit for unit in units for node in unit.nodes}
    waiting: dict[Unit, set[Unit]] = {}
    for unit in units:
        sources = (v.producer for node in unit.nodes for v in node.input_values())
        waiting[unit] = {home[p] for p in sources if p in home and home[p] is not unit}
    followers: dict[Unit, list[Unit]] = {unit: [] for unit in units}
    for unit, needs in waiting.items():
        for need in needs:
            followers[need].append(unit)
    ready = [(unit.nodes[0]._key, k, unit) for k, unit in enumerate(units) if not waiting[unit]]
    numbers = {unit: k for k, unit in enumerate(units)}
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, _, unit = heapq.heappop(ready)
        ordered.append(unit)
        for follower in followers[unit]:
            waiting[follower].discard(unit)
            if not waiting[follower]:
                heapq.heappush(ready, (follower.nodes[0]._key, numbers[follower], follower))
    assert len(ordered) == len(units), "units depend on one another in a circle"
    return ordered
