"""What a network consists of and costs, layer by layer, before and after optimization."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from graphopt.flops import count_flops
from graphopt.ir import Graph, Node, TensorType, Value
from graphopt.plain_text import plain_text

if TYPE_CHECKING:
    from graphopt.engine import Plan
    from graphopt.pass_report import PassReport

DEQUANTIZE = "graphopt.dequantize"
WIDTH = 160
CALLS_PER_TURN = 5
PAUSE = 0.03
"""Seconds."""


@dataclass(frozen=True)
class Totals:
    """Sums over a network; a constant with several users counts once.

    Attributes:
        parameters: elements of trained tensors, quantized ones included.
        nonzeros: those of them that are not zero.
        macs: multiply-adds of matrix products and convolutions at the example's sizes, as if
            there were no zeros.
        bytes: size of all constants, in the bits that quantization leaves them.
        time_ms: milliseconds of all steps; None where nothing was measured.
    """

    parameters: int
    nonzeros: int
    macs: int
    bytes: int
    time_ms: float | None = None


@dataclass(frozen=True)
class Layer:
    """A node of the graph, or the nodes that one kernel computes.

    Attributes:
        layer: the module of the source network, or the value's name where there is none.
        operators: ATen names, in order.
        inputs: shapes of the tensors that come in, at the example's sizes; constants are left out.
        outputs: shapes of the results.
        parameters: elements of trained tensors.
        nonzeros: those of them that are not zero.
        bits: per element of the trained tensor with most elements; None where there is none.
        macs: multiply-adds, as in `Totals`.
        bytes: size of the constants.
        kernel: what computes it, ``torch`` for a call-back; None where no plan was given.
        time_ms: milliseconds; None where no plan was given.
    """

    layer: str
    operators: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    parameters: int
    nonzeros: int
    bits: int | None
    macs: int
    bytes: int
    kernel: str | None = None
    time_ms: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that running a plan takes beside the graph's own constants.

    Attributes:
        arena: intermediate results and kernels' working memory; each concurrent call has its own.
        arena_lower_bound: the most that lives at one time, without which no arena can do.
        packed: constants rearranged for the kernels, shared by all calls.
    """

    arena: int
    arena_lower_bound: int
    packed: int


@dataclass(frozen=True)
class Report:
    """Layers of an optimized network, with totals before and after; prints as a table.

    ``memory`` is None where no plan was given. A batch may be computed in ``parts``, one after
    another; times of kernels are for all of them.
    """

    layers: tuple[Layer, ...]
    before: Totals
    totals: Totals
    passes: tuple[PassReport, ...] = ()
    memory: Memory | None = None
    parts: int = 1

    def to_dict(self) -> dict[str, Any]:
        """``layers`` (a list of dicts with the fields of `Layer`), ``totals`` of the optimized
        network and ``before``, those of its source (dicts with the fields of `Totals`),
        ``passes``, what these told (a list of dicts with the fields of `PassReport`), ``memory``
        (a dict with the fields of `Memory`, or None) and ``parts``."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "totals": asdict(self.totals),
            "before": asdict(self.before),
            "passes": [told.to_dict() for told in self.passes],
            "memory": None if self.memory is None else asdict(self.memory),
            "parts": self.parts,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(show_footer=True)
        table.add_column("layer", footer="before\nafter", overflow="fold")
        table.add_column("operators", overflow="fold")
        table.add_column("in → out", overflow="fold")
        for name in ("parameters", "nonzeros"):
            table.add_column(name, self._footer(name), justify="right")
        table.add_column("bits", justify="right")
        table.add_column("MACs", self._footer("macs"), justify="right")
        table.add_column("kernel")
        table.add_column("ms", self._footer("time_ms"), justify="right")
        for layer in self.layers:
            table.add_row(*_row(layer))
        yield table
        yield f"constants: {_bytes(self.before.bytes)} before, {_bytes(self.totals.bytes)} after"
        if self.memory is not None:
            yield (
                f"memory of a call: {_bytes(self.memory.arena)} (at least "
                f"{_bytes(self.memory.arena_lower_bound)} live at one time); constants packed for "
                f"kernels: {_bytes(self.memory.packed)}"
            )
        if self.parts > 1:
            yield f"the batch is computed in {self.parts} parts, which was faster"
        yield from self.passes

    def __str__(self) -> str:
        return plain_text(self, WIDTH)

    def _footer(self, name: str) -> str:
        return "\n".join(_number(getattr(totals, name)) for totals in (self.before, self.totals))


def build_report(
    before: Graph,
    after: Graph,
    plan: Plan | None = None,
    passes: tuple[PassReport, ...] = (),
) -> Report:
    """Report on a graph.

    Args:
        before: the source network's graph.
        after: the optimized graph.
        plan: the engine's plan of the optimized graph: its kernels make the rows, and are timed
            on random inputs. Without it every node makes a row, and nothing is timed.
        passes: what the passes told.
    """
    if plan is None:
        layers = [_layer((node,)) for node in after.nodes]
        return Report(_worth_a_row(layers), totals(before), totals(after), passes)
    layers = []
    covered: set[Node] = set()
    for step, seconds in plan.profile():
        covered.update(step.nodes)
        kernel = "torch" if step.is_call_back else step.kernel
        layers.append(_layer(step.nodes, kernel, 1e3 * seconds))
    free = [_layer((node,)) for node in after.nodes if node not in covered]
    layers += [layer for layer in free if layer.macs]
    time_ms = sum(layer.time_ms or 0.0 for layer in layers)
    packed = sum(array.nbytes for arrays in plan.packed.values() for array in arrays)
    memory = Memory(plan.run.arena_bytes, plan.run.arena_lower_bound, packed)
    all_after = totals(after, time_ms)
    return Report(tuple(layers), totals(before), all_after, passes, memory, plan.parts)


def totals(graph: Graph, time_ms: float | None = None) -> Totals:
    """Sums over a graph."""
    trained = [_Constant.of(value) for value in graph.constants]
    return Totals(
        parameters=sum(c.elements for c in trained if c.is_trained),
        nonzeros=sum(c.nonzeros for c in trained if c.is_trained),
        macs=sum(count_flops(node) for node in graph.nodes) // 2,
        bytes=sum(c.bytes for c in trained),
        time_ms=time_ms,
    )


@dataclass(frozen=True)
class _Constant:
    """A constant as the report counts it."""

    elements: int
    nonzeros: int
    bits: int
    is_trained: bool

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.bits // 8)

    @staticmethod
    def of(value: Value) -> _Constant:
        tensor = value.constant
        assert tensor is not None
        pairs = [user for user in value.users if user.op == DEQUANTIZE and user["x"] is value]
        bits, zero = tensor.dtype.itemsize * 8, torch.tensor(0)
        if pairs:
            steps = pairs[0]["quant_max"] - pairs[0]["quant_min"]
            bits = min(bits, steps.bit_length())
            zero = _zero_step(pairs[0], tensor)
        nonzeros = int((tensor != zero).sum())
        return _Constant(tensor.numel(), nonzeros, bits, value.trainable or bool(pairs))


def _zero_step(dequantize: Node, x: torch.Tensor) -> torch.Tensor:
    """The step that stands for zero, broadcastable to the quantized tensor."""
    zero_point, axis = dequantize["zero_point"], dequantize["axis"]
    if zero_point is None or zero_point.constant is None:
        return torch.tensor(0)
    steps: torch.Tensor = zero_point.constant
    if axis is None:
        return steps.reshape(())
    if (block := dequantize["block_size"]) is not None:
        return steps.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return steps.reshape(shape)


def _layer(nodes: Sequence[Node], kernel: str | None = None, time_ms: float | None = None) -> Layer:
    inside = set(nodes)
    sources = list(dict.fromkeys(v for node in nodes for v in node.input_values()))
    found = list(dict.fromkeys(c for value in sources for c in _constants_behind(value)))
    constants = [_Constant.of(value) for value in found]
    trained = [constant for constant in constants if constant.is_trained]
    largest = max(trained, key=lambda constant: constant.elements, default=None)
    macs = {node: count_flops(node) // 2 for node in nodes}
    main = max(nodes, key=macs.__getitem__)
    results = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_output or any(user not in inside for user in value.users)
    ]
    return Layer(
        layer=main.origin.module or main.name,
        operators=tuple(node.op.split(".", 1)[1] for node in nodes),
        inputs=_shapes(v for v in sources if v.producer not in inside and not _is_known(v)),
        outputs=_shapes(results),
        parameters=sum(constant.elements for constant in trained),
        nonzeros=sum(constant.nonzeros for constant in trained),
        bits=largest.bits if largest else None,
        macs=sum(macs.values()),
        bytes=sum(constant.bytes for constant in constants),
        kernel=kernel,
        time_ms=time_ms,
    )


def _constants_behind(value: Value) -> Iterable[Value]:
    """The constant itself, or those that a dequantize makes it from."""
    if value.is_constant:
        yield value
    elif _is_known(value) and value.producer is not None:
        yield from (v for v in value.producer.input_values() if v.is_constant)


def _is_known(value: Value) -> bool:
    """Whether a value is a constant or the dequantize of one."""
    node = value.producer
    if node is None:
        return value.is_constant
    return node.op == DEQUANTIZE and all(v.is_constant for v in node.input_values())


def _shapes(values: Iterable[Value]) -> tuple[tuple[int, ...], ...]:
    return tuple(value.type.shape for value in values if isinstance(value.type, TensorType))


def _worth_a_row(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Without size arithmetic and the dequantize of constants, which show with their users."""
    return tuple(layer for layer in layers if layer.inputs and layer.outputs)


def _row(layer: Layer) -> list[str]:
    sides = (layer.inputs, layer.outputs)
    shapes = [", ".join("x".join(map(str, shape)) for shape in side) for side in sides]
    return [
        escape(layer.layer),
        " + ".join(layer.operators),
        " → ".join(shapes),
        _number(layer.parameters or None),
        _number(layer.nonzeros if layer.parameters else None),
        _number(layer.bits),
        _number(layer.macs or None),
        escape(layer.kernel or ""),
        _number(layer.time_ms),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count:,} bytes"


@dataclass(frozen=True)
class Benchmark:
    """Times of the same work done in several ways; prints as a table.

    Attributes:
        times: seconds of every call, by name; the first name is what the others are held against.
    """

    times: Mapping[str, Sequence[float]] = field(repr=False)

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of a call, by name."""
        return {name: statistics.median(times) for name, times in self.times.items()}

    @property
    def ratio(self) -> float:
        """How many times faster the last is than the first."""
        medians = list(self.medians.values())
        return medians[0] / medians[-1]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table()
        table.add_column("")
        for column in ("median, ms", "least, ms", "speed-up"):
            table.add_column(column, justify="right")
        medians = self.medians
        first = next(iter(medians.values()))
        for name, median in medians.items():
            least = min(self.times[name])
            table.add_row(
                name, f"{1e3 * median:.3f}", f"{1e3 * least:.3f}", f"{first / median:.2f}"
            )
        yield table

    def __str__(self) -> str:
        return plain_text(self, WIDTH)


def benchmark(ways: Mapping[str, Callable[[], Any]], *, repeats: int = 20) -> Benchmark:
    """Time several ways of doing the same, in turns, so that a slower spell of the machine meets
    all of them.

    Before its turn each way has a pause, in which the threads of the one before stop spinning, and
    a call that is not timed.

    Args:
        ways: what to call, by name.
        repeats: how many times each is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for first in range(0, repeats, CALLS_PER_TURN):
        for name, call in ways.items():
            time.sleep(PAUSE)
            call()
            for _ in range(min(CALLS_PER_TURN, repeats - first)):
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return Benchmark(times)
