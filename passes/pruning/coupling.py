"""Which channels of a network can only be removed together.

Every dimension of every value is a row of channels (see `axes`). Each operator's coupling rule
says which channels of its operands and results are the same, which are tied, and which it pins:
those whose removal would change other results or that the network's interface fixes. What can be
removed are the connected components without a pinned channel.

The idea of grouping by dependency is that of Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
import numpy as np

from graphopt.errors import PassError
from graphopt.ir import Node, TensorType, Value
from graphopt.passes.pruning.axes import Axis, Channels, Sizes, row, same_structure

Axes = tuple[Axis, ...]
Rule = Callable[["Coupling", Node], Sequence[Axes]]
"""A coupling rule: ties and pins channels, and returns the axes of each result."""


@dataclass(frozen=True)
class Source:
    """A dimension of a constant, whose channels are its own: ``first``, ``first + 1``, ..."""

    constant: Value
    dimension: int
    first: int
    size: int

    @property
    def channels(self) -> Channels:
        return np.arange(self.first, self.first + self.size)


@dataclass(frozen=True)
class Decision:
    """A place where channels form a grid of which only whole rows or whole columns can go.

    Attributes:
        count: how many ways there are.
        channels: what can be removed with the way that was taken.
    """

    count: int
    channels: Channels


@dataclass
class Coupling:
    """What the rules have found out; see `coupling_rules.couple`.

    Attributes:
        assignments: how many assignments of free sizes the graph's types have.
        choices: the way to take at each decision, by its key; the first where it is missing.
        axes: of every tensor.
        sources: the constants' dimensions.
        reasons: why channels are pinned; see `axes.Channels`.
        decisions: that were taken.
    """

    assignments: int
    choices: Mapping[str, int] = field(default_factory=dict)
    axes: dict[Value, Axes] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)
    _count: int = 0
    _ties: list[tuple[Channels, Channels]] = field(default_factory=list)
    _pins: list[tuple[Channels, int]] = field(default_factory=list)
    _heads: list[Channels] = field(default_factory=list)

    # -- making axes -------------------------------------------------------------------------

    def fixed(self, sizes: Sizes, reason: str) -> Axis:
        """An axis of which nothing can be removed."""
        return Axis(sizes, np.array([~self._reason(reason)]), (1,) * self.assignments)

    def all_fixed(self, value: Value, reason: str) -> Axes:
        return tuple(
            self.fixed(self.sizes(value, dimension), reason) for dimension in range(value.rank)
        )

    def new(self, constant: Value) -> Axes:
        """The axes of a constant: channels of its own, unless there is but one."""
        made = []
        for dimension, size in enumerate(constant.shape):
            if size < 2:
                sizes = (size,) * self.assignments
                made.append(self.fixed(sizes, f"%{constant.name} has a single channel"))
                continue
            self.sources.append(Source(constant, dimension, self._count, size))
            made.append(row(self.sources[-1].channels, self.assignments))
            self._count += size
        return tuple(made)

    def row(self, channels: Channels) -> Axis:
        return row(channels, self.assignments)

    @staticmethod
    def sizes(value: Value, dimension: int) -> Sizes:
        return tuple(t.shape[dimension] for t in value.types if isinstance(t, TensorType))

    # -- what rules say ----------------------------------------------------------------------

    def tie_channels(self, a: Channels, b: Channels) -> None:
        """The channels of two rows go together, one by one."""
        self._pin_beside(a, b)
        self._pin_beside(b, a)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._ties.append((a[both], b[both]))

    def tie_all(self, channels: Channels, rows: Channels) -> Channels:
        """The channels with the same number in ``rows`` go together; returns one of each."""
        count = int(rows.max()) + 1
        first = np.zeros(count, dtype=np.int64)
        first[rows[::-1]] = channels[::-1]
        fixed = channels < 0
        first[rows[fixed]] = channels[fixed]
        self.tie_channels(channels, first[rows])
        return first

    def tie(self, a: Axis, b: Axis, node: Node) -> Axis:
        """The indices of two axes go together, one by one; returns an axis for both."""
        if same_structure(a, b):
            self.tie_channels(a.channels, b.channels)
            return b if b.is_fixed else a
        flat_a, flat_b = a.flat(), b.flat()
        if a.is_fixed or b.is_fixed:
            fixed, other = (a, b) if a.is_fixed else (b, a)
            self.pin_because(other, int(fixed.channels[0]))
            return fixed
        if flat_a is not None and flat_b is not None:
            self.tie_channels(flat_a, flat_b)
            return a if len(a.channels) < len(b.channels) else b
        reason = f"{describe(node)} meets channels in two arrangements"
        self.pin(a, reason)
        self.pin(b, reason)
        return a

    def pin(self, axis: Axis, reason: str) -> None:
        """Nothing of an axis can be removed."""
        if not axis.is_fixed:
            self.pin_channels(axis.channels, reason)

    def pin_channels(self, channels: Channels, reason: str) -> None:
        self._pins.append((channels[channels >= 0], self._reason(reason)))

    def pin_because(self, axis: Axis, fixed: int) -> None:
        """Nothing of an axis can be removed, for the reason of a fixed channel."""
        self._pins.append((axis.channels[axis.channels >= 0], ~fixed))

    def mark_heads(self, axis: Axis) -> None:
        """The channels of an axis are attention heads."""
        self._heads.append(axis.channels[axis.channels >= 0])

    def choose(self, key: str, count: int) -> int:
        """Which of some ways to take at a decision; `decided` must follow."""
        return self.choices.get(key, 0) % count

    def decided(self, key: str, count: int, channels: Channels) -> None:
        self.decisions[key] = Decision(count, channels)

    def _reason(self, reason: str) -> int:
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        return len(self.reasons) - 1

    def _pin_beside(self, fixed: Channels, other: Channels) -> None:
        """Channels tied to fixed ones are pinned for the same reasons."""
        touched = (fixed < 0) & (other >= 0)
        for channel in np.unique(fixed[touched]):
            self._pins.append((other[touched & (fixed == channel)], ~int(channel)))

    # -- conclusions -------------------------------------------------------------------------

    def components(self) -> Components:
        """The connected components of the channels, and which of them are pinned."""
        graph = networkx.Graph()
        for a, b in self._ties:
            graph.add_edges_from(zip(a.tolist(), b.tolist(), strict=True))
        component = np.arange(self._count)
        for together in networkx.connected_components(graph):
            members = np.fromiter(together, dtype=np.int64, count=len(together))
            component[members] = members.min()
        reason = np.full(self._count, -1)
        for channels, number in reversed(self._pins):  # the first reason stays
            reason[component[channels]] = number
        heads = np.zeros(self._count, dtype=bool)
        for channels in self._heads:
            heads[component[channels]] = True
        return Components(component, reason, heads)


@dataclass(frozen=True, eq=False)
class Components:
    """Channels that go together.

    Attributes:
        component: of every channel, named by its lowest channel.
        reason: by component, the number of the reason why it is pinned, or -1.
        heads: by component, whether it is an attention head.
    """

    component: Channels
    reason: Channels
    heads: np.ndarray

    def removable(self, channels: Channels) -> Channels:
        """The components among channels that can be removed."""
        found: Channels = np.unique(self.component[channels[channels >= 0]])
        return found[self.reason[found] < 0]


def describe(node: Node) -> str:
    """How reasons name a node."""
    return f"%{node.name} ({node.op})"


def check_axes(node: Node, results: Sequence[Axes]) -> None:
    """Raises PassError where a rule's answer does not fit the types of the results."""
    for value, axes in zip(node.outputs, results, strict=True):
        if not value.is_tensor:
            continue
        expected = [Coupling.sizes(value, dimension) for dimension in range(value.rank)]
        if [axis.sizes for axis in axes] != expected:
            raise PassError(
                f"the coupling rule of {describe(node)} gives the sizes "
                f"{[axis.sizes for axis in axes]} to %{value.name}, which has {expected}"
            )
