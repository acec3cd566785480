"""Quantized networks as ONNX files: integer kernels in onnxruntime, small files, equal layers."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.comparison import Difference
from graphopt.errors import ExportError
from graphopt.kernels.simd import FEATURES
from graphopt.onnx import compare_layers
from graphopt.passes import Quantize


class Small(nn.Module):
    """A ReLU, a clamp at six, pooling, and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        x = x + self.pointwise(nn.functional.hardtanh(self.depthwise(x) * 4, 0.0, 6.0))
        return torch.relu(self.last(x)).mean((2, 3))


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    model = Small().eval()
    data = [images(k) for k in range(3)]
    found = {}
    for name, options in {"fused": {}, "separate": {"fuse_additions": False}}.items():
        one = Quantize(data=data, **options)  # type: ignore[arg-type]
        optimized = graphopt.optimize(model, images(0), passes=[one])
        optimized.export_onnx(folder / f"{name}.onnx")
        found[name] = optimized, folder / f"{name}.onnx"
    return found


exact_integers = pytest.mark.skipif(
    platform.machine() in ("x86_64", "AMD64") and not {"avx512vnni", "avxvnni"} & FEATURES,
    reason="onnxruntime's sums of two int8 products saturate on CPUs without VNNI",
)


def operators(path: Path, folder: Path) -> Counter[str]:
    """Of the model as onnxruntime optimizes it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(("name", "count", "floats"), [("separate", 4, 0), ("fused", 3, 1)])
def test_onnxruntime_fuses_integer_convolutions(
    exported: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, count: int, floats: int
) -> None:
    """Of four; a residual addition after a convolution keeps that from ending in integers."""
    found = operators(exported[name][1], tmp_path)
    assert found["QLinearConv"] == count
    assert found["Conv"] + found["FusedConv"] == floats
    assert found["Relu"] == found["Clip"] == 0
    if name == "separate":
        assert found["QLinearAdd"] == 1


@exact_integers
@pytest.mark.parametrize("name", ["separate", "fused"])
def test_layers_fed_the_same_agree_within_a_step(
    exported: dict[str, tuple[Any, Path]], name: str
) -> None:
    optimized, path = exported[name]
    comparison = compare_layers(optimized.graph, path, [images(7)])
    assert len(comparison.layers) >= 6
    assert comparison.largest <= 1
    assert comparison.first_difference is None


@exact_integers
def test_a_layer_that_differs_is_found(
    exported: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    optimized, path = exported["separate"]
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "depthwise.weight_quantized":
            tensor.raw_data = bytes(reversed(tensor.raw_data))
    onnx.save(model, tmp_path / "wrong.onnx")
    comparison = compare_layers(optimized.graph, tmp_path / "wrong.onnx", [images(7)])
    first = comparison.first_difference
    assert first is not None
    assert first.name.startswith("hardtanh")
    assert "(first to part)" in str(comparison)
    assert sum(layer.steps > 1 for layer in comparison.layers) == 1


def test_a_file_of_another_graph(exported: dict[str, tuple[Any, Path]]) -> None:
    with pytest.raises(ExportError, match="exported from another one"):
        compare_layers(exported["fused"][0].graph, exported["separate"][1], [images(7)])


@exact_integers
def test_the_engine_agrees_with_the_file(exported: dict[str, tuple[Any, Path]]) -> None:
    for optimized, path in exported.values():
        x = images(8)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        difference = Difference.between("", "", torch.from_numpy(expected), optimized(x))
        assert difference.sqnr > 40


@pytest.mark.parametrize(
    ("options", "opset", "bytes_per_weight"),
    [({"weights": "int8"}, 18, 1.0), ({"weights": "int4", "group_size": 32}, 21, 1.125),
     ({"activations": "dynamic"}, 21, 1.0)],
    ids=str,
)  # fmt: skip
def test_files_shrink(
    tmp_path: Path, options: dict[str, Any], opset: int, bytes_per_weight: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).eval()
    x = torch.randn(3, 256)
    options = {"activations": None, **options}
    optimized = graphopt.optimize(model, x, passes=[Quantize(**options)])
    exported = optimized.export_onnx(tmp_path / "linear.onnx", opset=opset)
    count = 256 * 512 + 512 * 128
    assert (tmp_path / "linear.onnx").stat().st_size < bytes_per_weight * count + 20_000
    assert exported.opset == opset
    kinds = {t.data_type for t in onnx.load(tmp_path / "linear.onnx").graph.initializer
             if len(t.dims) == 2 and t.dims[0] * t.dims[1] > 50_000}  # fmt: skip
    assert kinds == {onnx.TensorProto.INT8}


def test_groups_need_opset_21(tmp_path: Path) -> None:
    model = nn.Linear(64, 8).eval()
    one = Quantize(activations=None, weights="int4", group_size=32)
    optimized = graphopt.optimize(model, torch.randn(2, 64), passes=[one])
    with pytest.raises(ExportError, match="needs opset 21"):
        optimized.export_onnx(tmp_path / "linear.onnx")
