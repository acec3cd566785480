"""Low-rank decomposition: time for fewer multiply-adds, and what calibration data is worth.

    python benchmarks/lowrank.py speed                     # ResNet-18 and VGG-16, engine and ONNX
    python benchmarks/lowrank.py speed --networks resnet18 --macs 0.4 --method tucker2
    python benchmarks/lowrank.py data                      # EfficientNet-Lite0 on photographs
    python benchmarks/lowrank.py mnist --mnist mnist.npz   # accuracy against multiply-adds
    python benchmarks/lowrank.py mnist --mnist mnist.npz --markdown lowrank_mnist.md

`speed` calls dense and decomposed networks in turn and reports medians, their ratios, and the time
of every layer. `data` decomposes at the same ranks with and without calibration crops, which come
from other photographs than those of the evaluation: at fractions of the full rank, most of which
save nothing, and at ranks within a budget of multiply-adds. `mnist` trains a small network and
decomposes its convolutions by every method, with "auto" its linear layers, too; the file has the
arrays x_train, y_train, x_test and y_test.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import BACKENDS, ROOT, Run, interleaved, machine
from rich.box import MARKDOWN, ROUNDED, Box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import graphopt
from graphopt.comparison import Difference
from graphopt.flops import count_flops
from graphopt.passes import EXACT, LowRank
from graphopt.passes.low_rank import candidates
from graphopt.passes.low_rank.methods import METHODS

SLOWER = 1.05
"""From which ratio on a layer counts as slower: times of single layers scatter that much."""
FRACTIONS = (0.97, 0.95, 0.9, 0.8)
"""Of the full rank of every 1x1 convolution of EfficientNet-Lite0."""
LEFT = (0.95, 0.9)
"""Of its multiply-adds; it has few to spare."""
SHARES = (0.6, 0.4, 0.25, 0.15)
EPOCHS = 1
EVALUATED = 100
"""Images at a time: what flows between two layers then fits into a cache."""


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=130)


def macs(graph: graphopt.Graph) -> int:
    return sum(count_flops(node) for node in graph.nodes) // 2


def decomposed(graph: graphopt.Graph, one: LowRank) -> tuple[graphopt.Graph, list[Sequence[Any]]]:
    """A copy of a graph after the pass, and the rows of its report."""
    ctx = graphopt.Context()
    small = graph.clone()
    graphopt.Pipeline([one, "simplification", "dead-code"]).run(small, ctx)
    return small, list(ctx.reports[-1].rows)


# -- speed ---------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    from zoo import NETWORKS, import_torchvision

    if name == "vgg16":
        torch.manual_seed(0)
        model: nn.Module = import_torchvision().models.vgg16(weights=None).eval()
        return model
    return NETWORKS[name].build(224)


def time_by_layer(optimized: graphopt.OptimizedModel) -> dict[str, float]:
    """Milliseconds per module of the source."""
    times: dict[str, float] = defaultdict(float)
    for layer in optimized.report().layers:
        times[layer.layer] += layer.time_ms or 0.0
    return times


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    out = console()
    records = []
    x = torch.randn(1, 3, 224, 224)
    for name in options.networks:
        model = network(name)
        one = LowRank(options.method, macs=options.macs, speedup=options.speedup)
        dense = graphopt.optimize(model, x, threads=options.threads)
        small = graphopt.optimize(model, x, passes=[one], threads=options.threads)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            runs: dict[str, Run] = {}
            for what, optimized in (("dense", dense), ("low-rank", small)):
                runs[f"graphopt {what}"] = lambda one=optimized: one(x)
                path = Path(folder) / f"{what}.onnx"
                optimized.export_onnx(path, verify=False)
                session = BACKENDS["onnxruntime"](model, {"x": x}, options.threads, path)
                runs[f"onnxruntime {what}"] = session
            seconds = interleaved(runs, options.rounds)
        changed = [row[0] for row in small.report().passes[-1].rows]
        record = {
            "network": name,
            "macs": macs(small.graph) / macs(dense.graph),
            "seconds": seconds,
            "layers": compare_layers(dense, small, changed, options.rounds),
        }
        records.append(record)
        out.print(small.report().passes[-1])
        show_speed(out, record)
    return records


def compare_layers(
    dense: graphopt.OptimizedModel,
    small: graphopt.OptimizedModel,
    changed: Sequence[str],
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Milliseconds of every decomposed layer before and after, the least of several turns."""
    turns = [(time_by_layer(dense), time_by_layer(small)) for _ in range(rounds)]
    return {
        layer: (min(d[layer] for d, _ in turns), min(s[layer] for _, s in turns))
        for layer in changed
    }


def show_speed(out: Console, record: dict[str, Any]) -> None:
    table = Table(title=f"{record['network']}: ms of every layer")
    for column in ("layer", "dense", "low-rank", "ratio", ""):
        table.add_column(column, justify="left" if column in ("layer", "") else "right")
    for layer, (before, after) in record["layers"].items():
        slower = "slower" if after > SLOWER * before else ""
        table.add_row(layer, f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}", slower)
    out.print(table)
    table = Table(title=f"{record['network']}: {record['macs']:.1%} of the multiply-adds")
    for column in ("backend", "dense ms", "low-rank ms", "ratio"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for backend in ("graphopt", "onnxruntime"):
        before, after = (record["seconds"][f"{backend} {w}"] for w in ("dense", "low-rank"))
        cells = (f"{before * 1e3:.2f}", f"{after * 1e3:.2f}", f"{after / before:.3f}")
        table.add_row(backend, *cells)
    out.print(table)


# -- data ----------------------------------------------------------------------------------------


def data(options: argparse.Namespace) -> list[dict[str, Any]]:
    from photographs import CALIBRATION, EVALUATION, crops

    from graphopt.demo import load_model

    model = load_model()
    calibration = list(crops(CALIBRATION, options.crops).split(16))
    images = crops(EVALUATION, options.evaluation).split(25)
    exact = torch.cat([_scores(model, batch) for batch in images])
    graph = graphopt.trace(model, images[0])
    graphopt.Pipeline(EXACT).run(graph)
    variants: dict[str, dict[str, Any]] = {"plain": {}, "data": {"data": calibration}}
    if options.asymmetric:
        variants["data, asymmetric"] = {"data": calibration, "asymmetric": True}
    records = []
    for choice, ranks in rank_choices(options, graph, calibration):
        for name, settings in variants.items():
            one = LowRank("svd", rank=ranks, only_faster=False, **settings)
            small, _ = decomposed(graph, one)
            network = small.to_torch()
            found = torch.cat([_scores(network, batch) for batch in images])
            same = found.argmax(dim=1) == exact.argmax(dim=1)
            records.append(
                {
                    "ranks": choice,
                    "variant": name,
                    "macs": macs(small) / macs(graph),
                    "sqnr_db": Difference.between("scores", "", exact, found).sqnr,
                    "agreement": same.double().mean().item(),
                }
            )
    show_data(records, options.evaluation)
    return records


def rank_choices(
    options: argparse.Namespace, graph: graphopt.Graph, calibration: Sequence[torch.Tensor]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Ranks per layer that both variants get. Layers of a mobile network are nearly of full rank,
    so fractions near 1 cost more multiply-adds than they save, but the network still works."""
    pointwise = {
        node.origin.module: min(node["weight"].shape[:2])
        for node in graph.nodes
        if node.op == "aten.conv2d" and node["groups"] == 1 and set(node["weight"].shape[2:]) == {1}
    }
    for fraction in options.fractions:
        ranks = {layer: max(1, round(fraction * full)) for layer, full in pointwise.items()}
        yield f"{fraction:g} of full", ranks
    for left in options.left:
        budget = LowRank("svd", macs=left, data=calibration, only_faster=False)
        yield f"macs={left:g}", {row[0]: int(row[2]) for row in decomposed(graph, budget)[1]}


def show_data(records: list[dict[str, Any]], evaluation: int) -> None:
    table = Table(title=f"EfficientNet-Lite0, SVD, {evaluation} crops of photographs")
    for column in ("ranks", "MACs", "variant", "SQNR of the scores, dB", "same class"):
        justify: Any = "left" if column in ("ranks", "variant") else "right"
        table.add_column(column, justify=justify)
    for record in records:
        table.add_row(
            record["ranks"],
            f"{record['macs']:.0%}",
            record["variant"],
            f"{record['sqnr_db']:.1f}",
            f"{record['agreement']:.1%}",
        )
    console().print(table)


def _scores(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = model(x)
    return scores


# -- mnist ---------------------------------------------------------------------------------------


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).to(memory_format=torch.channels_last)
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(x)).split(128)]
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(batches))
    for batch in track(batches, "training"):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def mnist(options: argparse.Namespace) -> list[dict[str, Any]]:
    arrays = np.load(options.mnist)
    images = {
        split: torch.from_numpy(arrays[f"x_{split}"])[:, None].float() / 255 - 0.5
        for split in ("train", "test")
    }
    labels = {s: torch.from_numpy(arrays[f"y_{s}"]).long() for s in ("train", "test")}
    model = trained(images["train"], labels["train"])
    calibration = list(images["train"][:512].split(128))

    def accuracy(one: nn.Module) -> float:
        one = one.to(memory_format=torch.channels_last)
        scores = torch.cat([_scores(one, batch) for batch in images["test"].split(EVALUATED)])
        return (scores.argmax(dim=1) == labels["test"]).double().mean().item()

    graph = graphopt.trace(model, images["test"][:EVALUATED])
    graphopt.Pipeline(EXACT).run(graph)
    linear = sum(count_flops(n) for n in graph.nodes if n.op == "aten.linear") / 2 / macs(graph)
    dense = {"method": "dense", "macs": 1.0, "linear": linear, "accuracy": accuracy(model)}
    records: list[dict[str, Any]] = [dense]
    methods = [method for method in ("auto", *METHODS) if method != "svd"]
    jobs = [(m, d, s) for m in methods for d in (False, True) for s in options.shares]
    candidates.family = remembered(candidates.family)
    for method, on_data, share in track(jobs, "decomposing"):
        seen = calibration if on_data else None
        one = LowRank(method, macs=share, only_faster=False, data=seen)
        try:
            small, _ = decomposed(graph, one)
        except graphopt.Error as error:
            if "budget cannot be met" not in str(error):
                raise
            continue
        record = {"method": method, "data": on_data, "share": share}
        record["macs"] = macs(small) / macs(graph)
        records.append({**record, "accuracy": accuracy(small.to_torch())})
    show_mnist(records, options)
    plot_mnist(records, options.out / "lowrank-mnist.png")
    return records


def remembered(family: Callable[..., Any]) -> Callable[..., Any]:
    """The decompositions of a kernel, which are the same within every budget, made only once."""
    known: dict[tuple[Any, ...], Any] = {}

    def again(method: str, kernel: torch.Tensor, generator: Any, splits: int) -> Any:
        key = method, splits, kernel.shape, kernel.numpy().tobytes()
        if key not in known:
            known[key] = family(method, kernel, generator, splits)
        return known[key]

    return again


def show_mnist(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    console().print(mnist_table(records, options.shares, ROUNDED))
    if options.markdown:
        file = io.StringIO()
        Console(width=140, file=file).print(mnist_table(records, options.shares, MARKDOWN))
        lines = (line.rstrip() for line in file.getvalue().splitlines())
        options.markdown.write_text("\n".join(lines).strip() + "\n")


def mnist_table(records: list[dict[str, Any]], shares: Sequence[float], box: Box) -> Table:
    dense, *others = records
    linear = dense["linear"]
    table = Table(
        title=f"MNIST: accuracy of a small network ({dense['accuracy']:.2%}) with its convolutions "
        "decomposed, not trained again, and the multiply-adds left, by what may be left; empty "
        "where the method cannot reach that. All but auto leave the linear layers "
        f"({linear:.1%}) as they are.",
        title_justify="left",
        box=box,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("fitted to")
    for share in shares:
        table.add_column(f"at most {share:.0%}", justify="right", no_wrap=True)
    found = {(r["method"], r["data"], r["share"]): r for r in others}
    for method, on_data in dict.fromkeys((r["method"], r["data"]) for r in others):
        cells = []
        for share in shares:
            record = found.get((method, on_data, share))
            cell = "" if record is None else f"{record['accuracy']:.2%} at {record['macs']:.1%}"
            cells.append(cell)
        table.add_row(method, "images" if on_data else "weights", *cells)
    return table


def plot_mnist(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    dense, *others = records
    for axis, on_data in zip(axes, (False, True), strict=True):
        for method in dict.fromkeys(r["method"] for r in others):
            own = [r for r in others if r["method"] == method and r["data"] == on_data]
            own = sorted([*own, dense], key=lambda r: r["macs"])
            wrong = [1 - r["accuracy"] for r in own]
            axis.plot([r["macs"] for r in own], wrong, ".-", label=method)
        axis.set_yscale("log")
        axis.set_title("with calibration data" if on_data else "from the weights alone")
        axis.set_xlabel("multiply-adds left")
    axes[0].set_ylabel("images in the wrong class")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "data", "mnist"))
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--speedup", type=float, default=1.6, help="the budget of time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crops", type=int, default=64, help="for calibration")
    parser.add_argument("--evaluation", type=int, default=300, help="crops")
    parser.add_argument("--asymmetric", action="store_true", help="too, a sweep per layer")
    parser.add_argument("--fractions", nargs="*", type=float, default=FRACTIONS, help="of ranks")
    parser.add_argument("--left", nargs="*", type=float, default=LEFT, help="of multiply-adds")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--mnist", type=Path, default=Path("mnist.npz"))
    parser.add_argument("--markdown", type=Path, help="the table of mnist")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    records = {"speed": speed, "data": data, "mnist": mnist}[options.what](options)
    file = options.out / f"lowrank-{options.what}.json"
    file.write_text(json.dumps({"machine": machine(), "records": records}, indent=1))
    console().print(f"written: {file}")


if __name__ == "__main__":
    main()
