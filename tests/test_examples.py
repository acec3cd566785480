"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from graphopt import registry

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registered = dict(registry._registered)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        registry._registered.clear()
        registry._registered.update(registered)
    assert capsys.readouterr().out


def test_there_are_examples() -> None:
    assert EXAMPLES
