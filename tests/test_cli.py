"""The command line, called in this process; and the demo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import graphopt
from graphopt import cli, demo
from graphopt.registry import registered_passes

NETWORKS = """
import torch
from torch import nn

def perceptron():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2))

def with_inputs():
    return nn.Embedding(5, 2), torch.zeros(2, 3, dtype=torch.int64)

ready = nn.Linear(4, 2)
number = 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of networks in it."""
    (tmp_path / "networks_of_a_test.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "networks_of_a_test", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_optimize_writes_an_onnx_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimize", "networks_of_a_test:perceptron", "--out", "model.onnx", "--report"]
    assert cli.main([*arguments, "--shape", "2,4", "--pass", "dead-code", "--opset", "20"]) == 0
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: torch.randn(5, 4).numpy()})
    assert result.shape == (5, 2)
    out = capsys.readouterr().out
    assert "written: model.onnx" in out
    assert "linear" in out  # of the report
    metadata = {e.key: e.value for e in onnx.load(folder / "model.onnx").metadata_props}
    assert "dead-code" in metadata["graphopt.pipeline"].split(", ")


@pytest.mark.parametrize("name", ["with_inputs", "ready"])
def test_a_factory_may_bring_inputs_or_be_a_module(folder: Path, name: str) -> None:
    shape = [] if name == "with_inputs" else ["--shape", "float32:2,4"]
    reference = f"networks_of_a_test:{name}"
    assert cli.main(["optimize", reference, "--out", "model.onnx", "--no-verify", *shape]) == 0
    assert (folder / "model.onnx").exists()


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("networks_of_a_test", [], "not of the form MODULE:FACTORY"),
        ("nowhere_to_be_found:f", [], "no module 'nowhere_to_be_found'"),
        ("networks_of_a_test:absent", [], "has no 'absent'"),
        ("networks_of_a_test:number", [], "gives a int, not an nn.Module"),
        ("networks_of_a_test:ready", [], "--shape 1,3,224,224"),
        ("networks_of_a_test:ready", ["--shape", "2,x"], "'2,x' is not a shape"),
        ("networks_of_a_test:ready", ["--shape", "nonsense:2"], "'nonsense:2' is not a shape"),
        ("networks_of_a_test:ready", ["--shape", "2,5"], "Linear"),
        ("networks_of_a_test:ready", ["--shape", "2,4", "--pass", "ded-code"], "'dead-code'"),
        ("networks_of_a_test:ready", ["--shape", "2,4", "--opset", "3"], "opset 3"),
    ],
)
def test_mistakes_are_explained(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    options: list[str],
    message: str,
) -> None:
    assert cli.main(["optimize", reference, "--out", "model.onnx", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (folder / "model.onnx").exists()


def test_passes_are_listed_with_options_and_summaries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    assert cli.main(["passes"]) == 0
    out = capsys.readouterr().out
    assert registered_passes()
    for name, known in registered_passes().items():
        line = next(line for line in out.splitlines() if f" {name} " in line)
        assert str(known.accuracy) in line
        assert known.summary in line
        assert all(option in line for option in known.options)


def test_cache_clear_empties_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.kernels import cache

    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    entry = cache.path("kernels", "something")
    cache.write(entry, b"compiled")
    assert cli.main(["cache", "clear"]) == 0
    assert not entry.exists()


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_without_a_command_it_prints_help(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert "usage: graphopt" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == graphopt.__version__


def test_the_demo_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name in ("skimage", "PIL") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert "needs scikit-image, pillow; pip install 'graphopt[demo]'" in message


def test_photographs_are_cut_and_normalised() -> None:
    """With the normalisation undone, the colours are whole bytes."""
    for photograph in demo.PHOTOGRAPHS:
        pixels = demo.load_photograph(photograph.file)
        assert pixels.shape == (3, 224, 224)
        mean, deviation = (
            torch.tensor(c).reshape(3, 1, 1) for c in (demo.MEAN, demo.STANDARD_DEVIATION)
        )
        bytes_again = (pixels * deviation + mean) * 255
        torch.testing.assert_close(bytes_again, bytes_again.round(), rtol=0, atol=1e-3)
        assert bytes_again.min() > -0.5
        assert bytes_again.max() < 255.5


@pytest.mark.slow
def test_the_demo_names_all_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(repeats=1)
    assert result.all_right
    scale = result.logits["source model"].abs().max().item()
    assert all(difference <= 1e-4 * scale for difference in result.differences.values())
    assert list(result.times.times) == list(demo.WAYS)
    assert capsys.readouterr().out == ""
