"""Pruning of weights: accuracy without training, speed-ups on demand, cost of the Hessian method.

    python benchmarks/pruning.py                            # all three
    python benchmarks/pruning.py accuracy --calibration 64  # EfficientNet-Lite0 on photographs
    python benchmarks/pruning.py speedup                    # asked and measured, layer by layer
    python benchmarks/pruning.py cost --images 128          # peak memory and time on ResNet-50

Accuracy: EfficientNet-Lite0 with its ImageNet weights, 50 % of the weights of all convolutions but
the depthwise ones and of the classifier pruned, no training. Crops for calibration and evaluation
come from different photographs. Reported are the agreement of the first choice with the dense
network's, and the signal-to-noise ratio of the logits.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from photographs import CALIBRATION, EVALUATION, crops
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphopt
from graphopt import reference
from graphopt.comparison import Difference
from graphopt.passes import EXACT, Prune
from graphopt.pipeline import Context, Pipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

BATCH = 16
CRITERIA = ("magnitude", "wanda", "hessian")
GRANULARITIES = ("unstructured", "2x4")
SPEEDUPS = (("resnet50", 2.0), ("mobilenet_v2", 1.3))
Record = dict[str, Any]


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=140)


# -- accuracy ------------------------------------------------------------------------------------


def logits(graph: graphopt.Graph, images: Tensor) -> Tensor:
    return torch.cat([reference.run(graph, [batch])[0] for batch in images.split(BATCH)])


def accuracy(options: argparse.Namespace) -> list[Record]:
    """One record per granularity and criterion."""
    from graphopt.demo import load_model

    graph = graphopt.trace(load_model(), torch.randn(2, 3, 224, 224))
    Pipeline(EXACT).run(graph)
    data = list(crops(CALIBRATION, options.calibration).split(BATCH))
    images = crops(EVALUATION, options.evaluation, seed=1)
    dense = logits(graph, images)
    records = []
    for granularity in options.granularities:
        for criterion in options.criteria:
            pruned = graph.clone()
            needed = {} if criterion == "magnitude" else {"data": data}
            begin = time.perf_counter()
            one = Prune(options.sparsity, granularity=granularity, criterion=criterion, **needed)
            Pipeline([one]).run(pruned, Context(progress=sys.stderr.isatty()))
            seconds = time.perf_counter() - begin
            got = logits(pruned, images)
            agreement = float((got.argmax(1) == dense.argmax(1)).double().mean())
            records.append(
                {
                    "granularity": granularity,
                    "criterion": criterion,
                    "agreement": agreement,
                    "decibels": Difference.between("logits", "", dense, got).sqnr,
                    "seconds": seconds,
                }
            )
            print(json.dumps(records[-1]), flush=True)
    return records


def show_accuracy(records: Sequence[Record]) -> None:
    table = Table(title="EfficientNet-Lite0, 50 % pruned, no training", title_justify="left")
    table.add_column("granularity")
    table.add_column("criterion")
    for name in ("first choice agrees", "SQNR of logits, dB", "over the first, dB", "seconds"):
        table.add_column(name, justify="right")
    for record in records:
        base = next(r for r in records if r["granularity"] == record["granularity"])["decibels"]
        table.add_row(
            record["granularity"],
            record["criterion"],
            f"{record['agreement']:.1%}",
            f"{record['decibels']:.2f}",
            f"{record['decibels'] - base:+.2f}",
            f"{record['seconds']:.0f}",
        )
    console().print(table)


# -- speed-up ------------------------------------------------------------------------------------


def network(name: str) -> tuple[torch.nn.Module, Tensor]:
    from zoo import NETWORKS

    return NETWORKS[name].build(224), torch.randn(1, 3, 224, 224)


def speedup(name: str, asked: float, granularity: str) -> Record:
    """A network that is to be so much faster, and what a measurement of its own says: dense and
    pruned network in turns, after all is done."""
    from graphopt.report import benchmark

    model, x = network(name)
    dense = graphopt.optimize(model, x)
    begin = time.perf_counter()
    pruned = graphopt.optimize(model, x, passes=[Prune(speedup=asked, granularity=granularity)])
    seconds = time.perf_counter() - begin
    measured = benchmark({"dense": lambda: dense(x), "pruned": lambda: pruned(x)}, repeats=40)
    (report,) = pruned.report().passes
    console().print(report)
    return {
        "network": name,
        "granularity": granularity,
        "asked": asked,
        "measured": measured.ratio,
        "milliseconds": {k: 1e3 * v for k, v in measured.medians.items()},
        "seconds": seconds,
        "report": report.to_dict(),
    }


def show_speedup(records: Sequence[Record]) -> None:
    table = Table(title="speed-ups asked for", title_justify="left")
    table.add_column("network")
    table.add_column("granularity")
    for name in ("asked", "measured", "measured / asked", "dense, ms", "pruned, ms", "seconds"):
        table.add_column(name, justify="right")
    for record in records:
        times = record["milliseconds"]
        table.add_row(
            record["network"],
            record["granularity"],
            f"{record['asked']:.2f}",
            f"{record['measured']:.2f}",
            f"{record['measured'] / record['asked']:.3f}",
            f"{times['dense']:.2f}",
            f"{times['pruned']:.2f}",
            f"{record['seconds']:.0f}",
        )
    console().print(table)


# -- cost ----------------------------------------------------------------------------------------


def cost(images: int, granularity: str) -> Record:
    """Peak memory and time of the Hessian method on ResNet-50, on random images."""
    model, x = network("resnet50")
    graph = graphopt.trace(model, x.expand(2, -1, -1, -1).contiguous())
    Pipeline(EXACT).run(graph)
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(8, 3, 224, 224, generator=generator) for _ in range(images // 8))
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    one = Prune(0.5, criterion="hessian", granularity=granularity, data=data)
    Pipeline([one]).run(graph, Context(progress=sys.stderr.isatty()))
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images": images,
        "granularity": granularity,
        "peak_gigabytes": after.ru_maxrss * 1024 / 1e9,
        "peak_before": before.ru_maxrss * 1024 / 1e9,
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def show_cost(record: Record) -> None:
    console().print(
        f"Hessian pruning of ResNet-50, {record['granularity']}, {record['images']} images: "
        f"peak memory of the process {record['peak_gigabytes']:.2f} GB "
        f"({record['peak_before']:.2f} GB before), {record['seconds']:.0f} s "
        f"({record['processor_seconds']:.0f} s of processor time)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="accuracy|speedup|cost", help="default: all")
    parser.add_argument("--calibration", type=int, default=128, help="crops")
    parser.add_argument("--evaluation", type=int, default=128, help="crops")
    parser.add_argument("--granularities", nargs="+", default=GRANULARITIES, help="of accuracy")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--networks", nargs="+", default=[name for name, _ in SPEEDUPS])
    parser.add_argument("--granularity", default="2x4", help="of speedup and cost")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    parts = options.parts or ["accuracy", "speedup", "cost"]
    if unknown := set(parts) - {"accuracy", "speedup", "cost"}:
        parser.error(f"unknown: {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    if "accuracy" in parts:
        records = accuracy(options)
        show_accuracy(records)
        (options.out / "pruning-accuracy.json").write_text(json.dumps(records, indent=1))
    if "speedup" in parts:
        jobs = [job for job in SPEEDUPS if job[0] in options.networks]
        records = [speedup(name, asked, options.granularity) for name, asked in jobs]
        show_speedup(records)
        (options.out / "pruning-speedup.json").write_text(json.dumps(records, indent=1))
    if "cost" in parts:
        record = cost(options.images, options.granularity)
        show_cost(record)
        (options.out / "pruning-cost.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
