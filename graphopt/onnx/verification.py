"""Runs an exported file in onnxruntime and compares it with torch in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch

from graphopt import reference
from graphopt.errors import ExportError
from graphopt.ir import Graph, Node, TensorType, Value

FACTOR = 8.0
"""How many times torch's own float32 error onnxruntime may have."""

FLOOR = 1e-5
"""The relative error that is always allowed."""

QUANTIZED_FLOOR = 0.05
"""The same where the graph quantizes: a rounding the other way is a whole step of a value."""

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Verdict:
    """Errors against torch in float64, each relative to the output's largest magnitude.

    Attributes:
        error: onnxruntime's, the largest of all outputs and sizes.
        allowed: the bound that it was held to.
        runs: how many assignments of the free sizes were run.
    """

    error: float
    allowed: float
    runs: int

    def __str__(self) -> str:
        return (
            f"largest error in onnxruntime {self.error:.2g} of the output's largest magnitude "
            f"(allowed: {self.allowed:.2g})"
        )


def compare_with_onnxruntime(
    graph: Graph, path: os.PathLike[str], example_inputs: Sequence[torch.Tensor] | None = None
) -> Verdict:
    """Run a file and the graph it was made from on the same inputs.

    The error may be `FACTOR` times that of torch in float32, or `FLOOR`; where the graph quantizes,
    `QUANTIZED_FLOOR`. Quantized operators are run as the file spells them, not fused, since fused
    integer kernels are approximations of some machines.

    Raises:
        ExportError: onnxruntime refuses the file, gives other shapes or dtypes, or errs more.
    """
    _refuse_random(graph)
    session = _session(path)
    errors: list[tuple[float, float]] = []
    for index, assignment in enumerate(graph.assignments):
        given = example_inputs if index == 0 else None
        tensors = random_inputs(graph, index) if given is None else list(given)
        errors += _errors(graph, session, tensors, f"with the sizes {assignment}")
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    if not error <= allowed:
        raise ExportError(
            f"the exported file errs by {error:.3g} of its output's largest magnitude in "
            f"onnxruntime, {allowed:.3g} is allowed; verify=False writes it nevertheless"
        )
    return Verdict(error, allowed, len(graph.assignments))


def random_inputs(graph: Graph, assignment: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """Inputs under one of the graph's assignments of free sizes: normal floats, and integers that
    are valid for the embeddings they index, else 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for value in graph.inputs:
        kind = value.types[assignment]
        assert isinstance(kind, TensorType)
        if kind.dtype.is_floating_point or kind.dtype.is_complex:
            tensors.append(torch.randn(kind.shape, generator=generator, dtype=torch.float32))
        else:
            tensors.append(torch.randint(0, _index_limit(value), kind.shape, generator=generator))
        tensors[-1] = tensors[-1].to(kind.dtype)
    return tensors


_PASSING_INDICES = {"aten.reshape", "aten.view", "aten.to.dtype", "aten.unsqueeze", "aten.expand"}


def _index_limit(value: Value) -> int:
    limits = []
    for user in value.users:
        if user.op == "aten.embedding" and user["indices"] is value:
            limits.append(user["weight"].shape[0])
        elif user.op in _PASSING_INDICES and user.outputs[0].users:
            limits.append(_index_limit(user.output))
    return min(limits, default=2)


def _refuse_random(graph: Graph) -> None:
    for node in graph.nodes:
        if _is_random(node):
            raise ExportError(
                f"%{node.name} ({node.op}) draws random numbers, so no two runs can be compared; "
                "export with verify=False"
            )


def _is_random(node: Node) -> bool:
    """Dropout outside of training, and attention without dropout, are random by tag only."""
    if not node.operator.is_random:
        return False
    switches = {"dropout_p", "train"} & {parameter.name for parameter in node.operator.parameters}
    return all(node[switch] for switch in switches)


def cpu_session(model: str | bytes, **settings: str) -> Any:
    """A file or a serialized model in onnxruntime, silent, with entries of its configuration."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _session(path: os.PathLike[str]) -> Any:
    try:
        return cpu_session(os.fspath(path), disable_quant_qdq="1")
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run the exported file: {_short(error)}; verify=False writes it "
            "nevertheless"
        ) from error


def _errors(
    graph: Graph, session: Any, tensors: Sequence[torch.Tensor], where: str
) -> list[tuple[float, float]]:
    """Per output, the error and what is allowed."""
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    feed = dict(zip(names, map(_to_onnxruntime, tensors), strict=True))
    try:
        results = [_to_torch(result) for result in session.run_with_ort_values(outputs, feed)]
    except Exception as error:
        raise ExportError(f"onnxruntime fails {where}: {_short(error)}") from error
    exact = _tensors(graph, reference.run(graph, tensors, dtype=torch.float64))
    single = _tensors(graph, reference.run(graph, tensors))
    floor = QUANTIZED_FLOOR if any(map(_quantizes, graph.nodes)) else FLOOR
    errors = []
    for name, result, true, ours in zip(outputs, results, exact, single, strict=True):
        if (result.shape, result.dtype) != (ours.shape, ours.dtype):
            raise ExportError(
                f"the output '{name}' is {TensorType.of(result)} in onnxruntime, and "
                f"{TensorType.of(ours)} in torch, {where}"
            )
        if true.is_floating_point():
            allowed = max(floor, FACTOR * relative_error(ours, true))
            errors.append((relative_error(result, true), allowed))
        else:
            same = torch.equal(result, true) or torch.equal(result, ours)
            errors.append((0.0 if same else math.inf, floor))
    return errors


def _to_onnxruntime(tensor: torch.Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
    bits = tensor.view(torch.uint16).numpy()
    kind = onnx.TensorProto.BFLOAT16
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)


def _to_torch(value: Any) -> torch.Tensor:
    if value.element_type() == onnx.TensorProto.BFLOAT16:  # which numpy has not
        return torch.from_dlpack(value)
    return torch.from_numpy(value.numpy())


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference over the largest finite magnitude; NaN and infinities must coincide."""
    if result.numel() == 0:
        return 0.0
    result = result.to(torch.float64)
    limit = torch.finfo(torch.float32).max
    finite = exact.abs() <= limit
    if not torch.equal(finite, result.abs() <= limit):
        return math.inf
    if not torch.equal(exact[~finite].sign().nan_to_num(), result[~finite].sign().nan_to_num()):
        return math.inf
    if not finite.any():
        return 0.0
    difference = (result[finite] - exact[finite]).abs().max().item()
    return difference / max(exact[finite].abs().max().item(), _TINY)


def _tensors(graph: Graph, outputs: Sequence[Any]) -> list[torch.Tensor]:
    """Results that the file has too; a size is a tensor there."""
    return [
        torch.as_tensor(result)
        for output, result in zip(graph.outputs, outputs, strict=True)
        if isinstance(output, Value)
    ]


def _quantizes(node: Node) -> bool:
    return node.op in ("graphopt.quantize", "graphopt.fake_quantize")


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
