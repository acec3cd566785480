"""How long the first call of a network takes: with an empty cache, and in a new process after it.

Imports and torch's own tracing are timed apart. Every measurement is a process of its own.

    python benchmarks/start_up.py [--network resnet50] [--size 224] [--sparsity 0.9] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

PARTS = ("imports", "torch.export", "trace", "passes", "plan", "run", "second call")


def measure(network: str, size: int, sparsity: float) -> dict[str, float]:
    """Seconds of each part of a first call, in this process."""
    warnings.simplefilter("ignore")
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    import torch

    import graphopt
    from graphopt.api import EXACT
    from graphopt.engine import compile_graph

    mark()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.inference import prune
    from tests.zoo import NETWORKS

    model = NETWORKS[network].build(size)
    prune(model, sparsity)
    inputs = NETWORKS[network].inputs(1, size)
    start = time.perf_counter()
    torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    exported = time.perf_counter() - start
    start = time.perf_counter()
    graph = graphopt.trace(model, inputs.example())
    traced = time.perf_counter() - start
    start = time.perf_counter()
    graphopt.Pipeline(EXACT).run(graph)
    passed = time.perf_counter() - start
    start = time.perf_counter()
    plan = compile_graph(graph, threads=len(os.sched_getaffinity(0)))
    planned = time.perf_counter() - start
    tensors = graph.interface.tensors(inputs.args, inputs.kwargs or {})
    runs = []
    for _ in range(2):
        start = time.perf_counter()
        plan.run(*tensors)
        runs.append(time.perf_counter() - start)
    values = (marks[1] - marks[0], exported, traced, passed, planned, *runs)
    return dict(zip(PARTS, values, strict=True))


def in_new_process(network: str, size: int, sparsity: float, cache: str) -> dict[str, float]:
    """The same, in a process with the given cache folder."""
    command = [sys.executable, __file__, "--measure", "--network", network, "--size", str(size)]
    command += ["--sparsity", str(sparsity)]
    environment = {**os.environ, "GRAPHOPT_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.network, options.size, options.sparsity)))
        return
    with tempfile.TemporaryDirectory() as cache:
        results = {
            name: in_new_process(options.network, options.size, options.sparsity, cache)
            for name in ("cold cache", "warm cache")
        }
    name = f"{options.network}, {options.size} pixels, {options.sparsity:.0%} sparse, batch 1"
    table = Table(title=f"first call of {name} [s]")
    table.add_column("part")
    for name in results:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{result[part]:.3f}" for result in results.values()))
    ours = {
        name: sum(result[part] for part in ("trace", "passes", "plan", "run"))
        - result["torch.export"]
        for name, result in results.items()
    }
    table.add_row("graphopt's own", *(f"{seconds:.3f}" for seconds in ours.values()))
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps({"network": options.network, **results, "own": ours}))


if __name__ == "__main__":
    main()
