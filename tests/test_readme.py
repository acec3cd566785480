"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import registry

README = Path(__file__).parents[1] / "README.md"


def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {"__name__": "readme"}
    try:
        exec(compile("\n".join(blocks), str(README), "exec"), scope)
    finally:
        registry._registered.pop("relu-to-relu6", None)
    model, x = scope["model"], scope["x"]
    with torch.no_grad():
        torch.testing.assert_close(scope["y"], model(x), rtol=1e-4, atol=1e-5)
    assert "batch_norm" not in capsys.readouterr().out.partition("return")[0]
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_there_are_two_set_up_commands() -> None:
    text = README.read_text()
    for mark in ("demo", "test"):
        block = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", text)
        assert block is not None
        assert "\n" not in block[1]
    assert text.count("```bash") == 2
