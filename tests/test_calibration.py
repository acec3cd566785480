"""Batches of calibration data, in all their forms, and observers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.calibration import CalibrationData, bind, observe
from graphopt.errors import PassError
from graphopt.pipeline import Context

X = torch.arange(6.0).reshape(2, 3)
LABELS = torch.tensor([1, 0])


class Two(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return torch.relu(x * scale) + 1


@pytest.fixture(scope="module")
def one() -> graphopt.Graph:
    return graphopt.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), X)


@pytest.fixture(scope="module")
def two() -> graphopt.Graph:
    return graphopt.trace(Two(), ((X,), {"scale": X}))


@pytest.mark.parametrize(
    ("batch", "target"),
    [(X, None), ((X,), None), ([X], None), ((X, LABELS), LABELS), ([X, LABELS], LABELS),
     ({"input": X}, None), ({"input": X, "labels": LABELS}, LABELS),
     (({"input": X}, LABELS), LABELS), (((X,), {}), None), (X.double(), None)],
)  # fmt: skip
def test_forms_of_a_batch(one: graphopt.Graph, batch: Any, target: Any) -> None:
    bound = bind(one, batch)
    (given,) = bound.inputs
    assert torch.equal(given, X)
    assert given.dtype == torch.float32
    assert bound.target is target


def test_keyword_inputs_and_another_batch_size(two: graphopt.Graph) -> None:
    bound = bind(two, ((X[:1],), {"scale": X[:1]}))
    assert [tuple(tensor.shape) for tensor in bound.inputs] == [(1, 3), (1, 3)]


@pytest.mark.parametrize(
    ("batch", "message"),
    [(X[:, :2], r"batch 5 .* gives the input %input f32\[2, 2\]"),
     (LABELS[:, None].expand(2, 3), "gives the input %input i64"),
     ((X, X, X), "traced for other arguments")],
)  # fmt: skip
def test_what_does_not_fit_is_named(one: graphopt.Graph, batch: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        bind(one, batch, 5)


def test_observers_see_inputs_and_results(one: graphopt.Graph) -> None:
    seen: dict[str, list[Tensor]] = {"input": [], "relu": []}
    data = CalibrationData([X, X + 1, X + 2], limit=2)
    count: list[int] = []
    observers = [(one.value(name), seen[name].append) for name in seen]
    observe(one, data, [*observers, (one.value("relu"), lambda x: count.append(len(x)))])
    assert count == [2, 2]
    assert [tensor.sum() for tensor in seen["input"]] == [15, 21]
    expected = [graphopt.reference.run(one, [x])[0] for x in (X, X + 1)]
    assert all(torch.equal(a, b) for a, b in zip(seen["relu"], expected, strict=True))


def test_lists_are_swept_again_and_generators_are_not(one: graphopt.Graph) -> None:
    again = CalibrationData([X])
    assert [len(list(again.batches(one))) for _ in range(2)] == [1, 1]
    once = CalibrationData(x for x in [X, X])
    assert len(list(once.batches(one, Context(progress=True)))) == 2
    with pytest.raises(PassError, match="generator and was read already"):
        next(once.batches(one))


@pytest.mark.parametrize("data", [X, 3, {"input": X}])
def test_a_single_batch_is_no_data(data: Any) -> None:
    with pytest.raises(PassError, match="iterable of batches"):
        CalibrationData(data)


def test_no_batches(one: graphopt.Graph) -> None:
    with pytest.raises(PassError, match="no batches"):
        list(CalibrationData([]).batches(one))
