"""int8 networks in graphopt, ONNX Runtime and OpenVINO, beside float32: interleaved calls.

Ranges of activations are the least and largest numbers in one batch, in graphopt and in ONNX
Runtime's own quantizer alike; weights are quantized per output channel, to the nearest step.
OpenVINO, where it is installed, runs what NNCF quantizes with the same batch. BERT's activations
are quantized while it runs ("dynamic") in graphopt and ONNX Runtime, and by NNCF with ranges. With
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import BACKENDS, NETWORKS, ROOT, Inputs, Run, arguments_of, interleaved, machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import graphopt
from graphopt.passes import Prune, Quantize

IMAGES = ("resnet50", "mobilenet_v2", "efficientnet_lite0")
TOKENS = ("bert_6x384",)


def pruning(network: nn.Module, blocks: str, sparsity: float) -> list[Prune]:
    """The pass for blocks of weights, or none for "dense"."""
    if blocks == "dense":
        return []
    convolutions = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    return [Prune(sparsity, granularity=blocks, ignore=convolutions[:1])]


# -- backends ------------------------------------------------------------------------------------


def _graphopt_int8(network: nn.Module, inputs: Inputs, passes: list[Prune], threads: int) -> Run:
    given = arguments_of(inputs)
    if "x" in inputs:
        quantize = Quantize(data=[given], observer="min-max", method="nearest", correct_bias=False)
    else:
        quantize = Quantize(activations="dynamic")
    optimized = graphopt.optimize(network, given, [*passes, quantize], threads=threads)
    return (lambda: optimized(given)) if "x" in inputs else (lambda: optimized(**inputs))


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


def _quantize_dynamically(model: Path, target: Path) -> None:
    """Let ONNX Runtime quantize the constant operands of products, per output channel."""
    from onnxruntime import quantization

    quantization.quantize_dynamic(
        model, target, per_channel=True, weight_type=quantization.QuantType.QInt8
    )


def quantize_nncf(
    model: Path, target: Path, batches: Sequence[Sequence[torch.Tensor]], transformer: bool = False
) -> None:
    """Let NNCF make a model's int8 form, as it does where nothing is said.

    Args:
        model, target, batches: as for `quantize_onnx`.
        transformer: what its guide says about such models.
    """
    import nncf
    import onnx

    loaded = onnx.load(model)
    names = [value.name for value in loaded.graph.input]
    feeds = [{n: x.numpy() for n, x in zip(names, one, strict=True)} for one in batches]
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    data = nncf.Dataset(feeds)
    onnx.save(nncf.quantize(loaded, data, subset_size=len(feeds), model_type=kind), target)


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
    with_openvino = find_spec("openvino") is not None and find_spec("nncf") is not None
    by_nncf = model.with_name(f"{model.stem}-nncf.onnx")
    with torch.no_grad():
        if not quantized.exists():
            pruned = graphopt.optimize(network, arguments_of(inputs), passes)
            pruned.export_onnx(model, verify=False)
            if name in TOKENS:
                _quantize_dynamically(model, quantized)
            else:
                quantize_onnx(model, quantized, [list(inputs.values())])
        if with_openvino and not by_nncf.exists():
            quantize_nncf(model, by_nncf, [list(inputs.values())], name in TOKENS)
        in_onnxruntime = BACKENDS["onnxruntime"]
        runs = {
            "graphopt int8": _graphopt_int8(network, inputs, passes, threads),
            "onnxruntime fp32": in_onnxruntime(network, inputs, threads, model),
            "onnxruntime int8": in_onnxruntime(network, inputs, threads, quantized),
        }
        if with_openvino:
            runs["openvino int8"] = BACKENDS["openvino"](network, inputs, threads, by_nncf)
        seconds = interleaved(runs, rounds)
    return {"network": name, "form": form, "seconds": seconds}


def show(console: Console, records: list[dict[str, Any]], threads: int) -> None:
    """Milliseconds of every backend, and the ratios."""
    table = Table(title=f"milliseconds of a call, batch 1, {threads} threads")
    for column in ("network", "weights", *records[0]["seconds"]):
        table.add_column(column, justify="right")
    peers = [name for name in records[0]["seconds"] if name != "graphopt int8"]
    for peer in peers:
        table.add_column(f"to {peer}", justify="right")
    for record in records:
        seconds = record["seconds"]
        own = seconds["graphopt int8"]
        cells = [record["network"], record["form"]]
        cells += [f"{value * 1e3:.2f}" for value in seconds.values()]
        table.add_row(*cells, *(f"{own / seconds[peer]:.3f}" for peer in peers))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=[*IMAGES, *TOKENS])
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
    networks = options.networks or [*IMAGES, *TOKENS]
    jobs = [(name, form) for name in networks for form in options.blocks]
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
