"""How a model is called: the structure of its arguments and of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import TraceError


class _Tensor:
    """Stands for a tensor among the leaves of a call's arguments."""

    def __repr__(self) -> str:
        return "tensor"

    def __reduce__(self) -> str:
        return "TENSOR"  # unpickled as the one object of that name


TENSOR = _Tensor()


@dataclass(frozen=True)
class Interface:
    """The calling convention of a traced model.

    Attributes:
        in_spec: structure of ``(args, kwargs)``.
        leaves: per leaf of the arguments, `TENSOR`, or the Python value the trace was made with.
        out_spec: structure of the result.
        parameters: names of the model's positional parameters, as far as it has them.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    parameters: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # Structures are pickled as trees of numbers: torch's specifications warn when pickled.
        trees = [
            pytree.tree_unflatten([0] * spec.num_leaves, spec)
            for spec in (self.in_spec, self.out_spec)
        ]
        return _restore, (*trees, self.leaves, self.parameters)

    @staticmethod
    def canonical(
        parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with keyword arguments made positional where they follow on, the others
        sorted by name, so that one call has one structure however it is written."""
        args, kwargs = list(args), dict(kwargs)
        for name in parameters[len(args) :]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        return tuple(args), dict(sorted(kwargs.items()))

    @staticmethod
    def flatten(
        args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], tuple[Any, ...], pytree.TreeSpec]:
        """The tensors of a call, its leaves with `TENSOR` in their place, and its structure."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        marked = tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        return tensors, marked, spec

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs.

        Raises:
            TraceError: the structure, or an argument that is no tensor, differs from the trace.
        """
        tensors, leaves, spec = self.flatten(*self.canonical(self.parameters, args, kwargs))
        if spec != self.in_spec or not same_leaves(leaves, self.leaves):
            raise TraceError(
                "the model was traced for other arguments: traced for "
                f"{describe(self.leaves, self.in_spec)}, called with {describe(leaves, spec)}"
            )
        return tensors

    def argument_names(self) -> list[str]:
        """A name per argument: the model's own for positional ones, where it has them."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.in_spec)
        names = list(self.parameters[: len(args)])
        return names + [f"argument_{k}" for k in range(len(names), len(args))] + list(kwargs)

    def result(self, outputs: Sequence[Any]) -> Any:
        """The graph's flat outputs in the structure that the model returns."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def _restore(
    in_tree: Any, out_tree: Any, leaves: tuple[Any, ...], parameters: tuple[str, ...]
) -> Interface:
    specs = pytree.tree_structure(in_tree), pytree.tree_structure(out_tree)
    return Interface(specs[0], leaves, specs[1], parameters)


def same_leaves(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two calls have the same leaves: tensors in the same places, the same numbers."""
    return len(a) == len(b) and all(
        type(x) is type(y) and (x is y or x == y) for x, y in zip(a, b, strict=True)
    )


def describe(leaves: Sequence[Any], spec: pytree.TreeSpec) -> str:
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    parts = [repr(a) for a in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"({', '.join(parts)})"
