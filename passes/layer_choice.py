"""Which layers of a network a user means: by module path, regular expression, or module type."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from graphopt.errors import PassError
from graphopt.ir import Graph, Node

LayerPattern = str | re.Pattern[str] | type[nn.Module]
"""A module's path (``"layer4"`` means all within it, ``*`` any part), a regular expression that is
searched for in the path, or the class of the module that holds the layer itself."""

Setting = TypeVar("Setting")


def matches(pattern: LayerPattern, node: Node) -> bool:
    """Whether a node comes from a module that a pattern means."""
    module = node.origin.module
    if isinstance(pattern, re.Pattern):
        return pattern.search(module) is not None
    if isinstance(pattern, str):
        if any(character in pattern for character in "*?["):
            whole = fnmatch.translate(pattern).removesuffix(r"\z").removesuffix(r"\Z")
            return re.match(whole + r"(\.|\Z)", module) is not None
        return module == pattern or module.startswith(pattern + ".")
    return node.origin.module_type == pattern.__name__


def chosen(graph: Graph, patterns: Iterable[LayerPattern], what: str = "ignore") -> set[Node]:
    """The nodes that any of the patterns means.

    Args:
        graph: the network.
        patterns: see `LayerPattern`.
        what: the option that gives them, for messages.

    Raises:
        PassError: a pattern is no pattern, or means no node.
    """
    nodes: set[Node] = set()
    for pattern in patterns:
        nodes |= _meant(graph, pattern, what)
    return nodes


def settings(graph: Graph, given: Mapping[LayerPattern, Setting], what: str) -> dict[Node, Setting]:
    """Settings per node from settings per pattern; where several mean a node, the last decides.

    Raises:
        PassError: as `chosen` does.
    """
    found: dict[Node, Setting] = {}
    for pattern, setting in given.items():
        found.update(dict.fromkeys(_meant(graph, pattern, what), setting))
    return found


def as_patterns(given: Any, what: str = "ignore") -> Sequence[LayerPattern]:
    """One pattern or several, as a sequence. Raises PassError for anything else."""
    items = [given] if isinstance(given, (str, re.Pattern, type)) else list(given)
    for item in items:
        if not isinstance(item, (str, re.Pattern)) and not _is_module_type(item):
            raise PassError(
                f"{what} has {item!r}; it takes module paths, compiled regular expressions and "
                "classes of modules"
            )
    return items


def _is_module_type(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, nn.Module)


def _meant(graph: Graph, pattern: LayerPattern, what: str) -> set[Node]:
    as_patterns([pattern], what)
    nodes = {node for node in graph.nodes if matches(pattern, node)}
    if not nodes:
        shown = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
        paths = sorted({node.origin.module for node in graph.nodes if node.origin.module})
        known = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        raise PassError(f"{what} has {shown}, which means no layer; the modules are: {known}")
    return nodes
