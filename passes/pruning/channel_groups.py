"""Groups of channels that can be pruned: what belongs to each unit, and what is protected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Value
from graphopt.ir.types import Type
from graphopt.passes.layers import CONVOLUTIONS, LINEAR, TRANSPOSED_CONVOLUTIONS, is_transposed
from graphopt.passes.pruning.axes import Axis, Channels
from graphopt.passes.pruning.coupling import Components, Coupling, Source
from graphopt.passes.pruning.coupling_rules import couple
from graphopt.passes.pruning.coupling_rules_einsum import EINSUM, einsum_labels


@dataclass(frozen=True, eq=False)
class Member:
    """A constant of which slices along a dimension belong to the units of a group.

    Attributes:
        constant: such as a weight or a bias.
        dimension: along which the slices are.
        units: [size of the dimension], int64: the unit of each slice; -1 if it is of none.
        nodes: which operators use the constant, with the name of the operand.
        makes_channels: whether the slices are what computes the units' channels (rows of a
            weight), not what reads or scales them.
    """

    constant: Value
    dimension: int
    units: Tensor
    nodes: tuple[tuple[Node, str], ...]
    makes_channels: bool


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a graph's channels. It holds for clones of the graph too, and after its
    constants have got other numbers: values are known by name.

    Attributes:
        axes: of every tensor.
        types: of every value.
        components: see `Components`.
    """

    axes: dict[str, tuple[Axis, ...]]
    types: dict[str, tuple[Type, ...]]
    components: Components

    def fits(self, graph: Graph) -> bool:
        """Whether a graph has the same values of the same types."""
        return {value.name: value.types for value in graph.values} == self.types


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units of which any can be pruned, alike in structure: channels of a layer with all that
    depends on them, attention heads, groups of a grouped convolution.

    Attributes:
        name: the module path of the layer that makes the channels; with a range of its channels
            where there are several groups.
        units: how many there are. One at least must stay.
        channels_per_unit: how many of that layer's channels a unit has.
        members: the constants whose slices belong to the units.
        is_heads: whether the units are attention heads.
        structure: of the graph.
        components: of each unit; see `Structure`.
    """

    name: str
    units: int
    channels_per_unit: int
    members: tuple[Member, ...]
    is_heads: bool = False
    structure: Structure = field(kw_only=True, repr=False)
    components: Channels = field(kw_only=True, repr=False)

    def scores(self, of: Callable[[Member], Tensor]) -> Tensor:
        """Sums of scores over what belongs to each unit.

        Args:
            of: gives the scores of a member's elements, in the shape of its constant.

        Returns:
            [units], float64.
        """
        total = torch.zeros(self.units, dtype=torch.float64)
        for member in self.members:
            scores = of(member).detach().double()
            others = [d for d in range(scores.dim()) if d != member.dimension]
            slices = scores.sum(dim=others) if others else scores
            belongs = member.units >= 0
            total.index_add_(0, member.units[belongs], slices[belongs])
        return total

    def __str__(self) -> str:
        kind = "heads" if self.is_heads else "units"
        return f"{self.name}: {self.units} {kind} of {self.channels_per_unit} channels"


@dataclass(frozen=True)
class Protected:
    """Channels of a layer that cannot be pruned.

    Attributes:
        name: as in `ChannelGroup`.
        reason: why, naming a node.
        channels: how many of the layer's channels.
    """

    name: str
    reason: str
    channels: int

    def __str__(self) -> str:
        return f"{self.name} keeps its {self.channels} channels: {self.reason}"


def find_groups(graph: Graph, *, heads: bool = False) -> tuple[list[ChannelGroup], list[Protected]]:
    """The groups of channels of a network, and the layers whose channels are protected.

    Protected is what reaches an input or an output of the network, an operator without a coupling
    rule, or one whose other results would change: layer norm and softmax over channels.

    Args:
        graph: the network, as traced or after any passes.
        heads: return the groups whose units are attention heads, instead of all others.
    """
    coupling, components = couple(graph)
    structure = Structure(
        {value.name: axes for value, axes in coupling.axes.items()},
        {value.name: value.types for value in graph.values},
        components,
    )
    catalogue = _Catalogue(graph, coupling, components)
    found: list[tuple[_Maker, Channels, tuple[Member, ...]]] = []
    protected: dict[tuple[str, str], int] = {}
    for alike in _alike(coupling, components):
        members, maker = catalogue.members(alike)
        if maker is None:
            continue
        reason = _why_not(coupling, components, alike, heads)
        if reason is not None:
            key = maker.name, reason
            protected[key] = protected.get(key, 0) + maker.count
        else:
            found.append((maker, alike, members))
    names = _distinct([maker for maker, _, _ in found])
    groups = [
        ChannelGroup(
            *(name, len(alike), maker.count // len(alike), members, heads),
            structure=structure,
            components=alike,
        )
        for name, (maker, alike, members) in zip(names, found, strict=True)
    ]
    return groups, [Protected(*key, channels) for key, channels in protected.items()]


def _why_not(
    coupling: Coupling, components: Components, alike: Channels, heads: bool
) -> str | None:
    """Why some components are no group that was asked for."""
    reason = int(components.reason[alike[0]])
    if reason >= 0:
        return coupling.reasons[reason]
    if len(alike) < 2:
        return "all of them go together"
    is_heads = bool(components.heads[alike].any())
    if is_heads != heads:
        return "they are attention heads" if is_heads else "they are no attention heads"
    return None


def _alike(coupling: Coupling, components: Components) -> Iterator[Channels]:
    """The components, sorted into those that have equally many channels in every axis: if one of
    each sort stays, no axis of any value becomes empty."""
    sort = components.reason + 1
    last, seen = int(sort.max(initial=0)), set()
    for axes in coupling.axes.values():
        for axis in axes:
            if axis.is_fixed or id(axis.channels) in seen:
                continue
            seen.add(id(axis.channels))
            channels = axis.channels[axis.channels >= 0]
            found, times = np.unique(components.component[channels], return_counts=True)
            pairs = sort[found] * (times.max() + 1) + times
            _, renumbered = np.unique(pairs, return_inverse=True)
            sort[found] = last + 1 + renumbered
            last += int(renumbered.max()) + 1
    roots = np.flatnonzero(components.component == np.arange(len(sort)))
    order = np.argsort(sort[roots], kind="stable")
    bounds = np.flatnonzero(np.diff(sort[roots][order])) + 1
    parts = [part for part in np.split(roots[order], bounds) if len(part)]
    yield from sorted(parts, key=lambda alike: int(alike[0]))


@dataclass(frozen=True)
class _Maker:
    """The layer that makes channels.

    Attributes:
        name: its module path.
        place: in the graph.
        channels: which slices of its weight they are.
        count: how many of its channels.
    """

    name: str
    place: int
    channels: Channels
    count: int


class _Catalogue:
    """The constants' dimensions, by the components that they have channels of."""

    def __init__(self, graph: Graph, coupling: Coupling, components: Components) -> None:
        self._sources = coupling.sources
        self._starts = np.array([source.first for source in coupling.sources])
        self._order = np.argsort(components.component, kind="stable")
        self._sorted = components.component[self._order]
        self._places = {node: place for place, node in enumerate(graph.nodes)}

    def members(self, alike: Channels) -> tuple[tuple[Member, ...], _Maker | None]:
        """What belongs to some components as units, and the first layer that makes them."""
        starts = np.searchsorted(self._sorted, alike, "left")
        ends = np.searchsorted(self._sorted, alike, "right")
        channels = np.concatenate([self._order[a:b] for a, b in zip(starts, ends, strict=True)])
        units = np.repeat(np.arange(len(alike)), ends - starts)
        source_of = np.searchsorted(self._starts, channels, "right") - 1
        members, makers = [], []
        for number in np.unique(source_of):
            source, inside = self._sources[number], source_of == number
            slices = channels[inside] - source.first
            unit_of_slice = torch.full((source.size,), -1)
            unit_of_slice[torch.from_numpy(slices)] = torch.from_numpy(units[inside])
            made_by = [node for node, name in uses(source.constant) if _makes(node, name, source)]
            members.append(
                Member(
                    *(source.constant, source.dimension, unit_of_slice),
                    *(tuple(uses(source.constant)), bool(made_by)),
                )
            )
            makers += [self._maker(node, np.sort(slices)) for node in made_by]
        return tuple(members), min(makers, key=lambda maker: maker.place, default=None)

    def _maker(self, node: Node, slices: Channels) -> _Maker:
        in_each_group = node["groups"] if is_transposed(node) else 1  # a slice is a channel of each
        path = node.origin.module or node.name
        return _Maker(path, self._places[node], slices, len(slices) * in_each_group)


def uses(constant: Value) -> Iterator[tuple[Node, str]]:
    """Who uses a constant as which operand, also through what only scales it."""
    for user in constant.users:
        for name, operand in user.operands.items():
            if operand is constant or (isinstance(operand, list) and constant in operand):
                yield user, name
                if _SCALED.get(user.op) == name:
                    yield from uses(user.output)


_SCALED = {"graphopt.dequantize": "x", "aten._weight_norm": "v"}
_OUTPUT_DIMENSIONS = {
    **dict.fromkeys(CONVOLUTIONS, ("weight", 0)),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, ("weight", 1)),
    LINEAR: ("weight", 0),
    "aten.embedding": ("weight", 1),
    "aten.addmm": ("mat2", 1),
    "aten.mm": ("mat2", 1),
    "aten.matmul": ("other", 1),
}


def _makes(node: Node, operand: str, source: Source) -> bool:
    if node.op == EINSUM:
        return _makes_label(node, source)
    if node.op == "aten.convolution":
        return (operand, source.dimension) == ("weight", int(node["transposed"]))
    return _OUTPUT_DIMENSIONS.get(node.op) == (operand, source.dimension)


def _makes_label(node: Node, source: Source) -> bool:
    """Whether a constant's dimension becomes one of the result that no other operand has."""
    operands, result = einsum_labels(node)
    for value, labels in zip(node["tensors"], operands, strict=True):
        producer = value.producer
        scaled = producer is not None and producer.op in _SCALED
        origin = producer[_SCALED[producer.op]] if producer is not None and scaled else value
        if origin is source.constant:
            label = labels[source.dimension]
            return label in result and sum(label in own for own in operands) == 1
    return False


def _distinct(makers: list[_Maker]) -> list[str]:
    """Names of groups; where a layer makes several, with the range of its channels."""
    count = Counter(maker.name for maker in makers)
    names = [
        f"{m.name}[{m.channels[0]}:{m.channels[-1] + 1}]" if count[m.name] > 1 else m.name
        for m in makers
    ]
    taken: Counter[str] = Counter()
    for place, name in enumerate(names):
        taken[name] += 1
        if taken[name] > 1:
            names[place] = f"{name} ({taken[name]})"
    return names
