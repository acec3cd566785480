"""What the tests of passes share: small graphs, and the checks that a pass kept or refused."""

from __future__ import annotations

import re
from typing import Any

import torch
from agreement import bound, largest_error
from random_graphs import check

from graphopt import reference
from graphopt.ir import Graph, TensorType, Value
from graphopt.ir.rewriting import Rule, closest_miss
from graphopt.pipeline import Pipeline


class Net:
    """A graph under construction with one input `x`, whose dimension 0 is free."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> None:
        self.graph = Graph({"batch": batch})
        kind = TensorType(dtype, (batch, *shape))
        self.x = self.graph.add_input("x", kind, {0: "batch"})
        self._seed = 0

    def input(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Value:
        """Another input, with the same free dimension 0."""
        kind = TensorType(dtype or self.x.dtype, (self.x.shape[0], *shape))
        return self.graph.add_input(name, kind, {0: "batch"})

    def random(
        self, *shape: int, name: str = "constant", positive: bool = False, scale: float = 1.0
    ) -> Value:
        """A constant: normal times a scale, or between 0.5 and 1.5."""
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensor = tensor.sigmoid() + 0.5 if positive else tensor * scale
        return self.graph.constant(tensor.to(self.x.dtype), name, trainable="weight" in name)

    def known(self, data: Any, name: str = "constant", dtype: torch.dtype | None = None) -> Value:
        return self.graph.constant(torch.tensor(data, dtype=dtype or self.x.dtype), name)

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Value:
        return self.graph.add(op, *args, **kwargs)

    def convolution(
        self, x: Value, out: int, kernel: int = 3, *, groups: int = 1, bias: bool = True, **kw: Any
    ) -> Value:
        """aten.conv1d, conv2d or conv3d, as the rank of x wants it."""
        d = x.rank - 2
        weight = self.random(out, x.shape[1] // groups, *[kernel] * d, name="conv.weight")
        b = self.random(out, name="conv.bias") if bias else None
        overload = ".padding" if isinstance(kw.get("padding"), str) else ""
        return self(f"aten.conv{d}d{overload}", x, weight, b, groups=groups, **kw)

    def transposed(
        self, x: Value, out: int, kernel: int = 3, *, groups: int = 1, bias: bool = True, **kw: Any
    ) -> Value:
        d = x.rank - 2
        weight = self.random(x.shape[1], out // groups, *[kernel] * d, name="conv.weight")
        b = self.random(out, name="conv.bias") if bias else None
        overload = "" if d == 1 else ".input"
        return self(f"aten.conv_transpose{d}d{overload}", x, weight, b, groups=groups, **kw)

    def linear(self, x: Value, out: int, *, bias: bool = True, name: str = "linear") -> Value:
        weight = self.random(out, x.shape[-1], name=f"{name}.weight")
        b = self.random(out, name=f"{name}.bias") if bias else None
        return self("aten.linear", x, weight, b)

    def batch_norm(self, x: Value, *, shift: bool = True, affine: bool = True) -> Value:
        """Evaluation mode; without a shift it is a scaling."""
        channels = x.shape[1]
        weight = bias = None
        if affine:
            weight = self.random(channels, name="bn.weight", positive=True)
            bias = self.random(channels, name="bn.bias", scale=float(shift))
        mean = self.random(channels, name="bn.running_mean", scale=float(shift))
        variance = self.random(channels, name="bn.running_var", positive=True)
        return self(
            "aten.batch_norm", x, weight, bias, mean, variance, False, 0.1, 1e-3, False
        )  # fmt: skip

    def done(self, *outputs: Any) -> Graph:
        self.graph.set_outputs(outputs)
        self.graph.drop_unused_constants()
        self.graph.verify()
        return self.graph


def random_inputs(graph: Graph) -> list[list[torch.Tensor]]:
    """Normal inputs, one list per assignment of the free sizes."""
    generator = torch.Generator().manual_seed(11)
    return [
        [_random(value.types[k], generator) for value in graph.inputs]
        for k in range(len(graph.assignments))
    ]


def _random(kind: Any, generator: torch.Generator) -> torch.Tensor:
    if kind.dtype == torch.bool or not kind.dtype.is_floating_point:
        return torch.randint(0, 2, kind.shape, generator=generator).to(kind.dtype)
    return torch.randn(kind.shape, generator=generator, dtype=torch.float64).to(kind.dtype)


def ops(graph: Graph) -> list[str]:
    """The operators in order, without namespace and overload."""
    return [node.op.split(".")[1] for node in graph.nodes]


def assert_applies(graph: Graph, *passes: Any, tolerance: float | None = None) -> Graph:
    """The graph after the passes, of which one must change it. Numbers must stay: in float64, and
    in float32 as exact as before but for a small factor. Running the passes again must change
    nothing."""
    before = graph.clone()
    pipeline = Pipeline(passes)
    assert pipeline.run(graph), "no pass changed the graph"
    if tolerance is None:
        tolerance = 1e-12 if all(v.dtype == torch.float64 for v in graph.inputs) else 1e-6
    inputs = random_inputs(before)
    check(before, graph, inputs, tolerance=tolerance)
    for tensors in inputs:
        exact = reference.run(before, tensors, dtype=torch.float64)
        error = largest_error(reference.run(graph, tensors), exact)
        assert error <= bound(reference.run(before, tensors), exact)
    after = graph.to_text()
    assert not pipeline.run(graph), "the passes are not idempotent"
    assert graph.to_text() == after
    return graph


def assert_declines(graph: Graph, one: Any, rule: Rule, reason: str) -> None:
    """The pass leaves the graph as it is, and the rule's closest miss gives the reason."""
    before = graph.to_text()
    assert not Pipeline([one]).run(graph)
    assert graph.to_text() == before
    miss = closest_miss(rule, graph)
    assert miss is not None
    assert re.search(reason, miss.reason), miss.reason
