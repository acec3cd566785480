"""Any number of random graphs through every exact pass, all together, and the engine.

Equal seeds and counts give equal graphs. Stops at the first graph that something gets wrong,
shrinks it, and prints it with the recipe that makes it again.

    python benchmarks/random_graphs.py --count 1000 --seed 7
    python benchmarks/random_graphs.py --count 200 --only fold-batch-norm --no-engine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from random_graphs import (
    Case,
    cases,
    check_engine,
    check_pass,
    check_passes,
    exact_passes,
)

from graphopt import Pipeline
from graphopt.passes import EXACT


def examine(case: Case, passes: Sequence[str], engine: bool) -> None:
    """Raises where a pass alone, the usual pipeline, or the engine errs on a graph."""
    exact = case.in_double()
    for name in passes:
        check_pass(exact, name)
    check_passes(exact, EXACT)
    if engine:
        check_engine(case)
        Pipeline(EXACT).run(case.graph)
        check_engine(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="how many graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=exact_passes(), help="passes to run alone")
    parser.add_argument("--no-engine", action="store_true")
    options = parser.parse_args()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=options.count)

        @seed(options.seed)
        @settings(
            max_examples=options.count,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def run(case: Case) -> None:
            progress.advance(task)
            examine(case, options.only, not options.no_engine)

        run()
    print(f"{options.count} graphs, all right")


if __name__ == "__main__":
    main()
