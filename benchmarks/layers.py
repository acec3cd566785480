"""Where the time of a network goes: every layer, its kernel, and its share of the machine's peak.

The peaks are measured first: multiply-adds by a matrix product that stays in the caches, bytes by
copying what does not. Of a sparse layer the multiply-adds with non-zero weights count. Bytes are
those of activations and constants read or written once, so that a share above 100 % means that the
caches held them.

    python benchmarks/layers.py resnet50 --sparsity 0.9 [--threads 2] [--slowest 20]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch
from inference import NETWORKS, arguments_of, prune
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.engine.selection import least_times, single_kernel
from graphopt.kernels.operand import ConstantOperand, Layout, Operand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import candidates
from graphopt.report import Layer


def peak_multiplications(threads: int) -> float:
    """Multiply-adds per second of the best kernel for a product of a few hundred rows."""
    size = 480
    a, y = (Operand.plain("float32", (size, size)) for _ in range(2))
    b = ConstantOperand((size, size), Layout.plain("float32", 2))
    problem = MatmulProblem((a, b), (y,), (False, True))
    constants = [None, torch.randn(size, size).numpy()]
    programs = [
        (single_kernel(one, constants, threads, one.pack(constants)), [[torch.randn(size, size)]])
        for one in candidates(problem)
    ]
    return size**3 / min(least_times(programs))


def peak_bytes() -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def multiplications(layer: Layer) -> float:
    """Multiply-adds with weights that are not zero."""
    share = layer.nonzeros / layer.parameters if layer.parameters else 1.0
    return layer.macs * share


def moved_bytes(layer: Layer) -> float:
    """Bytes of activations and constants; a sparse kernel reads two words per non-zero."""
    activations = 4 * sum(math.prod(shape) for shape in (*layer.inputs, *layer.outputs))
    sparse = layer.kernel is not None and layer.kernel.startswith("sparse")
    return activations + (8 * layer.nonzeros if sparse else layer.bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slowest", type=int, help="only so many layers, the slowest first")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    network, inputs = NETWORKS[options.network](options.batch)
    prune(network, options.sparsity)
    optimized = graphopt.optimize(network, arguments_of(inputs), threads=options.threads)
    report = optimized.report()
    multiply_peak, byte_peak = peak_multiplications(options.threads), peak_bytes()
    table = Table(
        title=f"{options.network}, {options.sparsity:.0%} sparse, batch {options.batch}, "
        f"{options.threads} threads",
        caption=f"peaks: {2 * multiply_peak / 1e9:.0f} GFLOP/s, {byte_peak / 1e9:.1f} GB/s",
    )
    for name in ("layer", "operators", "kernel"):
        table.add_column(name, overflow="fold")
    for name in ("us", "share of time", "GFLOP/s", "of peak", "GB/s", "of copy"):
        table.add_column(name, justify="right")
    total = sum(layer.time_ms or 0.0 for layer in report.layers)
    layers = list(report.layers)
    if options.slowest:
        layers = sorted(layers, key=lambda layer: -(layer.time_ms or 0.0))[: options.slowest]
    for layer in layers:
        seconds = max((layer.time_ms or 0.0) / 1e3, 1e-9)
        rate, traffic = multiplications(layer) / seconds, moved_bytes(layer) / seconds
        table.add_row(
            layer.layer,
            "+".join(layer.operators),
            layer.kernel or "",
            f"{seconds * 1e6:,.0f}",
            f"{(layer.time_ms or 0.0) / total:.1%}",
            f"{2 * rate / 1e9:.0f}" if rate else "",
            f"{rate / multiply_peak:.0%}" if rate else "",
            f"{traffic / 1e9:.1f}",
            f"{traffic / byte_peak:.0%}",
        )
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(table)
    console.print(f"all steps together: {total:.3f} ms")


if __name__ == "__main__":
    main()
