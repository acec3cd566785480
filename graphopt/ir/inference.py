"""Types of operator results, by running the operator on fake tensors."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from graphopt.errors import GraphError
from graphopt.ir.operators import Operator
from graphopt.ir.types import ScalarType, TensorType, Type

_MEMO_LIMIT = 200_000

_memo: dict[Any, tuple[tuple[Type, ...], bool]] = {}
_lock = threading.RLock()
_torch_log = logging.getLogger("torch._subclasses.fake_tensor")


def flatten_results(result: Any) -> list[Any]:
    """The results of an operator as a flat list; lists of tensors are spliced in."""
    if isinstance(result, (list, tuple)):
        return [leaf for item in result for leaf in flatten_results(item)]
    return [] if result is None else [result]


def map_operand(operand: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of an operand: itself, or the items of its lists."""
    if isinstance(operand, (list, tuple)):
        return [map_operand(item, function) for item in operand]
    return function(operand)


def infer(operator: Operator, operands: Mapping[str, Any]) -> tuple[Type, ...]:
    """Types of an operator's results.

    Args:
        operator: what is applied.
        operands: by schema name; a `Type` stands for a value, anything else is a literal.

    Raises:
        GraphError: the operator refuses such operands, or its result's shape depends on data.
    """
    return _infer(operator, operands)[0]


def may_alias(operator: Operator, operands: Mapping[str, Any]) -> bool:
    """Whether a result shares memory with an operand, when all operands are contiguous."""
    return _infer(operator, operands)[1]


def _infer(operator: Operator, operands: Mapping[str, Any]) -> tuple[tuple[Type, ...], bool]:
    key = (operator.name, tuple((name, _key(operand)) for name, operand in operands.items()))
    with _lock:
        found = _memo.get(key)
        if found is None:
            if len(_memo) >= _MEMO_LIMIT:
                _memo.clear()
            found = _memo[key] = _run(operator, operands)
    return found


def _key(operand: Any) -> Any:
    if isinstance(operand, (list, tuple)):
        return tuple(_key(item) for item in operand)
    return (type(operand), operand)


def _run(operator: Operator, operands: Mapping[str, Any]) -> tuple[tuple[Type, ...], bool]:
    # A refusal is an answer here; torch logs each with a traceback.
    silent, _torch_log.disabled = _torch_log.disabled, True
    try:
        try:
            results, tensors = _call(operator, operands, "meta", nullcontext())
        except Exception:
            # Tensors without storage are several times faster than fake ones; what they cannot
            # do, and every refusal, is left to the fake ones to decide.
            results, tensors = _call(operator, operands, "cpu", _fake_mode())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise GraphError(
            f"{operator.name}: the result depends on the data of its operands, not only on their "
            "shapes; such an operator cannot be part of a graph"
        ) from error
    except Exception as error:
        described = ", ".join(f"{n}={_describe(o)}" for n, o in operands.items())
        reason = str(error).strip().split("\n")[0]
        raise GraphError(f"{operator.name}({described}) is not valid: {reason}") from error
    finally:
        _torch_log.disabled = silent
    types = tuple(_type_of(operator, result) for result in results)
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    aliases = any(
        isinstance(result, torch.Tensor) and result.untyped_storage()._cdata in storages
        for result in results
    )
    return types, aliases


@functools.cache
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def _call(
    operator: Operator,
    operands: Mapping[str, Any],
    device: str,
    mode: AbstractContextManager[Any],
) -> tuple[list[Any], list[torch.Tensor]]:
    """An operator's results on tensors that hold no data, and those tensors."""
    tensors: list[torch.Tensor] = []

    def to_tensor(leaf: Any) -> Any:
        if isinstance(leaf, TensorType):
            tensors.append(torch.empty(leaf.shape, dtype=leaf.dtype, device=device))
            return tensors[-1]
        return leaf.value if isinstance(leaf, ScalarType) else leaf

    with torch.no_grad(), mode:
        values = {name: map_operand(operand, to_tensor) for name, operand in operands.items()}
        return flatten_results(operator.call(values)), tensors


def _describe(operand: Any) -> str:
    if isinstance(operand, (list, tuple)):
        return f"[{', '.join(map(_describe, operand))}]"
    return str(operand)


def _type_of(operator: Operator, result: Any) -> Type:
    if isinstance(result, torch.Tensor):
        if result.layout != torch.strided or result.is_quantized:
            raise GraphError(f"{operator.name} returns a {result.layout} tensor; only dense works")
        return TensorType.of(result)
    if isinstance(result, (bool, int, float)):
        return ScalarType(result)
    raise GraphError(f"{operator.name} returns a {type(result).__name__}, which no graph can hold")
