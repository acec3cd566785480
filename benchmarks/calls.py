"""Calls side by side with torch eager: a small MLP (overhead) and a real network (kernels).

The two are called in turn, A B A B, in one process; medians and their ratio are reported.

    python benchmarks/calls.py [--network resnet50] [--size 224] [--threads N] [--out calls.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, inner: int = 1
) -> dict[str, float]:
    """Median seconds of one call of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def small_network(threads: int | None) -> dict[str, float]:
    """A three-layer MLP at batch 1, where the call itself is what costs."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    x = torch.randn(1, 64)
    optimized = graphopt.optimize(model, x, threads=threads)
    return interleaved({"torch": lambda: model(x), "graphopt": lambda: optimized(x)}, 200, 50)


def real_network(name: str, size: int, threads: int | None) -> dict[str, float]:
    """A network of the zoo at batch 1."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.zoo import NETWORKS

    model, inputs = NETWORKS[name].build(size), NETWORKS[name].inputs(1, size)
    optimized = graphopt.optimize(model, inputs.example(), threads=threads)
    return interleaved(
        {"torch": lambda: inputs.call(model), "graphopt": lambda: inputs.call(optimized)}, 30
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        results = {
            "3-layer MLP, batch 1": small_network(options.threads),
            f"{options.network}, {options.size} pixels, batch 1": real_network(
                options.network, options.size, options.threads
            ),
        }
    table = Table(title="median time of a call")
    for column in ("network", "torch eager", "graphopt", "graphopt / torch"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, times in results.items():
        cells = [f"{times[key] * 1e6:,.1f} us" for key in ("torch", "graphopt")]
        table.add_row(name, *cells, f"{times['graphopt'] / times['torch']:.3f}")
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
