"""`OptimizedModel`: what `graphopt.optimize` returns."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt import precision, tracing
from graphopt.engine import Plan, compile_graph, default_threads
from graphopt.errors import Error, GraphError, TraceError
from graphopt.ir import TENSOR, Graph, Interface, TensorType
from graphopt.ir import sizes as free_sizes
from graphopt.ir.interface import same_leaves

if TYPE_CHECKING:
    from graphopt.comparison import Comparison
    from graphopt.onnx import Exported
    from graphopt.pass_report import PassReport
    from graphopt.report import Benchmark, Report

PLANS_PER_TRACE = 16
TRACES = 8

Prepare = Callable[[Graph], tuple["PassReport", ...]]
"""Changes a fresh trace in place, and returns what its passes told."""


@dataclass
class Traced:
    """One trace of the source: its graph before and after the passes, what these told, and plans
    by sizes."""

    source: Graph
    graph: Graph
    versions: list[tuple[str, torch.Tensor, int]]
    reports: tuple[PassReport, ...] = ()
    plans: OrderedDict[tuple[tuple[str, int], ...], Plan] = field(default_factory=OrderedDict)

    def sizes(self, tensors: Sequence[torch.Tensor]) -> dict[str, int] | None:
        """The free sizes that the tensors stand for; None if the trace was made for others."""
        for value, tensor in zip(self.graph.inputs, tensors, strict=True):
            kind = value.type
            if not isinstance(kind, TensorType):
                return None
            if tensor.dtype != kind.dtype or tensor.dim() != kind.rank:
                return None
            for dimension, size in enumerate(kind.shape):
                if dimension not in value.free and tensor.shape[dimension] != size:
                    return None
        expressions = [value.free for value in self.graph.inputs]
        try:
            sizes = free_sizes.bind([t.shape for t in tensors], expressions, self.graph.sizes)
        except GraphError:
            return None
        return None if free_sizes.violated(self.graph.guards, sizes) else sizes

    def check_unchanged(self) -> None:
        """Raise TraceError if a tensor of the source was written to since it was traced."""
        for name, tensor, version in self.versions:
            if _content_version(tensor) != version:
                raise TraceError(
                    f"'{name}' of the source model was changed after the model was traced; call "
                    "graphopt.optimize again"
                )


class OptimizedModel(nn.Module):
    """A model for inference that is called like its source and returns the same structure.

    Calls are reentrant. Results own their memory and carry no gradient. Arguments of another
    structure, dtype, rank or fixed size trace the source again. It pickles and deep-copies as
    graph and options, without the source.

    Made by `graphopt.optimize`, not directly.
    """

    def __init__(
        self,
        source: nn.Module | None,
        prepare: Prepare,
        *,
        dynamic: tracing.Dynamic | None,
        threads: int | None,
        pipeline: Sequence[str] = (),
    ) -> None:
        super().__init__()
        super().train(False)
        # A list keeps the source out of the module tree: its parameters are not ours.
        self._source = [] if source is None else [source]
        self._prepare = prepare
        self._dynamic = dynamic
        self.threads = threads or default_threads()
        self._pipeline = tuple(pipeline)
        self._traces: list[Traced] = []
        self._parameters_of_call = () if source is None else tracing.positional_parameters(source)
        self._lock = threading.RLock()
        self._direct: dict[tuple[torch.Size, torch.dtype], Callable[..., Any]] = {}

    # -- calling ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; arguments and result are the source model's."""
        if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
            x = args[0]
            run = self._direct.get((x.shape, x.dtype))
            if run is not None and x.device.type == "cpu":
                return run(x)
        args, kwargs = Interface.canonical(self._parameters_of_call, args, kwargs)
        tensors, leaves, spec = Interface.flatten(args, kwargs)
        _check_device(tensors)
        traced, sizes = self._trace_for(args, kwargs, tensors, leaves, spec)
        plan = self._plan(traced, sizes)
        result = _Call(plan, traced.graph)
        if len(args) == 1 and not kwargs and leaves == (TENSOR,) and type(args[0]) is torch.Tensor:
            if len(self._direct) >= PLANS_PER_TRACE:
                self._direct.clear()
            self._direct[args[0].shape, args[0].dtype] = result.fast()
        return result(*tensors)

    def _trace_for(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        leaves: tuple[Any, ...],
        spec: pytree.TreeSpec,
    ) -> tuple[Traced, dict[str, int]]:
        with self._lock:
            for traced in self._traces:
                interface = traced.graph.interface
                assert interface is not None
                if interface.in_spec == spec and same_leaves(interface.leaves, leaves):
                    sizes = traced.sizes(tensors)
                    if sizes is not None:
                        return traced, sizes
            traced = self.trace((args, kwargs))
            sizes = traced.sizes(tensors)
            if sizes is None:
                raise TraceError("a fresh trace does not fit the arguments it was made with")
            return traced, sizes

    def trace(self, example_inputs: Any) -> Traced:
        """Trace the source for example inputs and run the passes."""
        if not self._source:
            shapes = "; ".join(
                ", ".join(f"%{v.name}: {v.type}" for v in traced.graph.inputs)
                for traced in self._traces
            )
            raise TraceError(
                "the arguments differ from those the model was traced for in structure, dtype or "
                f"a fixed size ({shapes}), and a model that was pickled or copied has no source to"
                " trace again; optimize the source model with `dynamic` for the sizes that vary"
            )
        with self._lock:
            for traced in self._traces:
                traced.check_unchanged()
            precision.observe(self._source[0], *tracing.split_arguments(example_inputs))
            source = tracing.trace(self._source[0], example_inputs, self._dynamic)
            versions = [
                (value.name, value.constant, _content_version(value.constant))
                for value in source.constants
                if value.constant is not None
            ]
            graph = source.clone()
            reports = self._prepare(graph)
            traced = Traced(source, graph, versions, reports)
            self._traces.insert(0, traced)
            del self._traces[TRACES:]
            return traced

    def _plan(self, traced: Traced, sizes: dict[str, int]) -> Plan:
        key = tuple(sorted(sizes.items()))
        with self._lock:
            plan = traced.plans.get(key)
            if plan is None:
                traced.check_unchanged()
                known = next(reversed(traced.plans.values()), None)
                plan = compile_graph(traced.graph, sizes, threads=self.threads, like=known)
                traced.plans[key] = plan
                if len(traced.plans) > PLANS_PER_TRACE:
                    traced.plans.popitem(last=False)
            else:
                traced.plans.move_to_end(key)
            return plan

    # -- inspecting ------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The optimized graph of the latest trace. Raises TraceError before the first call."""
        return self._latest().graph

    @property
    def source_graph(self) -> Graph:
        """The graph of the latest trace as it was before the passes."""
        return self._latest().source

    def _latest(self) -> Traced:
        if not self._traces:
            raise TraceError(
                "the model has not been traced yet: call it once, or pass example_inputs to "
                "graphopt.optimize"
            )
        return self._traces[0]

    def report(self) -> Report:
        """Layers with parameters, multiply-adds, kernels and measured times, and what passes told;
        prints as tables."""
        from graphopt.report import build_report

        traced = self._latest()
        plan = self._plan(traced, traced.graph.sizes)
        return build_report(traced.source, traced.graph, plan, traced.reports)

    def benchmark(self, inputs: Any, *, repeats: int = 20) -> Benchmark:
        """Time this model against its eager source, interleaved, on the given inputs.

        Args:
            inputs: in the form of ``example_inputs``.
            repeats: how many times each is called.
        """
        from graphopt.report import benchmark

        args, kwargs = tracing.split_arguments(inputs)
        source = self._need_source("benchmark")
        with tracing.evaluation_mode(source), torch.no_grad():
            return benchmark(
                {
                    "source": lambda: source(*args, **kwargs),
                    "graphopt": lambda: self(*args, **kwargs),
                },
                repeats=repeats,
            )

    def compare(self, inputs: Any) -> Comparison:
        """The error against the source, and the first layer where the two part.

        Args:
            inputs: in the form of ``example_inputs``.
        """
        from graphopt.comparison import compare

        args, kwargs = tracing.split_arguments(inputs)
        source = self._need_source("compare")
        result = self(*args, **kwargs)
        args, kwargs = Interface.canonical(self._parameters_of_call, args, kwargs)
        tensors, leaves, spec = Interface.flatten(args, kwargs)
        traced, _ = self._trace_for(args, kwargs, tensors, leaves, spec)
        traced.check_unchanged()
        with tracing.evaluation_mode(source), torch.no_grad():
            expected = source(*args, **kwargs)
        return compare(
            traced.source,
            traced.graph,
            tensors,
            pytree.tree_leaves(expected),
            pytree.tree_leaves(result),
        )

    def export_onnx(self, path: Any, *, opset: int = 18, verify: bool = True) -> Exported:
        """Write the optimized graph as ONNX; see `graphopt.onnx.export_onnx`."""
        from graphopt.onnx import export_onnx

        traced = self._latest()
        traced.check_unchanged()
        return export_onnx(traced.graph, path, opset=opset, verify=verify, pipeline=self._pipeline)

    def _need_source(self, what: str) -> nn.Module:
        if not self._source:
            raise Error(f"{what} needs the source model, which a pickled or copied model lacks")
        return self._source[0]

    # -- being a module --------------------------------------------------------------------

    def train(self, mode: bool = True) -> OptimizedModel:
        """Only ``train(False)``; the optimized model has no gradients."""
        if mode:
            raise Error(
                "an optimized model cannot be trained; train `opt.graph.to_torch()`, or the source"
                " and optimize it again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        for dtype in (torch.float32, torch.int64):
            probe = torch.empty(0, dtype=dtype)
            moved = fn(probe)
            if moved.device != probe.device or moved.dtype != probe.dtype:
                raise Error(
                    f"an optimized model runs on the CPU in its own dtypes and cannot be moved to "
                    f"{moved.device}, {moved.dtype}; move or convert the source model instead and "
                    "optimize that"
                )
        return self

    def __getstate__(self) -> dict[str, Any]:
        traces = [(traced.source, traced.graph, traced.reports) for traced in self._traces]
        if not traces:
            raise Error("the model has not been traced yet; call it once before it is copied")
        return {
            "traces": traces,
            "dynamic": self._dynamic,
            "threads": self.threads,
            "pipeline": self._pipeline,
            "parameters": self._parameters_of_call,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            None,
            _no_source,
            dynamic=state["dynamic"],
            threads=state["threads"],
            pipeline=state["pipeline"],
        )
        self._parameters_of_call = state["parameters"]
        self._traces = [Traced(source, graph, [], told) for source, graph, told in state["traces"]]

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        copy = OptimizedModel.__new__(OptimizedModel)
        state = self.__getstate__()
        state["traces"] = [
            (source.clone(), graph.clone(), told) for source, graph, told in state["traces"]
        ]
        copy.__setstate__(state)
        return copy

    def extra_repr(self) -> str:
        traced = f"{len(self._traces[0].graph)} nodes" if self._traces else "not traced yet"
        return f"{traced}, threads={self.threads}"


class _Call:
    """A plan with the structure of the model's results."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self._plan = plan
        interface = graph.interface
        assert interface is not None
        self._spec = interface.out_spec
        self._literals = plan.literals
        self._computed = plan.is_computed

    def __call__(self, *tensors: torch.Tensor) -> Any:
        results = iter(self._plan.run(*tensors))
        leaves = [
            next(results) if computed else literal
            for computed, literal in zip(self._computed, self._literals, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._spec)

    def fast(self) -> Callable[..., Any]:
        """The shortest way for one tensor in; one out needs no structure."""
        if self._spec.is_leaf() and self._computed == (True,):
            program = self._plan.run

            def single(x: torch.Tensor) -> torch.Tensor:
                return program(x)[0]

            return single
        return self


def _content_version(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor is written to."""
    if not tensor.is_inference():
        return tensor._version
    # Tensors made in inference mode count no versions.
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _no_source(graph: Graph) -> NoReturn:
    raise AssertionError("a model without its source prepares no graph")


def _check_device(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise Error(
                f"an optimized model runs on the CPU, got a tensor on {tensor.device}; call it "
                "with x.cpu()"
            )
