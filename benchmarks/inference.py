"""Dense and sparse networks in graphopt and its peers, interleaved: one table and one plot.

Every backend runs the same weights. Sparse weights are pruned by magnitude, per layer; the first
convolution, depthwise convolutions and embeddings stay dense. Backends are called in turn, a few
calls each, with a pause in which the threads of the one before go to sleep; medians and ratios are
reported.

    python benchmarks/inference.py                       # all networks, dense, 80 % and 90 % sparse
    python benchmarks/inference.py --networks resnet50 --sparsity 0 0.9 --backends graphopt torch
    python benchmarks/inference.py --batch 16 --threads 1
    python benchmarks/inference.py --networks resnet50 --busy 2   # beside two programs that compute
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import graphopt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

REFERENCE = "onnxruntime"
PAUSE = 0.05
"""Seconds in which the spinning threads of a backend go to sleep."""
SECONDS_PER_TURN = 0.15
Run = Callable[[], Any]
Inputs = dict[str, torch.Tensor]


# -- networks ------------------------------------------------------------------------------------


def _zoo_image(name: str) -> Callable[[int], tuple[nn.Module, Inputs]]:
    def build(batch: int) -> tuple[nn.Module, Inputs]:
        from zoo import NETWORKS

        return NETWORKS[name].build(224), {"x": torch.randn(batch, 3, 224, 224)}

    return build


def _efficientnet_lite0(batch: int) -> tuple[nn.Module, Inputs]:
    from graphopt.demo import load_model

    return load_model(), {"x": torch.randn(batch, 3, 224, 224)}


def _bert(batch: int) -> tuple[nn.Module, Inputs]:
    """Six layers of 384, 128 tokens."""
    import zoo

    zoo.import_torchvision()
    import transformers

    configuration = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    network = transformers.BertModel(configuration).eval()
    return network, {"input_ids": torch.randint(0, 30000, (batch, 128))}


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Inputs]]] = {
    "resnet50": _zoo_image("resnet50"),
    "mobilenet_v2": _zoo_image("mobilenet_v2"),
    "efficientnet_lite0": _efficientnet_lite0,
    "vit_b_32": _zoo_image("vit_b_32"),
    "deit_tiny": _zoo_image("timm/deit_tiny_patch16_224"),
    "bert_6x384": _bert,
}


def prune(network: nn.Module, sparsity: float) -> None:
    """Set the smallest weights of every layer to zero, in place."""
    first = True
    for module in network.modules():
        weight = None
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            if not first and module.groups < module.in_channels:
                weight = module.weight
            first = False
        elif isinstance(module, nn.Linear):
            weight = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            weight = module.in_proj_weight
        if weight is None or sparsity == 0:
            continue
        with torch.no_grad():
            count = math.ceil(sparsity * weight.numel())
            threshold = weight.abs().flatten().kthvalue(count).values
            weight[weight.abs() <= threshold] = 0


# -- backends ------------------------------------------------------------------------------------


def _graphopt(network: nn.Module, inputs: Inputs, threads: int, model: Path) -> Run:
    optimized = graphopt.optimize(network, arguments_of(inputs), threads=threads)
    return lambda: _call(optimized, inputs)


def _torch(network: nn.Module, inputs: Inputs, threads: int, model: Path) -> Run:
    return lambda: _call(network, inputs)


def _compiled(network: nn.Module, inputs: Inputs, threads: int, model: Path) -> Run:
    import torch._inductor.config

    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    compiled: Any = torch.compile(network)
    return lambda: _call(compiled, inputs)


def _onnxruntime(network: nn.Module, inputs: Inputs, threads: int, model: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in _named(session.get_inputs(), inputs)}
    return lambda: session.run(None, feed)


def _openvino(network: nn.Module, inputs: Inputs, threads: int, model: Path) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    arrays = [x.numpy() for x in inputs.values()]
    return lambda: request.infer(arrays)


BACKENDS: dict[str, Callable[[nn.Module, Inputs, int, Path], Run]] = {
    "graphopt": _graphopt,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
    "torch.compile": _compiled,
    "openvino": _openvino,
}
PACKAGES = {"torch.compile": "torch"}


def _named(values: Sequence[Any], inputs: Inputs) -> list[tuple[Any, torch.Tensor]]:
    return list(zip(values, inputs.values(), strict=True))


def arguments_of(inputs: Inputs) -> Any:
    """Images are given by position, tokens by name."""
    return inputs["x"] if set(inputs) == {"x"} else inputs


def _call(network: Any, inputs: Inputs) -> Any:
    return network(inputs["x"]) if set(inputs) == {"x"} else network(**inputs)


# -- measuring -----------------------------------------------------------------------------------


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each; backends take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            run()
            own: list[float] = []
            while sum(own) < SECONDS_PER_TURN or len(own) < 3:
                start = time.perf_counter()
                run()
                own.append(time.perf_counter() - start)
            if turn:
                times[name].append(statistics.median(own))
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Meanwhile so many other processes compute."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    name: str, sparsity: float, backends: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """One network at one sparsity in all backends: seconds per call, by backend."""
    batch, threads = options.batch, options.threads
    torch.manual_seed(0)
    torch._dynamo.reset()  # type: ignore[attr-defined]
    network, inputs = NETWORKS[name](batch)
    prune(network, sparsity)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Path(folder) / "model.onnx"
        if {"onnxruntime", "openvino"} & set(backends):
            plain = graphopt.optimize(network, arguments_of(inputs))
            plain.export_onnx(model, verify=False)
        runs = {one: BACKENDS[one](network, inputs, threads, model) for one in backends}
        for run in runs.values():
            run()
        with busy(options.busy):
            seconds = interleaved(runs, options.rounds)
    return {
        "network": name,
        "sparsity": sparsity,
        "batch": batch,
        "threads": threads,
        "busy": options.busy,
        "seconds": seconds,
    }


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    found = {"cpu": model, "cores": str(len(os.sched_getaffinity(0))), "numpy": np.__version__}
    for package in ("graphopt", "torch", "onnxruntime", "openvino", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# -- reporting -----------------------------------------------------------------------------------


def show(console: Console, records: list[dict[str, Any]], backends: Sequence[str]) -> None:
    """Milliseconds of every backend, and the ratio to the reference."""
    first = records[0]
    title = f"milliseconds of a call, batch {first['batch']}, {first['threads']} threads"
    if first["busy"]:
        title += f", beside {first['busy']} processes that compute"
    table = Table(title=title)
    table.add_column("network")
    table.add_column("sparsity", justify="right")
    for name in backends:
        table.add_column(name, justify="right")
    table.add_column(f"graphopt / {REFERENCE}", justify="right")
    for record in records:
        seconds = record["seconds"]
        cells = [record["network"], f"{record['sparsity']:.0%}"]
        cells += [f"{seconds[name] * 1e3:.2f}" for name in backends]
        known = "graphopt" in seconds and REFERENCE in seconds
        cells.append(f"{seconds['graphopt'] / seconds[REFERENCE]:.3f}" if known else "")
        table.add_row(*cells)
    console.print(table)


def plot(records: list[dict[str, Any]], backends: Sequence[str], path: Path) -> None:
    """Bars of every backend, relative to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.2 * len(records) + 3, 4.5))
    bar = 0.8 / len(backends)
    base = REFERENCE if REFERENCE in backends else backends[0]
    for place, name in enumerate(backends):
        heights = [record["seconds"][name] / record["seconds"][base] for record in records]
        offsets = [index + place * bar for index in range(len(records))]
        axes.bar(offsets, heights, bar, label=name)
    labels = [f"{record['network']}\n{record['sparsity']:.0%} sparse" for record in records]
    axes.set_xticks([index + 0.4 - bar / 2 for index in range(len(records))], labels, fontsize=7)
    axes.set_ylabel(f"time relative to {base}")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.8, 0.9])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all installed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    backends = options.backends or [
        name for name in BACKENDS if find_spec(PACKAGES.get(name, name)) is not None
    ]
    jobs = [(name, sparsity) for name in options.networks for sparsity in options.sparsity]
    console = Console() if sys.stdout.isatty() else Console(width=120)
    records: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"inference-batch{options.batch}-threads{options.threads}.json"
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        for name, sparsity in jobs:
            progress.update(task, description=f"{name}, {sparsity:.0%} sparse")
            records.append(measure(name, sparsity, backends, options))
            file.write_text(json.dumps({"machine": machine(), "records": records}, indent=1))
            progress.advance(task)
    show(console, records, backends)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if find_spec("matplotlib") is not None:
        plot(records, backends, file.with_suffix(".png"))
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
