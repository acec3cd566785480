"""`export_onnx`: torch's exporter on the graph's torch form, then clean-up, checks, comparison."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
import torch.fx.experimental._config as symbolic_config
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from graphopt.errors import ExportError
from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.onnx import cleanup, naming
from graphopt.onnx.lowering import lower
from graphopt.onnx.translation import HIGHEST_OPSET, translations
from graphopt.onnx.verification import Verdict, compare_with_onnxruntime

LOWEST_OPSET = 18
"""What torch's exporter writes without converting versions."""

EXTERNAL_BYTES = 2**31 - 2**26
"""Weights of more than this go to a file beside the model: a protobuf holds 2 GiB at most."""


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        path: the file.
        opset: version of the operator set.
        ir_version: version of the file format.
        nodes: number of operators.
        verdict: comparison with onnxruntime; None where it was not asked for.
    """

    path: Path
    opset: int
    ir_version: int
    nodes: int
    verdict: Verdict | None

    def __str__(self) -> str:
        text = f"{self.path}: opset {self.opset}, IR version {self.ir_version}, {self.nodes} nodes"
        return f"{text}; {self.verdict}" if self.verdict else text


def export_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    opset: int = LOWEST_OPSET,
    verify: bool = True,
    example_inputs: Sequence[torch.Tensor] | None = None,
    pipeline: Sequence[str] = (),
    external_data: bool | None = None,
    verbose: bool = False,
) -> Exported:
    """Write a graph as an ONNX file, all of it or none.

    Inputs and outputs carry the model's names, free sizes are symbolic dimensions, and nodes are
    named after the modules they come from.

    Args:
        graph: what to export; it is not changed.
        path: where to write; an existing file is replaced.
        opset: version of ONNX's operator set, from 18 on.
        verify: run the file in onnxruntime, at the example's sizes and at a second assignment of
            the free sizes, and compare with torch in float64.
        example_inputs: tensors to compare with at the example's sizes; by default random ones.
        pipeline: names of the passes that made the graph, for the file's metadata.
        external_data: whether weights go to ``<path>.data``; by default where they exceed what a
            single file can hold.
        verbose: let torch's exporter print what it does.

    Raises:
        ExportError: an operator has no ONNX form (the module is named), the file is not valid, or
            its results are further from float64 than the stated bound.
    """
    path = Path(path)
    _check_arguments(graph, path, opset)
    with contextlib.nullcontext() if verbose else _quiet():
        model, sources = _translate(graph, opset, verbose)
        cleanup.clean(model)
    naming.apply(model, graph, sources)
    version = metadata.version("graphopt")
    model.producer_name, model.producer_version = "graphopt", version
    model.metadata_props["graphopt.version"] = version
    model.metadata_props["graphopt.pipeline"] = ", ".join(pipeline)
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    )
    external_data = _needs_external_data(model, external_data)
    with _replacing(path) as draft:
        data = f"{path.name}.data" if external_data else None
        onnx_ir.save(model, draft, external_data=data)
        _check_file(draft)
        verdict = compare_with_onnxruntime(graph, draft, example_inputs) if verify else None
    return Exported(path, opset, model.ir_version, len(model.graph), verdict)


def _check_arguments(graph: Graph, path: Path, opset: int) -> None:
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise ExportError(
            f"opset {opset} cannot be written; choose one of {LOWEST_OPSET} to {HIGHEST_OPSET}"
        )
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written: there is no directory {path.parent}")
    if not any(isinstance(output, Value) for output in graph.outputs):
        raise ExportError("the graph returns no tensor, and an ONNX file must have an output")
    for value in graph.inputs:
        if not value.is_tensor:
            raise ExportError(f"the input %{value.name} is a number; ONNX inputs are tensors")


class _Step(nn.Module):
    """One operator as a module, whose name torch's exporter notes for what becomes of it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _translate(graph: Graph, opset: int, verbose: bool) -> tuple[onnx_ir.Model, dict[str, Node]]:
    """The ONNX model, and the graph's nodes by the scope names in the model's metadata."""
    lowered = graph.clone()
    lowered.interface = None
    lower(lowered)
    module, sources = _stepwise(lowered)
    try:
        program = _export_program(lowered, module)
        exported = torch.onnx.export(
            program,
            opset_version=opset,
            dynamo=True,
            custom_translation_table=translations(opset),
            verbose=verbose,
            optimize=False,
        )
    except Exception as error:
        raise _explain(error, sources) from error
    assert exported is not None
    return exported.model, sources


def _stepwise(graph: Graph) -> tuple[fx.GraphModule, dict[str, Node]]:
    """The graph's torch form with tensors for outputs and every operator in a module."""
    module = graph.to_torch().requires_grad_(False)
    following = iter(graph.nodes)
    sources: dict[str, Node] = {}
    for index, step in enumerate(module.graph.nodes):
        if step.op == "call_function" and step.target is not operator.getitem:
            name = f"step_{index}"
            sources[name] = next(following)
            module.add_module(name, _Step(step.target))
            step.op, step.target = "call_module", name
        elif step.op == "output":
            step.args = (tuple(r for r in step.args[0] if isinstance(r, fx.Node)),)
    module.recompile()
    return module, sources


def _export_program(graph: Graph, module: fx.GraphModule) -> ExportedProgram:
    """torch.export of the module, with free sizes away from the special 0 and 1."""
    inputs, shapes = [], []
    for value in graph.inputs:
        kind = value.types[-1]
        assert isinstance(kind, TensorType)
        inputs.append(torch.zeros(kind.shape, dtype=kind.dtype))
        shapes.append({dimension: Dim.AUTO for dimension in value.free} or None)
    with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            module, tuple(inputs), dynamic_shapes=tuple(shapes), strict=False
        )


def _explain(error: Exception, sources: dict[str, Node]) -> ExportError:
    """The error of an exporter, with the module and operator it stopped at.

    torch names only nodes of its own making in its messages, but the node itself is in the frames
    that the error went through.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    reason = str(causes[-1]).strip().split("\n")[0] or type(causes[-1]).__name__
    for cause in reversed(causes):
        trace = cause.__traceback__
        while trace is not None:
            for local in list(trace.tb_frame.f_locals.values()):
                node = sources.get(_step_name(local)) if isinstance(local, fx.Node) else None
                if node is not None:
                    return ExportError(f"{naming.describe(node)} cannot be exported: {reason}")
            trace = trace.tb_next
    return ExportError(f"torch's exporter failed: {reason}")


def _step_name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _needs_external_data(model: onnx_ir.Model, wanted: bool | None) -> bool:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if wanted is False and size > EXTERNAL_BYTES:
        raise ExportError(
            f"{size / 1e9:.1f} GB of weights do not fit into one file; leave external_data out"
        )
    return size > EXTERNAL_BYTES if wanted is None else wanted


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own beside the target; what was written there
    takes the target's place at the end, unless an error came before."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        draft = folder / path.name
        yield draft
        # The weights come first, so that a model never stands there without them.
        for file in sorted(folder.iterdir(), key=lambda file: file == draft):
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model does not pass ONNX's own check: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of torch's exporter."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
