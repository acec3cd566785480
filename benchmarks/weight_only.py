"""A linear layer whose weight alone has 8 or 4 bits, beside torch's float32 layer: one row.

Such a layer reads its weight once and does little else, so that its time is that of reading
memory. The roof is measured in the same run: bytes per second of a copy that no cache holds, or
those that the float32 layer reads, if it is faster. Enough layers of one kind are called in turn
that no call finds its weight in a cache; with ``--cached`` it is one layer again and again.

    python benchmarks/weight_only.py
    python benchmarks/weight_only.py --size 11008 4096 --cached
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inference import ROOT, Run, interleaved, machine
from layers import peak_bytes
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from graphopt.passes import Quantize

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4, groups of 32": {"weights": "int4", "group_size": 32},
    "int4, groups of 128": {"weights": "int4", "group_size": 128},
}
BITS = {"int8": 8.0, "int4, groups of 32": 5.0, "int4, groups of 128": 4.25}
"""Bits of a weight and its share of a float32 scale."""
UNCACHED = 96 * 2**20
"""Bytes of weights that no cache holds."""


def in_turn(calls: list[Run]) -> Run:
    """One call of the next of them."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def optimized(layer: nn.Module, x: torch.Tensor, threads: int, given: dict[str, Any]) -> Run:
    passes = [Quantize(activations=None, **given)] if given else []
    model = graphopt.optimize(layer, x, passes, threads=threads)
    return lambda: model(x)


def measure(outputs: int, inputs: int, threads: int, rounds: int, cached: bool) -> dict[str, float]:
    """Median seconds of a call, by form."""
    torch.manual_seed(0)
    x = torch.randn(1, inputs)
    forms: dict[str, Callable[[nn.Linear], Run]] = {
        "torch float32": lambda layer: lambda: layer(x),
        "graphopt float32": lambda layer: optimized(layer, x, threads, {}),
    }
    for name, given in FORMS.items():
        forms[name] = lambda layer, given=given: optimized(layer, x, threads, given)
    runs = {}
    with torch.no_grad():
        for name, form in forms.items():
            size = outputs * inputs * BITS.get(name, 32.0) / 8
            count = 1 if cached else math.ceil(UNCACHED / size)
            runs[name] = in_turn([form(nn.Linear(inputs, outputs).eval()) for _ in range(count)])
        return interleaved(runs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs=2, type=int, default=[4096, 4096], help="outputs, inputs")
    parser.add_argument("--cached", action="store_true", help="one layer again and again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    outputs, inputs = options.size
    torch.set_num_threads(options.threads)
    seconds = measure(outputs, inputs, options.threads, options.rounds, options.cached)
    rates = {n: outputs * inputs * BITS.get(n, 32.0) / 8 / one for n, one in seconds.items()}
    roof = max(peak_bytes(), rates["graphopt float32"])
    where = "cached" if options.cached else "uncached"
    table = Table(title=f"{outputs} x {inputs}, one row, {options.threads} threads, {where}")
    for column in ("weight", "microseconds", "to torch", "GB/s", "of the roof"):
        table.add_column(column, justify="right")
    for name, one in seconds.items():
        ratio = one / seconds["torch float32"]
        rate = rates[name]
        cells = (f"{one * 1e6:.0f}", f"{ratio:.3f}", f"{rate / 1e9:.1f}", f"{rate / roof:.0%}")
        table.add_row(name, *cells)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table)
    console.print(f"roof: {roof / 1e9:.1f} GB/s")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "size": options.size, "roof": roof, "seconds": seconds}
    (options.out / f"weight-only-{where}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
