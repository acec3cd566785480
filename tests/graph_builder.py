"""Builds graphs out of random choices, keeping their values where numbers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt import reference
from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, TensorType, Value

LARGEST = 1e3  # values stay moderate, so that float32 results can be compared with float64
MARGIN = 1e-3  # and no decision (a comparison, a rounding, an argmax) hangs by less than this
MOST_OPERATORS = 30


class Unsuitable(Exception):
    """A step finds nothing it can be applied to, or its result is out of bounds."""


class Choices:
    """Decisions read from bytes; when they run out, and for zeros, the simplest is taken."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def byte(self) -> int:
        return next(self._data, 0)

    def pick(self, options: Sequence[Any]) -> Any:
        if not options:
            raise Unsuitable
        return options[self.byte() % len(options)]

    def recent(self, options: Sequence[Any]) -> Any:
        """One of the options, later ones more often, the last one for a zero."""
        if not options:
            raise Unsuitable
        byte = self.byte()
        return options[len(options) - 1 - byte * byte * len(options) // 65536]

    def often(self) -> bool:
        return self.byte() < 192

    def rarely(self) -> bool:
        return self.byte() >= 192


@dataclass
class Builder:
    """A graph under construction, with the float64 value of everything in it."""

    graph: Graph
    choices: Choices
    pool: list[Value] = field(default_factory=list)
    inputs: tuple[list[torch.Tensor], ...] = ()
    environments: list[dict[Value, Any]] = field(default_factory=list)
    native: dict[Value, Any] = field(default_factory=dict)  # in the graph's own dtypes

    # -- values ----------------------------------------------------------------------------

    def add_input(self, name: str, type: TensorType, free: Mapping[int, str]) -> None:
        value = self.graph.add_input(name, type, free)
        for k, tensors in enumerate(self.inputs):
            kind = value.types[k]
            assert isinstance(kind, TensorType)
            tensors.append(random_tensor(kind, seed=len(self.graph.inputs)))
            self.environments[k][value] = _doubled(tensors[-1])
        self.native[value] = self.inputs[0][-1]
        self.pool.append(value)

    def tensor(self, suits: Callable[[Value], bool] = lambda value: True) -> Value:
        """A floating tensor of the graph that suits; recent ones more often."""
        found = [v for v in self.pool if v.dtype.is_floating_point and suits(v)]
        value: Value = self.choices.recent(found)
        return value

    def of_dtype(self, dtype: torch.dtype) -> Value:
        value: Value = self.choices.recent([v for v in self.pool if v.dtype == dtype])
        return value

    def constant(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        positive: bool = False,
        name: str = "constant",
    ) -> Value:
        """A random constant: normal times a scale, or between 0.5 and 1.5."""
        kind = TensorType(dtype, tuple(shape))
        tensor = random_tensor(kind, seed=100 + len(self.graph.values) + self.choices.byte() % 8)
        if dtype.is_floating_point:
            tensor = tensor.tanh() / 2 + 1 if positive else tensor * scale
        return self.known(tensor, name)

    def known(self, tensor: torch.Tensor, name: str = "constant") -> Value:
        """A constant with given elements."""
        value = self.graph.constant(tensor, name, trainable=name == "weight")
        for environment in self.environments:
            environment[value] = _doubled(tensor)
        self.native[value] = tensor
        return value

    def require_spread(self, value: Value, dimension: int) -> None:
        """Raises Unsuitable if values hardly differ along a dimension: a normalisation would
        then show nothing but rounding."""
        for environment in self.environments:
            tensor = environment[value]
            if tensor.numel() and float(tensor.std(dimension, correction=0).min()) < 0.05:
                raise Unsuitable

    def size(self, value: Value, dimension: int) -> int | Value:
        """The size of a dimension: a number if it is fixed, else the node that asks for it."""
        fixed = value.fixed_size(dimension)
        return self.apply("aten.sym_size.int", value, dimension) if fixed is None else fixed

    def sizes(self, value: Value) -> list[int | Value]:
        return [self.size(value, dimension) for dimension in range(value.rank)]

    # -- operators -------------------------------------------------------------------------

    def apply(self, op: str, /, *args: Any, **kwargs: Any) -> Value:
        """Add an operator with one result.

        Raises:
            Unsuitable: its result would be out of bounds, or a decision too close.
            GraphError: the operator refuses the operands.
        """
        return self.apply_all(op, *args, **kwargs)[0]

    def apply_all(self, op: str, /, *args: Any, **kwargs: Any) -> list[Value]:
        """Add an operator with any number of results."""
        if len(self.graph) >= MOST_OPERATORS:
            raise Unsuitable
        node = self.graph.add_node(op, *args, **kwargs)
        for environment in self.environments:
            _check_decisions(op, environment, node)
            _evaluate(node, environment, torch.float64)
        _evaluate(node, self.native, None)
        self.pool += [value for value in node.outputs if value.is_tensor]
        return list(node.outputs)

    def run(self, step: Callable[[Builder], object], data: bytes) -> bool:
        """Take one step; where it does not apply, the graph stays as it is."""
        self.choices = Choices(data)
        pool = list(self.pool)
        try:
            with self.graph.edit():
                step(self)
        except (Unsuitable, GraphError):
            self.pool = pool
            return False
        return True


def random_tensor(kind: TensorType, seed: int) -> torch.Tensor:
    """Normal within three deviations, indices below 5, or coin tosses."""
    generator = torch.Generator().manual_seed(seed * 1009 + sum(kind.shape))
    if kind.dtype == torch.bool:
        return torch.randint(0, 2, kind.shape, generator=generator).bool()
    if kind.dtype.is_floating_point:
        return torch.randn(kind.shape, generator=generator).clamp(-3, 3).to(kind.dtype)
    return torch.randint(0, 5, kind.shape, generator=generator).to(kind.dtype)


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _evaluate(node: Node, environment: dict[Value, Any], dtype: torch.dtype | None) -> None:
    """Raises Unsuitable where torch refuses what its fake tensors accept, and for large values."""
    try:
        results = reference.evaluate(node, environment, dtype)
    except (RuntimeError, IndexError) as error:
        raise Unsuitable from error
    flat = list(results) if isinstance(results, (list, tuple)) else [results]
    for value, result in zip(node.outputs, flat, strict=True):
        environment[value] = result
        if isinstance(result, torch.Tensor) and not _moderate(result):
            raise Unsuitable


def _moderate(tensor: torch.Tensor) -> bool:
    if tensor.numel() > 20_000:
        return False
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return True
    return bool(tensor.isfinite().all()) and float(tensor.abs().max()) <= LARGEST


def _check_decisions(op: str, environment: Mapping[Value, Any], node: Node) -> None:
    """Raises Unsuitable where rounding could decide the other way, or a division blow up."""
    base = op.split(".")[1]
    operands = [
        environment.get(v, v) if isinstance(v, Value) else v for v in node.operands.values()
    ]
    first = operands[0] if operands else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.numel() == 0:
        return
    margin = None
    if base in ("gt", "ge", "lt", "le", "eq", "ne"):
        margin = (first - operands[1]).abs()
    elif base in ("floor", "ceil", "trunc", "floor_divide", "remainder", "fmod"):
        ratio = first / operands[1] if len(operands) > 1 else first
        margin = (ratio - ratio.round()).abs()
    elif base == "round":
        margin = (first - first.floor() - 0.5).abs()
    elif base in ("sign", "to"):
        margin = first.abs() if base == "sign" or node["dtype"] == torch.bool else None
    elif base in ("div", "reciprocal"):
        divisor = operands[1] if base == "div" else first
        margin = torch.as_tensor(divisor).abs() * (MARGIN / 0.1)
    elif base in ("log", "sqrt", "rsqrt"):
        margin = first * (MARGIN / 0.1)
    elif base in ("argmax", "argmin", "max", "min", "topk", "sort") and first.dim():
        dimension = next((d for d in operands[1:] if isinstance(d, int)), -1)
        ordered = first.sort(dim=dimension).values
        margin = ordered.diff(dim=dimension)
    if margin is not None and margin.numel() and float(margin.min()) < MARGIN:
        raise Unsuitable
