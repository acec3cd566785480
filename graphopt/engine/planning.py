"""A graph under given sizes becomes a plan: a program, and what it consists of."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.engine import selection as selecting
from graphopt.engine.builder import ProgramBuilder
from graphopt.engine.chains import chains, with_chain
from graphopt.engine.layouts import with_layouts
from graphopt.engine.lowering import lower
from graphopt.engine.parts import PartsProgram, part_keys, part_sizes
from graphopt.engine.program import Program
from graphopt.engine.selection import Selection
from graphopt.engine.threads import default_threads
from graphopt.engine.work import (
    AliasWork,
    CallBackWork,
    ConstantWork,
    Derived,
    KernelWork,
    Work,
)
from graphopt.errors import Error
from graphopt.ir import Graph, Node, ScalarType, TensorType, Value
from graphopt.kernels import source
from graphopt.kernels.compile_ahead import compile_ahead
from graphopt.kernels.registry import Candidate

ALONE_BELOW = 40e-6
"""Seconds of work under which waking another thread costs more than it brings."""


WORTH_PARTS = 2**21
"""Bytes of an arena below which a batch is not tried in parts: its values stay in the caches."""

TURNS_OF_PARTS = 3
"""How often a batch is timed as a whole and in parts."""

CLEARLY_FASTER = 0.97
"""Of the time of single kernels, from which a chain replaces them."""

COMPUTED = object()
"""Stands among a plan's literals for an output that the program computes."""


@dataclass(frozen=True)
class PlanStep:
    """A step of a plan.

    Attributes:
        kernel: name of the kernel, or ``torch: <operator>`` for a call-back.
        nodes: the nodes that it computes.
        is_call_back: whether torch does it.
    """

    kernel: str
    nodes: tuple[Node, ...]
    is_call_back: bool


class Plan:
    """A graph ready to run under one assignment of its free sizes.

    Attributes:
        run: takes the graph's inputs as tensors, returns the outputs that are computed.
        sizes: the assignment.
        steps: kernels and call-backs in order.
        is_computed: for each output of the graph, whether ``run`` returns it.
        literals: for each output of the graph that is not computed, its value; sizes are numbers.
        packed: constants as kernels want them, by kernel and constants.
    """

    def __init__(
        self,
        graph: Graph,
        program: Program | PartsProgram,
        sizes: Mapping[str, int],
        steps: Sequence[PlanStep],
        packed: dict[tuple[object, ...], list[np.ndarray]],
        literals: Sequence[Any],
    ) -> None:
        self.graph = graph
        self.run = program
        self.sizes = dict(sizes)
        self.steps = tuple(steps)
        self.packed = packed
        self.literals = tuple(literals)
        self.is_computed = tuple(literal is COMPUTED for literal in literals)

    @property
    def parts(self) -> int:
        """In how many parts, one after another, the batch is computed."""
        return self.run.count if isinstance(self.run, PartsProgram) else 1

    @property
    def call_backs(self) -> tuple[PlanStep, ...]:
        """The steps that torch does."""
        return tuple(step for step in self.steps if step.is_call_back)

    def profile(self, repeats: int = 5) -> list[tuple[PlanStep, float]]:
        """Every step with its median time in seconds, on random inputs."""
        measured = self.run.profile(random_inputs(self.run), repeats)
        if len(measured) != len(self.steps):
            raise Error("the profile of a program has other steps than its plan")
        return [(step, t) for step, (_, t) in zip(self.steps, measured, strict=True)]


def random_inputs(program: Program | PartsProgram) -> list[torch.Tensor]:
    """Inputs of the right shapes and dtypes; integers are 0, which every table of indices has."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(spec.shape, generator=generator).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.zeros(spec.shape, dtype=spec.dtype)
        for spec in program.inputs
    ]


def compile_graph(
    graph: Graph,
    sizes: Mapping[str, int] | None = None,
    *,
    threads: int,
    selection: Selection | None = None,
    like: Plan | None = None,
) -> Plan:
    """Choose kernels for a graph, lay out its memory and write its program.

    A batch whose entries do not depend on one another is computed in parts where that was
    measured to be faster.

    Args:
        graph: what is to be computed.
        sizes: the free sizes; by default the example's.
        threads: size of the team.
        selection: how kernels are chosen; by default measured.
        like: another plan of the same graph, whose choice of kernels and packed constants are
            taken over.

    Raises:
        GraphError: the sizes violate a guard.
        SelectionError: no kernel solves a problem.
    """
    sizes = graph.sizes if sizes is None else sizes
    selection = selection or Selection.default()

    def plan(own: Mapping[str, int]) -> Plan:
        return _plan(graph, own, threads, selection, like)

    parts = part_sizes(graph, sizes) if selection.measure else []
    if not parts:
        return plan(sizes)
    ((name, batch),) = sizes.items()
    counts, keys = [batch, *parts], part_keys(graph, sizes, threads, parts)
    known = selecting.remembered(keys)
    if known is not None:
        return _repeated(plan({name: counts[known.index(min(known))]}), sizes)
    whole = plan(sizes)
    if whole.run.arena_bytes < WORTH_PARTS:
        return whole
    plans = [whole, *(_repeated(plan({name: count}), sizes) for count in parts)]
    inputs = random_inputs(whole.run)
    times = selecting.least_times([(one.run, [inputs]) for one in plans], TURNS_OF_PARTS)
    selecting.remember(dict(zip(keys, times, strict=True)))
    selecting.save()
    return plans[times.index(min(times))]


def _repeated(part: Plan, sizes: Mapping[str, int]) -> Plan:
    """The plan for a whole batch that a plan for a part of it makes, which may be all of it."""
    ((name, batch),) = sizes.items()
    count = batch // part.sizes[name]
    if count == 1:
        return part
    assert isinstance(part.run, Program)
    program = PartsProgram(part.run, count)
    return Plan(part.graph, program, sizes, part.steps, part.packed, part.literals)


def _plan(
    graph: Graph,
    sizes: Mapping[str, int],
    threads: int,
    selection: Selection,
    like: Plan | None,
) -> Plan:
    """A plan that computes a whole batch at once."""
    types = graph.types_under(sizes)
    writer = _Writer(graph, threads, selection, like)
    works = writer.with_chains(with_layouts(lower(graph, types)))
    for value in graph.inputs:
        kind = types[value]
        assert isinstance(kind, TensorType)
        writer.builder.add_input(value, kind.shape, kind.dtype)
    read = {value for work in works for value in work.inputs}
    for value in graph.constants:
        if value in read or value.is_output:
            assert value.constant is not None
            writer.builder.add_constant(value, value.constant)
    for work, contenders in zip(works, writer.contenders(works), strict=True):
        for value in work.outputs:
            kind = types[value]
            assert isinstance(kind, TensorType)
            writer.declare(work, value, kind)
        writer.add(work, contenders)
    literals: list[Any] = []
    for output in graph.outputs:
        result = types[output] if isinstance(output, Value) else output
        if isinstance(result, TensorType):
            writer.builder.add_output(output)
            literals.append(COMPUTED)
        else:
            literals.append(result.value if isinstance(result, ScalarType) else result)
    selecting.save()
    program = writer.builder.build(threads, alone_below=ALONE_BELOW, gives_way=True)
    return Plan(graph, program, sizes, writer.steps, writer.packed, literals)


class _Writer:
    """Adds works to a program."""

    def __init__(self, graph: Graph, threads: int, selection: Selection, like: Plan | None) -> None:
        self.graph = graph
        self.threads = threads
        self.selection = selection
        self.builder = ProgramBuilder()
        self.steps: list[PlanStep] = []
        self.packed: dict[tuple[object, ...], list[np.ndarray]] = {}
        self.known = like.packed if like is not None else {}
        before = like.steps if like is not None else ()
        self.chosen_before = {step.nodes: step.kernel for step in before}
        self.decided: dict[tuple[Node, ...], Candidate] = {}

    def contenders(self, works: Sequence[Work]) -> list[list[Candidate]]:
        """For each work the candidates that may solve its problem, none where no kernel has to.
        If some will be timed, all are compiled, many at once.

        Another size of the same graph takes the kernels that were chosen for the first.
        """
        contenders: list[list[Candidate]] = []
        with source.collecting() as wanted:
            for work in works:
                contenders.append([])
                if isinstance(work, KernelWork) and work.nodes in self.decided:
                    contenders[-1] = [self.decided[work.nodes]]
                elif isinstance(work, KernelWork) and any(o.size for o in work.problem.outputs):
                    prefer = self.chosen_before.get(work.nodes)
                    contenders[-1] = selecting.contenders(
                        work.problem, self.threads, self.selection, prefer
                    )
            # Where nothing is to be timed, all was compiled before, most likely.
            if any(len(found) > 1 for found in contenders):
                for candidate in itertools.chain.from_iterable(contenders):
                    candidate.build(self.threads)
        compile_ahead(wanted, default_threads())
        return contenders

    def with_chains(self, works: list[Work]) -> list[Work]:
        """The works, with convolutions joined where that was measured to be faster."""
        if not self.selection.measure:
            return works
        found = chains(works)
        parts = [part for chain in found for part in (chain.work, *chain.parts)]
        contenders = iter(self.contenders(parts))
        for chain in found:
            own = (chain.work, *chain.parts)
            arrays = [[_array(value) for value in part.inputs] for part in own]
            chosen = [
                selecting.decide(next(contenders), constants, self.threads) for constants in arrays
            ]
            self.decided.update(zip((part.nodes for part in own), chosen, strict=True))
            if selecting.ratio(chosen, arrays, self.threads) < CLEARLY_FASTER:
                works = with_chain(works, chain)
        return works

    def declare(self, work: Work, value: Value, kind: TensorType) -> None:
        if isinstance(work, AliasWork):
            self.builder.add_alias(value, work.of, kind.shape, kind.dtype, work.offset)
            return
        if isinstance(work, ConstantWork):
            self.builder.add_constant(value, work.evaluate())
            return
        shape = kind.shape
        if isinstance(work, KernelWork):
            operand = work.problem.outputs[work.outputs.index(value)]
            if operand.layout.is_rearranged and math.prod(operand.memory) != math.prod(shape):
                shape = operand.memory
        self.builder.add_buffer(value, shape, kind.dtype)

    def add(self, work: Work, contenders: Sequence[Candidate]) -> None:
        if isinstance(work, KernelWork):
            if contenders:
                self._add_kernel(work, contenders)
        elif isinstance(work, CallBackWork):
            label = f"torch: {work.node.op}"
            # A result that nobody uses may have another shape than its type says: batch norm's
            # statistics are empty on the CPU.
            wanted = [v if v.users or v.is_output else None for v in work.outputs]
            self.builder.add_call_back(work.function, work.inputs, wanted, label=label)
            self.steps.append(PlanStep(label, (work.node,), True))

    def _add_kernel(self, work: KernelWork, contenders: Sequence[Candidate]) -> None:
        arrays = [_array(value) for value in work.inputs]
        chosen = selecting.decide(contenders, arrays, self.threads)
        for value in work.inputs:
            if isinstance(value, Derived):
                self.builder.add_constant(value, value.constant)
        outputs: tuple[Any, ...] = work.outputs
        if work.check is not None:
            note = work.problem.outputs[-1]
            outputs = (*outputs, ("note", work.nodes))
            self.builder.add_buffer(outputs[-1], note.shape, getattr(torch, note.dtype))
            self.builder.add_check(outputs[-1], work.check)
        self.builder.add_kernel(
            chosen.build(self.threads),
            work.inputs,
            outputs,
            packed=self._pack(chosen, work, arrays),
            scratch_bytes=chosen.scratch_bytes(self.threads),
            label=chosen.kernel,
            estimate=chosen.estimate,
            overwrites=chosen.overwrites(),
        )
        self.steps.append(PlanStep(chosen.kernel, work.nodes, False))

    def _pack(
        self, chosen: Candidate, work: KernelWork, arrays: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        constants = tuple(value.name for value in work.inputs if value.is_constant)
        nodes = tuple(node.name for node in work.nodes)
        packing = chosen.packing()
        key = (type(chosen), chosen.kernel, constants, nodes, packing)
        packed = self.known.get(key)
        if packed is None or packing is None:
            known, packed = packed or [], chosen.pack(arrays)
            if len(known) == len(packed) and all(map(np.array_equal, known, packed)):
                packed = known
        self.packed[key] = packed
        return packed


def _array(value: Value | Derived) -> np.ndarray | None:
    if value.constant is None:
        return None
    array: np.ndarray = value.constant.detach().contiguous().numpy()
    return array


def time_graph(graph: Graph, *, threads: int, repeats: int = 20) -> float:
    """Median time in seconds of a graph under the example's sizes, on random inputs."""
    plan = compile_graph(graph, threads=threads)
    inputs = random_inputs(plan.run)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        plan.run(*inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
