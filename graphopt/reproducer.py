"""What a failing pass leaves behind: the graph it was given, its constants, and the pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.registry import BoundPass, find_pass

GRAPH, CONSTANTS, PIPELINE = "graph.txt", "constants.safetensors", "pipeline.json"


def save_reproducer(folder: Path, graph: Graph, passes: Sequence[BoundPass], error: str) -> None:
    """Write a graph and the passes that fail on it.

    Args:
        folder: made if it does not exist.
        graph: as it was before the first of the passes.
        passes: those to run.
        error: what went wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH).write_text(graph.to_text() + "\n", encoding="utf-8")
    tensors = {value.name: value.constant for value in graph.constants}
    save_file(dict(_storable(name, tensor) for name, tensor in tensors.items()), folder / CONSTANTS)
    description = {
        "error": error,
        "torch": torch.__version__,
        "passes": [
            {"name": p.name, "options": {k: _encode(v) for k, v in p.options.items()}}
            for p in passes
        ],
    }
    (folder / PIPELINE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_reproducer(folder: str | Path) -> tuple[Graph, list[BoundPass]]:
    """The graph and the passes of a reproducer.

    ::

        graph, passes = load_reproducer(folder)
        Pipeline(passes).run(graph)

    Raises:
        PassError: the folder is none, a pass is not registered, or an option, such as a data
            loader, could not be written.
    """
    folder = Path(folder)
    try:
        text = (folder / GRAPH).read_text(encoding="utf-8")
        description = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
        stored = load_file(folder / CONSTANTS)
    except OSError as error:
        raise PassError(f"{folder} is no reproducer: {error}") from error
    graph = Graph.from_text(text, dict(_restored(*item) for item in stored.items()))
    passes = []
    for entry in description["passes"]:
        options = {name: _decode(entry["name"], name, o) for name, o in entry["options"].items()}
        passes.append(find_pass(entry["name"]).make(options))
    return graph, passes


_COMPLEX = "::complex"  # safetensors has no complex128


def _storable(name: str, tensor: Any) -> tuple[str, torch.Tensor]:
    """A tensor with memory of its own in the layout that safetensors wants."""
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return (name + _COMPLEX, torch.view_as_real(plain)) if plain.is_complex() else (name, plain)


def _restored(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    plain = name.removesuffix(_COMPLEX)
    return (name, tensor) if plain == name else (plain, torch.view_as_complex(tensor))


def _encode(option: Any) -> Any:
    if option is None or isinstance(option, (bool, int, float, str)):
        return option
    if isinstance(option, (list, tuple)):
        return [_encode(item) for item in option]
    if isinstance(option, torch.dtype):
        return {"dtype": str(option).removeprefix("torch.")}
    return {"unwritable": repr(option)}


def _decode(pass_name: str, option_name: str, encoded: Any) -> Any:
    if isinstance(encoded, list):
        return tuple(_decode(pass_name, option_name, item) for item in encoded)
    if isinstance(encoded, dict) and "dtype" in encoded:
        return getattr(torch, encoded["dtype"])
    if isinstance(encoded, dict):
        raise PassError(
            f"the option '{option_name}' of '{pass_name}' was {encoded['unwritable']}, which no "
            "file holds; make that pass yourself and run it on the reproducer's graph"
        )
    return encoded
