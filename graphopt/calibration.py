"""Calibration data: batches of a user's data as inputs of a graph, and what flows through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graphopt import reference
from graphopt.errors import PassError, TraceError
from graphopt.ir import Graph, Interface, TensorType, Value
from graphopt.tracing import split_arguments

if TYPE_CHECKING:
    from graphopt.pipeline import Context

Observer = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data.

    Attributes:
        inputs: one tensor per input of the graph.
        target: what the data gives beside the model's inputs, such as labels; None if nothing.
    """

    inputs: list[torch.Tensor]
    target: Any = None


class CalibrationData:
    """A user's data, read batch by batch and never kept.

    A batch has the form of ``example_inputs``: a tensor, a tuple of positional arguments, a dict
    of keyword arguments, or a (tuple, dict) of both. A tuple or list with one element more than
    the model has positional arguments, as a data loader with labels gives it, has a target last;
    a dict may hold one under ``labels`` or ``target``. Inputs may have other batch sizes than the
    trace, and are converted to its floating dtypes.

    Args:
        data: an iterable of batches. It is read anew in every sweep, so a list or a data loader
            serves for methods of several sweeps, a generator only for one.
        limit: read only the first so many batches.
    """

    def __init__(self, data: Iterable[Any], limit: int | None = None) -> None:
        if isinstance(data, (torch.Tensor, Mapping)) or not isinstance(data, Iterable):
            raise PassError(
                f"calibration data is an iterable of batches, not a {type(data).__name__}; put a "
                "single batch into a list"
            )
        self._data = data
        self._limit = limit
        self._swept = False

    def __len__(self) -> int:
        """How many batches a sweep has. Raises TypeError where the data does not tell."""
        if not isinstance(self._data, Sized):
            raise TypeError(f"a {type(self._data).__name__} does not tell how many batches it has")
        count = len(self._data)
        return count if self._limit is None else min(count, self._limit)

    def batches(
        self, graph: Graph, ctx: Context | None = None, description: str = "calibration"
    ) -> Iterator[Batch]:
        """One sweep over the data.

        Args:
            graph: whose inputs the batches are to be.
            ctx: shows the progress, if it shows any.
            description: what the progress bar is called.

        Raises:
            PassError: a batch does not fit the graph, there is none, or a generator is used up.
        """
        if self._swept and iter(self._data) is self._data:
            raise PassError(
                "the calibration data is a generator and was read already, but the method reads it "
                "several times; give a list or a DataLoader"
            )
        self._swept = True
        given: Iterable[Any] = islice(self._data, self._limit)
        if ctx is not None:
            total = len(self) if isinstance(self._data, Sized) else self._limit
            given = ctx.track(given, description, total)
        empty = True
        for number, batch in enumerate(given):
            empty = False
            yield bind(graph, batch, number)
        if empty:
            raise PassError("the calibration data has no batches")


def bind(graph: Graph, batch: Any, number: int = 0) -> Batch:
    """A batch of a user's data as inputs of a graph, and its target; see `CalibrationData`.

    Args:
        graph: whose inputs they are to be.
        batch: in one of the forms of ``example_inputs``, with a target or without.
        number: of the batch, for messages.

    Raises:
        PassError: it does not fit.
    """
    args, kwargs, target = _arguments(graph, batch)
    interface = graph.interface
    try:
        if interface is None:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        else:
            tensors = interface.tensors(args, kwargs)
    except TraceError as error:
        raise PassError(f"batch {number} of the calibration data: {error}") from error
    if len(tensors) != len(graph.inputs):
        raise PassError(
            f"batch {number} of the calibration data has {len(tensors)} tensors, the graph "
            f"{len(graph.inputs)} inputs"
        )
    inputs = [
        _fitting(value, tensor, number) for value, tensor in zip(graph.inputs, tensors, strict=True)
    ]
    return Batch(inputs, target)


def observe(
    graph: Graph,
    data: CalibrationData,
    observers: Iterable[tuple[Value, Observer]],
    ctx: Context | None = None,
    description: str = "calibration",
) -> None:
    """Show the values of a graph to observers, batch by batch, in one sweep.

    Args:
        graph: computed in its own dtypes, by torch.
        data: what flows through it.
        observers: values, and what is called with the tensor of each, which it must not keep;
            a value may have several.
        ctx: shows the progress.
        description: what the progress bar is called.
    """
    by_value: dict[Value, list[Observer]] = {}
    for value, observer in observers:
        by_value.setdefault(value, []).append(observer)

    def show(values: Sequence[Value], tensors: Sequence[Any]) -> None:
        for value, tensor in zip(values, tensors, strict=True):
            for observer in by_value.get(value, ()):
                observer(tensor)

    for batch in data.batches(graph, ctx, description):
        show(graph.inputs, batch.inputs)
        reference.run(
            graph, batch.inputs, observe=lambda node, results: show(node.outputs, results)
        )


def _arguments(graph: Graph, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments of the model, and the target."""
    interface = graph.interface
    if interface is None:
        positional, names = len(graph.inputs), frozenset[str]()
    else:
        args, kwargs = pytree.tree_unflatten(list(interface.leaves), interface.in_spec)
        positional = len(args)
        names = frozenset(interface.parameters[:positional]) | kwargs.keys()
    target = None
    if isinstance(batch, list):
        batch = tuple(batch)
    if isinstance(batch, tuple) and len(batch) == positional + 1 and not _is_call(batch):
        *given, target = batch
        batch = tuple(given)
        if len(batch) == 1 and isinstance(batch[0], (dict, tuple)):
            batch = batch[0]
    elif isinstance(batch, Mapping):
        batch = dict(batch)
        for name in ("labels", "target"):
            if name in batch and name not in names:
                target = batch.pop(name)
    args, kwargs = split_arguments(batch)
    if interface is not None:
        args, kwargs = Interface.canonical(interface.parameters, args, kwargs)
    return args, kwargs, target


def _is_call(batch: tuple[Any, ...]) -> bool:
    """Whether a pair is (positional arguments, keyword arguments)."""
    return len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _fitting(value: Value, tensor: torch.Tensor, number: int) -> torch.Tensor:
    kind = value.type
    assert isinstance(kind, TensorType)
    wrong = tensor.dim() != kind.rank or any(
        given != size
        for place, (given, size) in enumerate(zip(tensor.shape, kind.shape, strict=True))
        if place not in value.free
    )
    floating = kind.dtype.is_floating_point
    if wrong or tensor.is_floating_point() != floating:
        raise PassError(
            f"batch {number} of the calibration data gives the input %{value.name} "
            f"{TensorType.of(tensor)}; the graph was traced for {kind}, with free dimensions "
            f"{sorted(value.free)}"
        )
    return tensor.detach().to("cpu", kind.dtype)
