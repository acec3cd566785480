"""Sources that do not compute in float32 on the CPU are given a form that does."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import Error
from graphopt.tracing import evaluation_mode

_HALF = (torch.float16, torch.bfloat16)


def cpu_source(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy on the CPU with the model's arguments and results.

    A model on another device is copied, with a warning. A float16 or bfloat16 model is copied to
    float32 behind casts, since CPUs compute faster in it and no less exactly.
    """
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    devices = {tensor.device.type for tensor in tensors} - {"cpu"}
    if "meta" in devices:
        raise Error("the model has meta tensors, which hold no values; load its weights first")
    if devices:
        warnings.warn(
            f"{type(model).__name__} is on {', '.join(sorted(devices))}; a copy on the CPU is "
            "optimized",
            stacklevel=3,
        )
        model = copy.deepcopy(model).cpu()
    if any(tensor.dtype in _HALF for tensor in tensors):
        return _in_float32(model)
    return model


def observe(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a trace for such arguments, learn which dtypes the original returns for them."""
    results = _results.get(model)
    if results is not None:
        results.observe(args, kwargs)


class _CastResults:
    """A forward hook that gives float32 results the dtypes of the half-precision original."""

    def __init__(self, original: nn.Module) -> None:
        self.original = original
        self.dtypes: list[torch.dtype | None] = []

    def observe(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        with evaluation_mode(self.original), torch.no_grad():
            leaves = pytree.tree_leaves(self.original(*args, **kwargs))
        self.dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        leaves, spec = pytree.tree_flatten(result)
        cast = [
            leaf if dtype is None else leaf.to(dtype)
            for leaf, dtype in zip(leaves, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(cast, spec)


# Copies made here, with the hook that knows their originals.
_results: WeakKeyDictionary[nn.Module, _CastResults] = WeakKeyDictionary()


def _in_float32(model: nn.Module) -> nn.Module:
    """A float32 copy behind casts, with the names and the signature of the original."""
    duplicate = copy.deepcopy(model).float()
    duplicate.register_forward_pre_hook(_cast_arguments, with_kwargs=True)
    _results[duplicate] = _CastResults(model)
    duplicate.register_forward_hook(_results[duplicate])
    return duplicate


def _cast_arguments(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32) if tensor.dtype in _HALF else tensor

    return pytree.tree_map_only(Tensor, cast, (args, kwargs))
