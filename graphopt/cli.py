"""The command ``graphopt``, thin over the library."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import graphopt
from graphopt.errors import Error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if the demo names a photograph wrongly, 2 for
    a wrong command or what graphopt cannot do."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not hasattr(given, "run"):
        given.parser.print_help()
        return 2
    try:
        status: int = given.run(given, Console())
    except Error as error:
        errors = Console(stderr=True)
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        for note in getattr(error, "__notes__", ()):
            errors.print(escape(note), highlight=False)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphopt", description="Makes a trained PyTorch network small and fast on CPUs."
    )
    parser.add_argument("--version", action="version", version=graphopt.__version__)
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser("demo", help="EfficientNet-Lite0 on photographs, in three ways")
    demo.add_argument("--onnx", type=Path, metavar="FILE", help="keep the ONNX file there")
    demo.set_defaults(run=_demo)

    passes = commands.add_parser("passes", help="list the registered passes")
    passes.set_defaults(run=_passes)

    optimize = commands.add_parser(
        "optimize",
        help="optimize a model and write it as ONNX",
        description="Optimize what FACTORY of MODULE returns, and write it as ONNX.",
    )
    optimize.add_argument(
        "model",
        metavar="MODULE:FACTORY",
        help="a function without arguments that returns an nn.Module or (nn.Module, example "
        "inputs), or such an object itself",
    )
    optimize.add_argument("--out", type=Path, required=True, metavar="FILE", help="ONNX file")
    optimize.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="[DTYPE:]N,N,...",
        help="of an example input, such as 1,3,224,224 or int64:1,128; once per input",
    )
    optimize.add_argument(
        "--pass",
        action="append",
        default=[],
        dest="passes",
        metavar="NAME",
        help="run a registered pass after the clean-up; may be repeated",
    )
    optimize.add_argument("--opset", type=int, default=18, help="of the file (default: 18)")
    optimize.add_argument(
        "--no-verify", action="store_true", help="do not compare the file with torch"
    )
    optimize.add_argument("--report", action="store_true", help="print what every layer costs")
    optimize.set_defaults(run=_optimize)

    cache = commands.add_parser("cache", help="compiled kernels and measured times on disk")
    actions = cache.add_subparsers(title="actions", metavar="ACTION")
    clear = actions.add_parser("clear", help="remove everything in it")
    clear.set_defaults(run=_cache_clear)
    cache.set_defaults(parser=cache)
    return parser


def _demo(given: argparse.Namespace, console: Console) -> int:
    from graphopt import demo

    with console.status("optimizing EfficientNet-Lite0 and exporting it"):
        result = demo.run(given.onnx)
    result.show(console)
    return 0 if result.all_right else 1


def _passes(given: argparse.Namespace, console: Console) -> int:
    from graphopt.registry import registered_passes

    table = Table()
    table.add_column("pass", no_wrap=True)
    for column in ("accuracy", "options", "what it does"):
        table.add_column(column, overflow="fold")
    for name, known in registered_passes().items():
        options = [
            option if default is dataclasses.MISSING else f"{option}={default!r}"
            for option, default in known.options.items()
        ]
        row = (name, str(known.accuracy), ", ".join(options), known.summary)
        table.add_row(*map(escape, row))
    console.print(table)
    return 0


def _optimize(given: argparse.Namespace, console: Console) -> int:
    model, example_inputs = _load(given.model)
    if given.shape:
        example_inputs = tuple(map(_example, given.shape))
    if example_inputs is None:
        raise Error(
            f"{given.model} brings no example inputs; give their shapes, such as "
            "--shape 1,3,224,224"
        )
    optimized = graphopt.optimize(model, example_inputs, passes=given.passes)
    exported = optimized.export_onnx(given.out, opset=given.opset, verify=not given.no_verify)
    if given.report:
        console.print(optimized.report())
    console.print(f"written: {escape(str(exported))}", highlight=False)
    return 0


def _cache_clear(given: argparse.Namespace, console: Console) -> int:
    from graphopt.kernels import cache

    cache.clear()
    console.print(f"cleared: {escape(os.fspath(cache.directory()))}", highlight=False)
    return 0


def _load(reference: str) -> tuple[nn.Module, Any]:
    """The model, and example inputs if there are any, of ``module:factory``."""
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise Error(f"'{reference}' is not of the form MODULE:FACTORY, such as mymodels:resnet")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise Error(f"there is no module '{module_name}' here or among the installed") from error
    if not hasattr(module, name):
        raise Error(f"the module '{module_name}' has no '{name}'")
    made = getattr(module, name)
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    model, example_inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise Error(f"{reference} gives a {type(model).__name__}, not an nn.Module")
    return model, example_inputs


def _example(text: str) -> torch.Tensor:
    """A tensor of a shape such as ``1,3,224,224`` or ``int64:1,128``: normal floats, zeros else."""
    dtype_name, _, sizes = text.rpartition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not isinstance(dtype, torch.dtype) or not shape or min(shape) < 0:
        raise Error(
            f"'{text}' is not a shape; write sizes with commas between them, such as 1,3,224,224, "
            "with a dtype of torch before them where they are not float32, such as int64:1,128"
        )
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


if __name__ == "__main__":
    sys.exit(main())
