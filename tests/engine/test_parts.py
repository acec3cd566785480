"""A batch in parts: the same results, and when it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_lowering import plan_of
from torch import nn

import graphopt
from graphopt.engine import Selection, compile_graph, planning, selection
from graphopt.engine.parts import PartsProgram, part_keys, part_sizes
from graphopt.errors import TraceError
from graphopt.ir import Graph

BATCH = 8


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    example = torch.randn(BATCH, 3, 9, 9)
    return graphopt.trace(nn.Sequential(*layers, nn.Linear(8, 5)).eval(), example)


@pytest.fixture
def own_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    selection.forget()
    yield
    selection.forget()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_give_the_results_of_the_part(graph: Graph, size: int) -> None:
    part = plan_of(graph, {"batch": size}).run
    program = PartsProgram(part, BATCH // size)
    x = torch.randn(BATCH, 3, 9, 9, requires_grad=True)
    (result,) = program(x)
    assert result.shape == program.outputs[0].shape == (BATCH, 5)
    assert program.inputs[0].shape == x.shape
    assert not result.requires_grad
    assert torch.equal(result, torch.cat([part(piece)[0] for piece in x.detach().split(size)]))
    (turned,) = program(x.detach().transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(turned, result)


def test_wrong_arguments(graph: Graph) -> None:
    program = PartsProgram(plan_of(graph, {"batch": 2}).run, 4)
    with pytest.raises(TraceError, match="takes 1 inputs, got 2"):
        program(torch.randn(8, 3, 9, 9), torch.randn(8, 3, 9, 9))
    wanted = r"the program was made for float32\[8, 3, 9, 9\]"
    with pytest.raises(TraceError, match=rf"input 0 is float32\[6, 3, 9, 9\], but {wanted}"):
        program(torch.randn(6, 3, 9, 9))
    with pytest.raises(TraceError, match=rf"float64\[8, 3, 9, 9\], but {wanted}"):
        program(torch.randn(8, 3, 9, 9).double())


def test_a_profile_counts_all_parts(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    part = plan_of(graph, {"batch": 2}).run
    x = torch.randn(BATCH, 3, 9, 9)
    labels = [label for label, _ in PartsProgram(part, 4).profile([x])]
    assert labels == [label for label, _ in part.profile([x[:2]])]
    seen = []
    monkeypatch.setattr(part, "profile", lambda *given: seen.append(given) or [("kernel", 0.5)])
    assert PartsProgram(part, 4).profile([x], 7) == [("kernel", 2.0)]
    ((((first,), repeats)),) = seen
    assert torch.equal(first, x[:2])
    assert repeats == 7


def test_parts_that_divide_the_batch(graph: Graph) -> None:
    found = [part_sizes(graph, {"batch": batch}) for batch in (1, 2, 4, 6, 8)]
    assert found == [[], [1], [1], [1], [1, 4]]
    guarded = graph.clone()
    guarded.guards = ("batch > 1",)
    assert part_sizes(guarded, {"batch": 8}) == [4]
    mixed = graphopt.trace(nn.Softmax(0), torch.randn(8, 3))
    assert part_sizes(mixed, {"batch": 8}) == []


@pytest.mark.usefixtures("own_times")
@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_the_fastest_by_remembered_times(graph: Graph, fastest: int) -> None:
    keys = part_keys(graph, {"batch": BATCH}, 2, [1, 4])
    selection.remember({key: 1.0 + (place != fastest) for place, key in enumerate(keys)})
    plan = compile_graph(graph, threads=2, selection=Selection())
    count = plan.run.count if isinstance(plan.run, PartsProgram) else 1
    assert count == (1, 8, 2)[fastest]
    x = torch.randn(BATCH, 3, 9, 9)
    (result,) = plan.run(x)
    torch.testing.assert_close(result, graph.to_torch()(x), rtol=1e-5, atol=1e-5)
    assert len(plan.profile()) == len(plan.steps)


@pytest.mark.usefixtures("own_times")
def test_measured_once(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = part_keys(graph, {"batch": BATCH}, 2, [1, 4])
    compile_graph(graph, threads=2, selection=Selection())
    assert selection.remembered(keys) is None  # too small to be worth it
    monkeypatch.setattr(planning, "WORTH_PARTS", 0)
    compile_graph(graph, threads=2, selection=Selection())
    times = selection.remembered(keys)
    assert times is not None
    monkeypatch.setattr(selection, "least_times", None)
    compile_graph(graph, threads=2, selection=Selection())


def test_other_zeros_are_timed_anew(graph: Graph) -> None:
    before = part_keys(graph, graph.sizes, 2, [1])
    weight = max((value.constant for value in graph.constants), key=torch.numel)
    assert weight is not None
    with torch.no_grad():
        weight[0] = 0
    assert part_keys(graph, graph.sizes, 2, [1])[0] != before[0]
