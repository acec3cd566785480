"""A network without some of its channels: what the time makes of fewer multiply-adds.

Channels with the least L2 norm go, the same part of every group, until the asked part of the
multiply-adds is left. Dense and pruned networks are called in turn, in graphopt and in
onnxruntime; medians and ratios are reported.

    python benchmarks/channel_pruning.py                    # ResNet-50, half of the multiply-adds
    python benchmarks/channel_pruning.py --network mobilenet_v2 --macs 0.7 --round-to 8
    python benchmarks/channel_pruning.py --zoo              # pruned = masked, over the whole zoo
    python benchmarks/channel_pruning.py --zoo resnet18 vgg11_bn --out zoo.json --markdown zoo.md
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from inference import ROOT, interleaved
from rich.box import MARKDOWN, ROUNDED, Box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import graphopt
from graphopt.engine import compile_graph
from graphopt.flops import count_flops
from graphopt.onnx import export_onnx
from graphopt.passes import EXACT
from graphopt.passes.pruning.channel_groups import ChannelGroup, Member, find_groups
from graphopt.passes.pruning.channel_removal import remaining_macs, remove_units

sys.path.insert(0, str(ROOT / "tests"))

Record = dict[str, Any]
TRIALS = 12
"""Halvings of the interval in which the part of the channels is searched."""


def squares(member: Member) -> torch.Tensor:
    """Squared elements of the weights that make or read channels."""
    constant = member.constant.constant
    assert constant is not None
    return constant.double().square() * (constant.dim() > 1)


def macs(graph: graphopt.Graph) -> int:
    return sum(count_flops(node) for node in graph.nodes) // 2


def removals(
    ranked: dict[ChannelGroup, list[int]], part: float, round_to: int
) -> dict[ChannelGroup, list[int]]:
    """The weakest part of every group, whose units are given from the weakest on; what is left are
    multiples of some number of channels."""
    chosen = {}
    for group, units in ranked.items():
        step = max(1, round_to // group.channels_per_unit)
        kept = max(step, round((1 - part) * group.units / step) * step)
        count = max(0, group.units - kept)
        chosen[group] = units[:count]
    return chosen


def prune(graph: graphopt.Graph, wanted: float, round_to: int) -> graphopt.Graph:
    """The graph with at most the wanted part of its multiply-adds, and hardly less."""
    ranked = {g: g.scores(squares).argsort().tolist() for g in find_groups(graph)[0]}
    budget = wanted * macs(graph)
    low, high = 0.0, 1.0
    for _ in range(TRIALS):
        part = (low + high) / 2
        if remaining_macs(graph, removals(ranked, part, round_to)) <= budget:
            high = part
        else:
            low = part
    pruned = graph.clone()
    remove_units(pruned, removals(ranked, high, round_to))
    return pruned


def compare(name: str, wanted: float, round_to: int, threads: int, rounds: int) -> Record:
    """Seconds of a call, dense and pruned."""
    from zoo import NETWORKS

    network = NETWORKS[name]
    model, inputs = network.build(network.native), network.inputs(1, network.native)
    dense = graphopt.trace(model, network.inputs(2, network.native).example())
    graphopt.Pipeline(EXACT).run(dense)
    pruned = prune(dense, wanted, round_to)
    tensors = list(inputs.args or (inputs.kwargs or {}).values())
    runs = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for what, graph in (("dense", dense), ("pruned", pruned)):
            plan = compile_graph(graph, dict.fromkeys(graph.sizes, 1), threads=threads)
            runs[f"graphopt {what}"] = lambda plan=plan: plan.run(*tensors)
            path = Path(folder) / f"{what}.onnx"
            export_onnx(graph, path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            names = [value.name for value in session.get_inputs()]
            feed = {key: x.numpy() for key, x in zip(names, tensors, strict=True)}
            runs[f"onnxruntime {what}"] = lambda s=session, f=feed: s.run(None, f)
        seconds = interleaved(runs, rounds)
    return {"network": name, "macs": macs(pruned) / macs(dense), "seconds": seconds}


def show(result: Record) -> None:
    table = Table(
        title=f"{result['network']}, {result['macs']:.1%} of the multiply-adds, ms per call"
    )
    for column in ("backend", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for backend in ("graphopt", "onnxruntime"):
        dense, pruned = (result["seconds"][f"{backend} {what}"] for what in ("dense", "pruned"))
        cells = f"{dense * 1e3:.2f}", f"{pruned * 1e3:.2f}", f"{pruned / dense:.3f}"
        table.add_row(backend, *cells)
    Console().print(table)


def check(name: str) -> Record:
    """A network without a third of the units of each group, against its masked self."""
    from channel_pruning_check import Pruned
    from zoo import NETWORKS

    start = time.perf_counter()
    subject = Pruned(NETWORKS[name], NETWORKS[name].small)
    with tempfile.TemporaryDirectory() as folder:
        errors = {
            "torch": subject.torch_error(),
            "engine": subject.engine_error(),
            "onnxruntime": subject.onnx_error(Path(folder) / "model.onnx"),
        }
    return {
        "network": name,
        "groups": subject.groups,
        "kept": subject.kept,
        "errors": errors,
        "allowed": subject.allowed,
        "agrees": errors["torch"] < 1e-9 and max(errors.values()) <= subject.allowed,
        "seconds": time.perf_counter() - start,
    }


def zoo(names: list[str], known: list[Record]) -> list[Record]:
    """Check networks, and put the results among those known."""
    from zoo import NETWORKS

    results = {record["network"]: record for record in known}
    for name in track(names or list(NETWORKS), "networks", transient=True):
        results[name] = check(name)
    return [results[name] for name in NETWORKS if name in results]


def zoo_table(results: list[Record], box: Box) -> Table:
    good = sum(record["agrees"] for record in results)
    table = Table(
        title=f"Largest relative error of pruned networks, in float64 (torch) and float32, against "
        f"the masked ones in float64: {good} of {len(results)} agree",
        title_justify="left",
        box=box,
    )
    for column in ("network", "groups", "elements left", "torch", "engine", "onnxruntime", ""):
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for record in results:
        table.add_row(
            *(record["network"], str(record["groups"]), f"{record['kept']:.2f}"),
            *(f"{error:.1e}" for error in record["errors"].values()),
            *("" if record["agrees"] else f"allowed {record['allowed']:.1e}",),
        )
    return table


def check_zoo(options: argparse.Namespace) -> None:
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    results = zoo(options.zoo, known)
    Console(width=140).print(zoo_table(results, ROUNDED))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    if options.markdown:
        console = Console(width=140, file=io.StringIO())
        console.print(zoo_table(results, MARKDOWN))
        assert isinstance(console.file, io.StringIO)
        lines = (line.rstrip() for line in console.file.getvalue().splitlines())
        options.markdown.write_text("\n".join(lines).strip() + "\n")
    if not all(record["agrees"] for record in results):
        sys.exit("a pruned network is not its masked self")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--macs", type=float, default=0.5, help="part that is to be left")
    parser.add_argument("--round-to", type=int, default=16, help="channels are multiples of this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--zoo", nargs="*", metavar="NETWORK", help="check networks; all if none")
    parser.add_argument("--out", type=Path, help="results; those of --zoo are put to those there")
    parser.add_argument("--markdown", type=Path, help="the table of --zoo")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.zoo is not None:
        check_zoo(options)
        return
    result = compare(
        *(options.network, options.macs, options.round_to, options.threads, options.rounds)
    )
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
