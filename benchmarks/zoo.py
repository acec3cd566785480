"""Every network of the zoo through trace, exact passes, engine and ONNX export: one table.

Each network runs in a process of its own, with a time limit; results are kept after each, so a
run that was stopped goes on where it ended.

    python benchmarks/zoo.py                         # all networks, at the size they were made for
    python benchmarks/zoo.py --size small --only resnet18 timm/mobilevit_xxs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

COLUMNS = ("trace", "passes", "engine", "onnx")
Record = dict[str, Any]

if TYPE_CHECKING:
    from graphopt import OptimizedModel


@contextmanager
def stage(record: Record, name: str) -> Iterator[Record]:
    """A column of the record: seconds taken, what the body notes, and the error that ended it."""
    column: Record = {"ok": False}
    record[name] = column
    start = time.perf_counter()
    try:
        yield column
        column["ok"] = column.get("error", 0.0) <= column.get("allowed", 0.0)
    except Exception as error:  # a failing network is a result of this benchmark
        column["failure"] = f"{type(error).__name__}: {error}".strip()
        column["traceback"] = traceback.format_exc(limit=-6)
    column["seconds"] = time.perf_counter() - start


def examine(name: str, size_name: str) -> Record:
    """Runs all stages of one network in this process."""
    from zoo import NETWORKS
    from zoo_check import Subject

    import graphopt

    network = NETWORKS[name]
    size = getattr(network, size_name)
    subject = Subject(network, size)

    def verdict(errors: list[float]) -> Record:
        """The batch size nearest to its bound, or furthest beyond."""
        allowed = [truth.allowed for truth in subject.truths]
        worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
        return {"error": errors[worst], "allowed": allowed[worst]}

    record: Record = {"name": name, "tags": network.tags, "size": size}

    with stage(record, "trace") as column:
        graph = graphopt.trace(subject.model, subject.example)
        column["nodes"] = len(graph.nodes)
        column.update(verdict(subject.graph_errors(graph)))
    with stage(record, "passes") as column:
        graph = subject.optimized.graph
        column["nodes"] = len(graph.nodes)
        column.update(verdict(subject.graph_errors(graph)))
    with stage(record, "engine") as column:
        column.update(verdict(subject.engine_errors()))
        column["call_backs"] = call_backs(subject.optimized)
    with stage(record, "onnx") as column, tempfile.TemporaryDirectory() as folder:
        column.update(verdict(subject.onnx_errors(Path(folder) / "model.onnx")))
    with stage(record, "time") as column:
        medians = subject.optimized.benchmark(network.inputs(1, size).example()).medians
        column["torch_ms"] = medians["source"] * 1e3
        column["graphopt_ms"] = medians["graphopt"] * 1e3
    return record


def call_backs(optimized: OptimizedModel) -> dict[str, int]:
    """How often torch computes an operator because no kernel of ours does."""
    layers = optimized.report().layers
    return dict(Counter("+".join(layer.operators) for layer in layers if layer.kernel == "torch"))


def examine_apart(name: str, size_name: str, limit: float) -> Record:
    """`examine` in a process of its own; a crash or a time-out is a failure of its record."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--size", size_name, "--examine", name, str(result)]
        try:
            process = subprocess.run(
                command, timeout=limit, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return {"name": name, "failure": f"not done after {limit:.0f} s"}
        if process.returncode == 0:
            record: Record = json.loads(result.read_text())
            return record
        last_lines = "\n".join(process.stderr.splitlines()[-5:])
        return {"name": name, "failure": f"exit status {process.returncode}: {last_lines}"}


def passed(record: Record) -> bool:
    return all(record.get(column, {}).get("ok") for column in COLUMNS)


def first_line(text: str, width: int) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= width else line[: width - 1] + "…"


def cells(record: Record) -> list[str]:
    """The row of a record: network, one cell per column, call-backs, times."""
    row = [record["name"]]
    for name in COLUMNS:
        column = record.get(name)
        if column is None:
            row.append("failed")
        elif "failure" in column:
            row.append(first_line(column["failure"], 40))
        else:
            mark = "" if column["ok"] else f" > {column['allowed']:.0e}"
            row.append(f"{column['error']:.0e}{mark}")
    before = record.get("trace", {}).get("nodes", "")
    after = record.get("passes", {}).get("nodes", "")
    row += [
        f"{before} → {after}",
        str(sum(record.get("engine", {}).get("call_backs", {}).values())),
    ]
    times = record.get("time", {})
    row += [f"{times[key]:.1f}" if key in times else "" for key in ("torch_ms", "graphopt_ms")]
    return row


HEADINGS = ["network", *COLUMNS, "nodes", "call-backs", "torch ms", "graphopt ms"]


def markdown(records: list[Record]) -> str:
    """The table, and below it each failure in full."""
    count = sum(map(passed, records))
    lines = [
        f"{count} of {len(records)} networks pass every column. A column shows the largest",
        "relative error against torch in float64 over two batch sizes; times are medians at batch",
        "size one.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    lines += ["| " + " | ".join(c.replace("|", "/") for c in cells(r)) + " |" for r in records]
    totals = Counter[str]()
    for record in records:
        totals.update(record.get("engine", {}).get("call_backs", {}))
    if totals:
        counts = ", ".join(f"{name} {count}" for name, count in totals.most_common())
        lines += ["", f"Computed by torch for want of a kernel: {counts}."]
    for record in records:
        failures = {"process": record, **{name: record.get(name, {}) for name in COLUMNS}}
        for name, column in failures.items():
            if "failure" in column:
                lines += ["", f"**{record['name']}, {name}:** {column['failure']}"]
    return "\n".join(lines) + "\n"


def run(names: list[str], size_name: str, folder: Path, limit: float, fresh: bool) -> int:
    """Examines what is not yet in the folder's results; returns how many networks fail."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"zoo-{size_name}.json"
    records: dict[str, Record] = {}
    if store.exists() and not fresh:
        records = {record["name"]: record for record in json.loads(store.read_text())}
    console = Console() if sys.stdout.isatty() else Console(width=160)
    todo = [name for name in names if name not in records]
    layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*layout, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("zoo", total=len(names), completed=len(names) - len(todo))
        for name in todo:
            progress.update(task, description=name)
            records[name] = examine_apart(name, size_name, limit)
            store.write_text(json.dumps(list(records.values()), indent=1))
            if not passed(records[name]):
                progress.print(f"[red]fails[/red] {name}")
            progress.advance(task)
    chosen = [records[name] for name in names]
    table = Table(*HEADINGS, title=f"The zoo, {size_name} size")
    for record in chosen:
        table.add_row(*cells(record), style="" if passed(record) else "red")
    console.print(table)
    store.with_suffix(".md").write_text(markdown(chosen))
    console.print(f"written: {store} and {store.with_suffix('.md')}")
    return sum(not passed(record) for record in chosen)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("small", "native"), default="native")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks instead of all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--examine", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        name, path = options.examine
        Path(path).write_text(json.dumps(examine(name, options.size)))
        return 0
    from zoo import NETWORKS

    names = options.only or list(NETWORKS)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown networks: {', '.join(unknown)}")
    return min(run(names, options.size, options.out, options.limit, options.fresh), 1)


if __name__ == "__main__":
    sys.exit(main())
