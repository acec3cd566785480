"""Which kernel is chosen, from times that are made up or remembered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.engine import selection
from graphopt.engine.selection import Selection, contenders, decide, least_times, measure
from graphopt.errors import SelectionError
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import Candidate, Step, candidates
from graphopt.kernels.zeros import zero_pattern

MEASURED = Selection(measure=True)
PROBLEM = MatmulProblem(
    (Operand.plain("float32", (3, 40)), ConstantOperand((24, 40), Layout.plain("float32", 2))),
    (Operand.plain("float32", (3, 24)),),
    (False, True),
    None,
)
WEIGHT = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
SQUARE = MatmulProblem(
    (Operand.plain("float32", (3, 24)), ConstantOperand((24, 24), Layout.plain("float32", 2))),
    (Operand.plain("float32", (3, 24)),),
    (False, True),
    None,
)


@dataclass(frozen=True)
class Named(Candidate):
    """A candidate of which only the name and the estimate matter."""

    def build(self, threads: int) -> tuple[Step, ...]:
        raise AssertionError("its time is known")


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(selection, "_known", {})
    monkeypatch.setattr(selection, "_unsaved", {})


def known(
    monkeypatch: pytest.MonkeyPatch,
    times: dict[str, tuple[float, float]],
    problem: MatmulProblem = PROBLEM,
) -> list[list[str]]:
    """Candidates of these (estimated, measured) times; returns what is measured, call by call."""
    found = [Named(name, problem, estimate) for name, (estimate, _) in times.items()]
    found.sort(key=lambda candidate: candidate.estimate)
    calls: list[list[str]] = []

    def made_up(timed: Sequence[Candidate], constants: object, threads: int) -> list[float]:
        calls.append([candidate.kernel for candidate in timed])
        return [times[candidate.kernel][1] for candidate in timed]

    monkeypatch.setattr(selection, "candidates", lambda problem: found)
    monkeypatch.setattr(selection, "measure", made_up)
    return calls


def choose(
    problem: MatmulProblem,
    constants: Sequence[np.ndarray | None],
    threads: int,
    asked: Selection,
    prefer: str | None = None,
) -> Candidate:
    return decide(contenders(problem, threads, asked, prefer), constants, threads)


def test_measured_time_decides_among_the_best_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = known(monkeypatch, {"a": (1.0, 3.0), "b": (1.5, 2.0), "hopeless": (3.5, 0.1)})
    assert choose(PROBLEM, [None, WEIGHT], 2, MEASURED).kernel == "b"
    assert calls == [["a", "b"]]
    assert choose(PROBLEM, [None, WEIGHT], 2, Selection(measure=False)).kernel == "a"
    assert choose(PROBLEM, [None, WEIGHT], 2, MEASURED, prefer="hopeless").kernel == "hopeless"


def test_times_are_remembered_by_thread_count_and_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = known(monkeypatch, {"a": (1.0, 3.0), "b": (1.5, 2.0)})
    for threads in (1, 1, 2, 2):
        choose(PROBLEM, [None, WEIGHT], threads, MEASURED)
    assert len(calls) == 2
    selection.save()
    selection.forget()
    assert choose(PROBLEM, [None, WEIGHT], 2, MEASURED).kernel == "b"
    assert len(calls) == 2


def test_equal_problems_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = known(monkeypatch, {"a": (1.0, 3.0), "b": (1.5, 2.0)})
    first, second = (contenders(PROBLEM, 2, MEASURED) for _ in range(2))
    assert len(first) == len(second) == 2
    for timed in (first, second):
        assert decide(timed, [None, WEIGHT], 2).kernel == "b"
    assert len(calls) == 1


def test_weights_with_as_many_zeros_share_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(seed: int, density: float) -> MatmulProblem:
        weight = WEIGHT.copy()
        order = np.random.default_rng(seed).permutation(weight.size)
        weight.flat[order[round(density * weight.size) :]] = 0
        constant = replace(PROBLEM.inputs[1], zeros=zero_pattern(weight))
        return replace(PROBLEM, inputs=(PROBLEM.inputs[0], constant))

    measured = 0
    for seed, density, count in ((1, 0.2, 1), (2, 0.2, 1), (3, 0.201, 1), (4, 0.3, 2)):
        problem = pruned(seed, density)
        calls = known(monkeypatch, {"a": (1.0, 2.0), "b": (1.5, 1.0)}, problem)
        assert choose(problem, [None, WEIGHT], 2, MEASURED).kernel == "b"
        measured += len(calls)
        assert measured == count


def test_sets_of_inputs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call takes a third of a turn: between two looks at the clock.
    ticks = itertools.count()
    third = selection.SECONDS_PER_TURN / 2.9
    clock = SimpleNamespace(perf_counter=lambda: third * next(ticks))
    monkeypatch.setattr(selection, "time", clock)
    seen: list[int] = []
    times = least_times([(seen.append, [[1], [2], [3], [4]])], turns=2)  # type: ignore[list-item]
    assert times == pytest.approx([third])
    # The first call of all does not count, and each turn begins with the first set.
    assert seen == [1, 1, 2, 3, 1, 2, 3]


def test_nothing_solves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, {})
    with pytest.raises(SelectionError, match="no kernel solves"):
        choose(PROBLEM, [None, WEIGHT], 1, MEASURED)


def test_a_time_is_at_least_that_of_fetching_the_constants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "MEMORY_SPEED", 1.0)
    found = candidates(PROBLEM)
    packed = [sum(array.nbytes for array in c.pack([None, WEIGHT])) for c in found]
    assert min(packed) >= WEIGHT.nbytes
    assert measure(found, [None, WEIGHT], 1) == pytest.approx(packed)
    monkeypatch.setattr(selection, "MEMORY_SPEED", 1e30)
    assert all(0 < seconds < 1 for seconds in measure(found, [None, WEIGHT], 1))


def test_of_kernels_that_wait_for_memory_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MEMORY_SPEED", 1.0)
    monkeypatch.setattr(selection, "least_times", lambda _: [0.5, 0.3, 0.4])
    (one, *_) = candidates(PROBLEM)
    times = measure([one] * 3, [None, WEIGHT], 1)
    assert times.index(min(times)) == 1


def test_a_whole_and_its_parts_are_measured_in_turn_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known(monkeypatch, {})
    monkeypatch.setattr(selection, "MEMORY_SPEED", 1e30)
    (one, *_) = candidates(SQUARE)
    weights = [np.ascontiguousarray(WEIGHT[:, i : i + 24]) for i in range(3)]
    constants = [[None, weight] for weight in weights]

    def made_up(programs: Sequence[tuple[Callable[..., torch.Tensor], Any]]) -> list[float]:
        (whole, [(x,), *_]), (parts, same) = programs
        assert same[0][0] is x
        torch.testing.assert_close(whole(x)[0], x @ torch.from_numpy(weights[0]).T)
        made = x @ torch.from_numpy(weights[1]).T @ torch.from_numpy(weights[2]).T
        torch.testing.assert_close(parts(x)[0], made)
        return [3.0, 5.0]

    monkeypatch.setattr(selection, "least_times", made_up)
    assert selection.ratio([one] * 3, constants, 1) == pytest.approx(3 / 5)
    monkeypatch.setattr(selection, "least_times", None)
    assert selection.ratio([one] * 3, constants, 1) == pytest.approx(3 / 5)
    # Other parts, or another team, are another matter.
    for others, threads in ((2, 1), (3, 2)):
        with pytest.raises(TypeError):
            selection.ratio([one] * others, constants[:others], threads)


@pytest.mark.parametrize(("value", "measured"), [("measure", True), ("estimate", False)])
def test_the_environment_may_say(
    monkeypatch: pytest.MonkeyPatch, value: str, measured: bool
) -> None:
    monkeypatch.setenv("GRAPHOPT_SELECTION", value)
    assert Selection.default().measure is measured
    monkeypatch.setenv("GRAPHOPT_SELECTION", value + "d")
    with pytest.raises(SelectionError, match="may be 'measure' or 'estimate'"):
        Selection.default()
