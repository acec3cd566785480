"""Accuracy of int8 after training: EfficientNet-Lite0 with its ImageNet weights, and its peers.

Calibration crops come from some photographs, evaluation crops from others. Every way of quantizing
gets the same crops; agreement is the share of evaluation crops with the same top-1 class as in
float32, SQNR the ratio of the logits' power to that of their error. graphopt's networks are
evaluated by torch, operator by operator; the others in onnxruntime.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --ways default onnxruntime nncf
    python benchmarks/quantization.py --memory        # of calibration, with 16 and 1,024 batches
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8 import quantize_nncf, quantize_onnx
from photographs import CALIBRATION, EVALUATION, crops
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt import reference
from graphopt.comparison import Difference
from graphopt.demo import load_model
from graphopt.passes import EXACT, Quantize
from graphopt.pipeline import Context, Pipeline

BATCH = 16

GRAPHOPT: dict[str, dict[str, Any]] = {
    "default": {},
    "first layer in floats": {"ignore": ["_conv_stem"]},
    "reconstruction": {"method": "reconstruction"},
    "equalised": {"equalise": 0.5},
    "nearest, bias corrected": {"method": "nearest"},
    "nearest, min-max": {
        "method": "nearest", "correct_bias": False, "observer": "min-max"
    },
    "for onnxruntime": {"fuse_additions": False},
    "int8 activations": {"activations": "int8"},
    "per tensor": {"per_channel": False},
    "mixed to 24 dB": {"target_sqnr": 24.0},
}  # fmt: skip
PEERS = ("onnxruntime", "nncf")
Way = Callable[[Tensor, Tensor], tuple[Tensor, str]]


def quantize(source: graphopt.Graph, options: dict[str, Any]) -> Way:
    """A graph quantized with calibration crops: logits of the evaluation crops, and remarks."""

    def way(calibration: Tensor, evaluation: Tensor) -> tuple[Tensor, str]:
        graph, ctx = source.clone(), Context()
        Pipeline([Quantize(data=calibration.split(BATCH), **options)]).run(graph, ctx)
        rows = ctx.reports[0].rows
        floats = [str(row[0]) for row in rows if row[1] == "floats"]
        remark = f"{len(rows) - len(floats)} of {len(rows)} layers"
        return logits(graph, evaluation), "; ".join([remark, *floats])

    return way


def logits(graph: graphopt.Graph, crops: Tensor) -> Tensor:
    return torch.cat([reference.run(graph, [x])[0] for x in crops.split(BATCH)])


def in_onnxruntime(path: Path, crops: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    outputs = [session.run(None, {given.name: x.numpy()})[0] for x in crops.split(BATCH)]
    return torch.from_numpy(np.concatenate(outputs))


def onnxruntime_quantizer(network: nn.Module) -> Way:
    """Its static quantizer: QDQ, weights per channel, ranges by minimum and maximum."""

    def way(calibration: Tensor, evaluation: Tensor) -> tuple[Tensor, str]:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory() as folder:
            source, prepared, path = (Path(folder) / f"{n}.onnx" for n in ("a", "b", "c"))
            _export(network, source)
            quant_pre_process(source, prepared)
            quantize_onnx(prepared, path, ([x] for x in calibration.split(BATCH)))
            return in_onnxruntime(path, evaluation), "all layers"

    return way


def nncf_quantizer(network: nn.Module) -> Way:
    """NNCF's, of the ONNX file, as it comes."""

    def way(calibration: Tensor, evaluation: Tensor) -> tuple[Tensor, str]:
        with tempfile.TemporaryDirectory() as folder:
            source, path = (Path(folder) / f"{n}.onnx" for n in "ab")
            _export(network, source)
            quantize_nncf(source, path, [[x] for x in calibration.split(1)])
            return in_onnxruntime(path, evaluation), "all layers"

    return way


def _export(network: nn.Module, path: Path) -> None:
    optimized = graphopt.optimize(network, torch.randn(2, 3, 224, 224))
    optimized.export_onnx(path, verify=False)


def compare(ways: list[str], calibration_count: int, evaluation_count: int) -> Table:
    network = load_model()
    source = graphopt.trace(network, torch.randn(2, 3, 224, 224))
    Pipeline(EXACT).run(source)
    calibration = crops(CALIBRATION, calibration_count)
    evaluation = crops(EVALUATION, evaluation_count, seed=1)
    expected = logits(source, evaluation)
    known: dict[str, Way] = {name: quantize(source, given) for name, given in GRAPHOPT.items()}
    known |= {"onnxruntime": onnxruntime_quantizer(network), "nncf": nncf_quantizer(network)}
    title = f"{calibration_count} calibration crops, {evaluation_count} evaluation crops"
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for column in ("top-1 agreement", "SQNR of logits [dB]", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("in int8", overflow="fold")
    for name in ways:
        started = time.perf_counter()
        actual, remark = known[name](calibration, evaluation)
        seconds = time.perf_counter() - started
        same = (expected.argmax(1) == actual.argmax(1)).double().mean().item()
        ratio = Difference.between("logits", "", expected, actual).sqnr
        row = (name, f"{same:.1%}", f"{ratio:.1f}", f"{seconds:.0f}", remark)
        table.add_row(*row)
        print("  ".join(row), file=sys.stderr, flush=True)
    return table


class Noise:
    """Batches that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self._count):
            yield torch.randn(8, 3, 64, 64, generator=generator)


def calibration_memory(count: int) -> float:
    """Peak memory of this process in MB after calibrating with so many batches."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    graph = graphopt.trace(network.eval(), torch.randn(2, 3, 64, 64))
    Pipeline([Quantize(data=Noise(count))]).run(graph)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ways", nargs="+", default=[*GRAPHOPT, *PEERS])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--evaluation", type=int, default=300)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.batches:
        print(calibration_memory(given.batches))
        return
    if given.memory:
        for count in (16, 1024):
            command = [sys.executable, __file__, "--batches", str(count)]
            peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{count:5} batches: peak of the process {float(peak):.0f} MB")
        return
    warnings.simplefilter("ignore")
    with torch.no_grad():
        table = compare(given.ways, given.calibration, given.evaluation)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
