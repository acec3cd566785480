"""Patterns for layers: paths, regular expressions, module types."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PassError
from graphopt.passes.layer_choice import as_patterns, chosen, settings


@pytest.fixture(scope="module")
def graph() -> graphopt.Graph:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, width, 1), nn.Conv2d(width, 4, 1), nn.ReLU())

    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3))
    model.add_module("stem2", nn.ReLU())
    model.add_module("blocks", nn.Sequential(block(5), block(6)))
    model.add_module("fc", nn.Linear(4, 2))
    return graphopt.trace(model, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("pattern", "modules"),
    [("stem", {"stem"}), ("blocks.1", {"blocks.1.0", "blocks.1.1", "blocks.1.2"}),
     ("blocks.*.0", {"blocks.0.0", "blocks.1.0"}), ("bl*1", {"blocks.0.1", "blocks.1.0",
      "blocks.1.1", "blocks.1.2"}), (re.compile(r"c$"), {"fc"}), (nn.Linear, {"fc"}),
     (nn.Conv2d, {"stem", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"})],
)  # fmt: skip
def test_patterns(graph: graphopt.Graph, pattern: Any, modules: set[str]) -> None:
    assert {node.origin.module for node in chosen(graph, [pattern])} == modules


@pytest.mark.parametrize(
    ("pattern", "shown"), [("ste", "'ste'"), (re.compile("x"), "re.compile"), (nn.LSTM, "LSTM")]
)
def test_a_pattern_that_means_nothing(graph: graphopt.Graph, pattern: Any, shown: str) -> None:
    with pytest.raises(PassError, match=rf"ignore has {re.escape(shown)}.*modules are: blocks.0.0"):
        chosen(graph, [pattern])


def test_what_is_no_pattern() -> None:
    with pytest.raises(PassError, match="ignore has 3"):
        as_patterns([3])
    assert as_patterns("stem") == ["stem"]


def test_the_last_setting_decides(graph: graphopt.Graph) -> None:
    found = settings(graph, {nn.Conv2d: 1, "blocks.1": 2}, "rank")
    by_module = {node.origin.module: setting for node, setting in found.items()}
    assert by_module == {"stem": 1, "blocks.0.0": 1, "blocks.0.1": 1, "blocks.1.0": 2,
                         "blocks.1.1": 2, "blocks.1.2": 2}  # fmt: skip
