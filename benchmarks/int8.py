"""int8 networks in graphopt and in ONNX Runtime, beside float32: time of a call, interleaved.

Ranges of activations are the least and largest numbers in one batch, in graphopt and in ONNX
Runtime's own quantizer alike; weights are quantized per output channel, to the nearest step. With
``--blocks 2x4 --sparsity 0.8``, blocks of so many output by so many input channels with the
smallest weights are zero in all of them; the first and depthwise convolutions stay dense.

    python benchmarks/int8.py
    python benchmarks/int8.py --networks resnet50 --blocks 1x4 2x4 --sparsity 0.8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import BACKENDS, NETWORKS, ROOT, Inputs, Run, interleaved, machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import graphopt
from graphopt.passes import Prune, Quantize

IMAGES = ("resnet50", "mobilenet_v2", "efficientnet_lite0")


def pruning(network: nn.Module, blocks: str, sparsity: float) -> list[Prune]:
    """The pass for blocks of weights, or none for "dense"."""
    if blocks == "dense":
        return []
    first = next(name for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    return [Prune(sparsity, granularity=blocks, ignore=first)]


# -- backends ------------------------------------------------------------------------------------


def _graphopt_int8(network: nn.Module, inputs: Inputs, passes: list[Prune], threads: int) -> Run:
    x = inputs["x"]
    quantize = Quantize(data=[x], observer="min-max", method="nearest", correct_bias=False)
    optimized = graphopt.optimize(network, x, [*passes, quantize], threads=threads)
    return lambda: optimized(x)


def quantize_onnx(model: Path, target: Path, batches: Iterable[Sequence[torch.Tensor]]) -> None:
    """Let ONNX Runtime's static quantizer make a model's int8 form: weights per channel, ranges
    by minimum and maximum.

    Args:
        model: what to quantize.
        target: where to write.
        batches: calibration data, one tensor per input of the model.
    """
    import onnx
    from onnxruntime import quantization

    names = [value.name for value in onnx.load(model).graph.input]
    feeds = ({n: x.numpy() for n, x in zip(names, batch, strict=True)} for batch in batches)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    quantization.quantize_static(
        model,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def measure(
    name: str,
    blocks: str,
    sparsity: float,
    threads: int,
    rounds: int,
    folder: Path,
) -> dict[str, Any]:
    """One network: seconds per call, by backend. Exported models in ``folder`` are taken."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name](1)
    passes = pruning(network, blocks, sparsity)
    form = f"{blocks} {sparsity:.0%}" if passes else blocks
    model = folder / f"{name}-{form.replace(' ', '-').rstrip('%')}.onnx"
    quantized = model.with_name(f"{model.stem}-int8.onnx")
    with torch.no_grad():
        if not quantized.exists():
            pruned = graphopt.optimize(network, inputs["x"], passes)
            pruned.export_onnx(model, verify=False)
            quantize_onnx(model, quantized, [list(inputs.values())])
        in_onnxruntime = BACKENDS["onnxruntime"]
        runs = {
            "graphopt int8": _graphopt_int8(network, inputs, passes, threads),
            "onnxruntime fp32": in_onnxruntime(network, inputs, threads, model),
            "onnxruntime int8": in_onnxruntime(network, inputs, threads, quantized),
        }
        seconds = interleaved(runs, rounds)
    return {"network": name, "form": form, "seconds": seconds}


def show(console: Console, records: list[dict[str, Any]], threads: int) -> None:
    """Milliseconds of every backend, and the ratios."""
    table = Table(title=f"milliseconds of a call, batch 1, {threads} threads")
    for column in ("network", "weights", *records[0]["seconds"]):
        table.add_column(column, justify="right")
    table.add_column("to fp32", justify="right")
    table.add_column("to int8", justify="right")
    for record in records:
        seconds = record["seconds"]
        own = seconds["graphopt int8"]
        cells = [record["network"], record["form"]]
        cells += [f"{value * 1e3:.2f}" for value in seconds.values()]
        ratios = [own / seconds[f"onnxruntime {kind}"] for kind in ("fp32", "int8")]
        table.add_row(*cells, *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--blocks", nargs="+", default=["dense"], help="dense, 1x4, 2x4, 4x4")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", type=Path, help="keep exported models here for another run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    jobs = [(name, form) for name in options.networks for form in options.blocks]
    records: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"int8-threads{options.threads}.json"
    with tempfile.TemporaryDirectory() as own, Progress(console=console) as progress:
        folder = options.models or Path(own)
        folder.mkdir(parents=True, exist_ok=True)
        task = progress.add_task("measuring", total=len(jobs))
        for name, form in jobs:
            progress.update(task, description=f"{name}, {form}")
            records.append(
                measure(name, form, options.sparsity, options.threads, options.rounds, folder)
            )
            file.write_text(json.dumps({"machine": machine(), "records": records}, indent=1))
            progress.advance(task)
    show(console, records, options.threads)


if __name__ == "__main__":
    main()
