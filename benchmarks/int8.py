"""int8 networks in graphopt and in ONNX Runtime, beside float32: time of a call, interleaved.

Ranges of activations are the least and largest numbers in one batch, in graphopt and in ONNX
Runtime's own quantizer alike; weights are quantized per output channel. With ``--blocks 2x4
--sparsity 0.8``, blocks of so many output by so many input channels with the smallest weights are
zero in all of them. Convolutions of the image itself and depthwise ones stay dense.

    python benchmarks/int8.py
    python benchmarks/int8.py --networks resnet50 --blocks 1x4 2x4 --sparsity 0.8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import NETWORKS, ROOT, Inputs, Run, arguments_of, interleaved, machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt import reference
from graphopt.engine import compile_graph
from graphopt.ir import Graph, Node, Value

IMAGES = ("resnet50", "mobilenet_v2", "efficientnet_lite0")
_CLAMPS = "aten.relu aten.relu6 aten.hardtanh aten.clamp aten.clamp_min aten.clamp_max".split()
_PADS = ("aten.pad", "aten.constant_pad_nd")
_PRODUCTS = ("aten.conv2d", "aten.conv2d.padding", "aten.linear")
_SAME_SCALE = (
    "aten.max_pool2d",
    "aten.avg_pool2d",
    "aten.adaptive_avg_pool2d",
    "aten.mean.dim",
    "aten.flatten.using_ints",
)


def prune_blocks(network: nn.Module, rows: int, columns: int, sparsity: float) -> None:
    """Set the blocks with the smallest weights of every layer to zero, in place."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        outputs, inputs = weight.shape[:2]
        if outputs % rows or inputs % columns:
            continue
        blocks = weight.reshape(outputs // rows, rows, inputs // columns, columns, -1)
        sizes = blocks.abs().sum((1, 3), keepdim=True)
        threshold = sizes.flatten().kthvalue(max(int(sparsity * sizes.numel()), 1)).values
        with torch.no_grad():
            module.weight.copy_((blocks * (sizes > threshold)).reshape(weight.shape))


# -- quantize and dequantize nodes by least and largest numbers -----------------------------------


def quantize(graph: Graph, inputs: list[Tensor]) -> None:
    """Quantize a graph's layers and what flows between them, in place."""
    shared: dict[Value, Value] = {}
    ends = list(graph.inputs)
    for node in graph.nodes:
        if node.op in (*_PRODUCTS, "aten.add.Tensor", "aten.cat"):
            end = _end(node)
            if end not in ends and not end.is_output:
                ends.append(end)
        elif node.op in _SAME_SCALE and node["self"] in ends:
            shared[node.output] = shared.get(node["self"], node["self"])
            ends.append(node.output)
    ranges = dict(zip(graph.inputs, map(_range, inputs), strict=True))

    def observe(node: Node, results: list[Tensor]) -> None:
        for value, result in zip(node.outputs, results, strict=True):
            if value in ends:
                ranges[value] = _range(result)

    reference.run(graph, inputs, observe=observe)
    for end in ends:
        _through_bytes(graph, end, *ranges[shared.get(end, end)])
    for node in list(graph.nodes):
        if node.op in _PRODUCTS:
            _quantize_layer(graph, node)


def _end(node: Node) -> Value:
    """What a layer yields after the sum and the activations that follow it alone."""
    value = node.output
    while (user := value.only_user()) is not None:
        is_sum = user.op == "aten.add.Tensor" and node.op in _PRODUCTS
        if not is_sum and user.op not in _CLAMPS:
            break
        value = user.output
    return value


def _range(x: Tensor) -> tuple[float, float]:
    return min(0.0, float(x.min())), max(0.0, float(x.max()))


def _through_bytes(graph: Graph, value: Value, low: float, high: float) -> None:
    scale = max((high - low) / 255, 1e-8)
    users = list(value.users)
    parameters = (
        graph.constant(torch.tensor(scale)),
        graph.constant(torch.tensor(round(-low / scale), dtype=torch.uint8)),
    )
    scheme = (*parameters, None, 0, 255, torch.uint8)
    first = next(node for node in graph.nodes if node in users)
    q = graph.add("graphopt.quantize", value, *scheme, before=first)
    back = graph.add("graphopt.dequantize", q, *scheme, before=first)
    for user in users:
        for name, operand in list(user.operands.items()):
            if operand is value:
                graph.set_operand(user, name, back)
            elif isinstance(operand, list | tuple) and value in operand:
                graph.set_operand(user, name, [back if v is value else v for v in operand])


def _quantize_layer(graph: Graph, node: Node) -> None:
    """A layer's weight as int8, its bias as int32."""
    source = node["input"].producer
    while source is not None and source.op in _PADS:
        source = source["self"].producer
    if source is None or source.op != "graphopt.dequantize":
        return
    weight = node["weight"].constant.detach()
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=1e-8)
    along = scale.reshape(-1, *[1] * (weight.dim() - 1))
    steps = (weight / along).round().clamp(-127, 127).to(torch.int8)
    made = graph.add(
        "graphopt.dequantize", graph.constant(steps), graph.constant(scale), None, 0, -127, 127,
        torch.int8, before=node,
    )  # fmt: skip
    graph.set_operand(node, "weight", made)
    if node["bias"] is None:
        return
    unit = scale * source["scale"].constant
    bias = (node["bias"].constant.detach() / unit).round().to(torch.int32)
    made = graph.add(
        "graphopt.dequantize", graph.constant(bias), graph.constant(unit), None, 0, -(2**31),
        2**31 - 1, torch.int32, before=node,
    )  # fmt: skip
    graph.set_operand(node, "bias", made)


# -- backends ------------------------------------------------------------------------------------


def _graphopt_int8(network: nn.Module, inputs: Inputs, threads: int) -> Run:
    graph = graphopt.optimize(network, arguments_of(inputs), threads=threads).graph.clone()
    given = list(inputs.values())
    quantize(graph, given)
    plan = compile_graph(graph, threads=threads)
    return lambda: plan.run(*given)


def _onnxruntime(model: Path, inputs: Inputs, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs.values(), strict=True)}
    return lambda: session.run(None, feed)


def _quantize_onnx(model: Path, target: Path, inputs: Inputs) -> None:
    """Let ONNX Runtime's quantizer make a model's int8 form, with the same batch."""
    import onnx
    from onnxruntime import quantization

    names = [value.name for value in onnx.load(model).graph.input]
    batches = iter([{name: x.numpy() for name, x in zip(names, inputs.values(), strict=True)}])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

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
    blocks: tuple[int, int] | None,
    sparsity: float,
    threads: int,
    rounds: int,
    folder: Path,
) -> dict[str, Any]:
    """One network: seconds per call, by backend. Exported models in ``folder`` are taken."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name](1)
    if blocks is not None:
        prune_blocks(network, *blocks, sparsity)
    form = "dense" if blocks is None else f"{blocks[0]}x{blocks[1]} {sparsity:.0%}"
    model = folder / f"{name}-{form.replace(' ', '-').rstrip('%')}.onnx"
    quantized = model.with_name(f"{model.stem}-int8.onnx")
    with torch.no_grad():
        if not quantized.exists():
            graphopt.optimize(network, arguments_of(inputs)).export_onnx(model, verify=False)
            _quantize_onnx(model, quantized, inputs)
        runs = {
            "graphopt int8": _graphopt_int8(network, inputs, threads),
            "onnxruntime fp32": _onnxruntime(model, inputs, threads),
            "onnxruntime int8": _onnxruntime(quantized, inputs, threads),
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
            rows, _, columns = form.partition("x")
            blocks = None if form == "dense" else (int(rows), int(columns))
            records.append(
                measure(name, blocks, options.sparsity, options.threads, options.rounds, folder)
            )
            file.write_text(json.dumps({"machine": machine(), "records": records}, indent=1))
            progress.advance(task)
    show(console, records, options.threads)


if __name__ == "__main__":
    main()
