"""Reads the text form of a graph back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from graphopt.errors import GraphError
from graphopt.ir.graph import Graph
from graphopt.ir.operators import resolve
from graphopt.ir.types import DTYPES_BY_NAME, ScalarType, TensorType, Type
from graphopt.ir.value import Operand, Origin

_NAME = r'%(?P<name>[\w.\-]+|"(?:[^"\\]|\\.)*")'
_TYPE = r"(?P<type>\w+\[[^\]]*\]|\w+=[^,\s]+)"
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<value>%(?:[\w.\-]+|"(?:[^"\\]|\\.)*"))
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<number>-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?))
      | (?P<name>-?[A-Za-z_][\w.]*)
      | (?P<mark>[\[\](),=:])
    )""",
    re.VERBOSE,
)
_HEADER = re.compile(r"graph\((?P<inputs>.*)\)(?: where (?P<guards>.*))? \{")
_INPUT = re.compile(f"{_NAME}: {_TYPE}")
_RESULT = re.compile(f"{_NAME}: {_TYPE}(?:, | = )")
_COMMENT = re.compile(r'((?:[^"]|"(?:[^"\\]|\\.)*")*?)  # (.*)')
_WORDS = {
    "None": None,
    "True": True,
    "False": False,
    "inf": float("inf"),
    "-inf": float("-inf"),
    "nan": float("nan"),
}


class _Line:
    """A line being read, token by token."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise GraphError(f"cannot read {text[position:].strip()!r}")
            assert match.lastgroup is not None
            self.tokens.append((match.lastgroup, match.group(match.lastgroup)))
            position = match.end()
        self.position = 0

    def peek(self, text: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position][1] == text

    def next(self) -> tuple[str, str]:
        if self.position >= len(self.tokens):
            raise GraphError("the line ends too early")
        self.position += 1
        return self.tokens[self.position - 1]

    def expect(self, text: str) -> None:
        _, found = self.next()
        if found != text:
            raise GraphError(f"expected {text!r}, found {found!r}")

    def accept(self, text: str) -> bool:
        found = self.peek(text)
        self.position += found
        return found

    @property
    def at_end(self) -> bool:
        return self.position == len(self.tokens)


def parse_graph(text: str, constants: Mapping[str, torch.Tensor]) -> Graph:
    """See `Graph.from_text`."""
    lines = [line.strip() for line in text.strip().splitlines()]
    graph: Graph | None = None
    for number, line in enumerate(lines, 1):
        try:
            if not line or line.startswith("#"):
                continue
            if graph is None:
                graph = _parse_header(line)
            elif line == "}":
                return graph
            elif line == "return" or line.startswith("return "):
                graph.set_outputs(_parse_list(graph, _Line(line.removeprefix("return"))))
            else:
                _parse_statement(graph, line, constants)
        except GraphError as error:
            error.add_note(f"in line {number}: {line}")
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            wrong = GraphError(f"cannot read the text of the graph: {error}")
            wrong.add_note(f"in line {number}: {line}")
            raise wrong from error
    raise GraphError("the text of a graph must begin with 'graph(' and end with '}'")


def _parse_header(line: str) -> Graph:
    header = _HEADER.fullmatch(line)
    if header is None:
        raise GraphError("expected 'graph(%x: f32[batch=2, 3]) {'")
    guards = [g.strip() for g in (header["guards"] or "").split(";") if g.strip()]
    inputs = [(_unquoted(m["name"]), m["type"]) for m in _INPUT.finditer(header["inputs"])]
    sizes: dict[str, int] = {}
    for _, text in inputs:
        for expression, size in re.findall(r"([^\[,=]+)=(\d+)", text):
            if expression.strip().isidentifier() and "[" in text:
                sizes[expression.strip()] = int(size)
    graph = Graph(sizes, guards)
    for name, text in inputs:
        free = {}
        if "[" in text:
            for dimension, size in enumerate(text[text.index("[") + 1 : -1].split(",")):
                if "=" in size:
                    free[dimension] = size.split("=")[0].strip()
            text = re.sub(r"[^\[,=]+=(\d+)", r"\1", text)
        graph.add_input(name, _parse_type(text), free)
    return graph


def _parse_type(text: str) -> Type:
    if "=" in text:
        kind, value = text.split("=")
        readers: dict[str, Any] = {"int": int, "float": float, "bool": lambda v: v == "True"}
        if kind not in readers:
            raise GraphError(f"unknown scalar type {kind!r}")
        return ScalarType(readers[kind](value))
    name, _, shape = text.rstrip("]").partition("[")
    if name not in DTYPES_BY_NAME:
        raise GraphError(f"unknown dtype {name!r}; known are {', '.join(DTYPES_BY_NAME)}")
    return TensorType(DTYPES_BY_NAME[name], tuple(int(s) for s in shape.split(",") if s.strip()))


def _parse_statement(graph: Graph, line: str, constants: Mapping[str, torch.Tensor]) -> None:
    commented = _COMMENT.fullmatch(line)
    statement, comment = commented.groups() if commented else (line, "")
    results: list[tuple[str, str]] = []
    while (match := _RESULT.match(statement)) is not None:
        results.append((_unquoted(match["name"]), match["type"]))
        statement = statement[match.end() :]
        if match.group().endswith("= "):
            break
    if statement.split(" ")[0] in ("constant", "parameter"):
        _parse_constant(graph, results, statement, constants)
        return
    reader = _Line(statement)
    _, op = reader.next()
    reader.expect("(")
    args: list[Operand] = []
    kwargs: dict[str, Operand] = {}
    while not reader.accept(")"):
        if (
            reader.position + 1 < len(reader.tokens)
            and reader.tokens[reader.position + 1][1] == "="
        ):
            _, name = reader.next()
            reader.expect("=")
            kwargs[name] = _parse_operand(graph, reader)
        else:
            args.append(_parse_operand(graph, reader))
        if not reader.peek(")"):
            reader.expect(",")
    if not reader.at_end:
        raise GraphError(f"unexpected {reader.next()[1]!r} after the operands")
    operands = resolve(op).bind(tuple(args), kwargs)
    module, _, made_by = comment.partition(" by ")
    if comment.startswith("by "):
        module, made_by = "", comment.removeprefix("by ")
    with graph.edit():
        # Named only once all results exist: their default names may be those of each other.
        node = graph.add_node(op, name="?", origin=Origin(module, "", made_by), **operands)
        if len(node.outputs) != len(results):
            raise GraphError(f"{op} has {len(node.outputs)} results, the text names {len(results)}")
        for value, (name, text) in zip(node.outputs, results, strict=True):
            graph.rename(value, name)
            if value.type != _parse_type(text):
                raise GraphError(f"%{name} is {value.type}, the text says {text}")


def _parse_constant(
    graph: Graph,
    results: list[tuple[str, str]],
    statement: str,
    constants: Mapping[str, torch.Tensor],
) -> None:
    if len(results) != 1:
        raise GraphError("a constant has one name and type, such as '%w: f32[3] = constant'")
    name, text = results[0]
    kind = _parse_type(text)
    if not isinstance(kind, TensorType):
        raise GraphError(f"the constant %{name} is a tensor, not {text}")
    word, _, literal = statement.partition(" ")
    if literal:
        data = _parse_operand(graph, _Line(literal))
        tensor = torch.tensor(data, dtype=kind.dtype).reshape(kind.shape)
    elif kind.numel == 0:
        tensor = torch.empty(kind.shape, dtype=kind.dtype)
    elif name in constants:
        tensor = constants[name]
        if TensorType.of(tensor) != kind:
            raise GraphError(f"%{name} is given as {TensorType.of(tensor)}, the text says {text}")
    else:
        raise GraphError(f"the text leaves out the elements of %{name}; give them by name")
    value = graph.constant(tensor, name, trainable=word == "parameter")
    if value.name != name:
        raise GraphError(f"%{name} is defined twice")


def _unquoted(name: str) -> str:
    return json.loads(name) if name.startswith('"') else name


def _parse_list(graph: Graph, reader: _Line) -> list[Operand]:
    operands: list[Operand] = []
    while not reader.at_end:
        operands.append(_parse_operand(graph, reader))
        if not reader.at_end:
            reader.expect(",")
    return operands


def _parse_operand(graph: Graph, reader: _Line) -> Operand:
    kind, text = reader.next()
    if kind == "value":
        return graph.value(_unquoted(text[1:]))
    if kind == "string":
        return json.loads(text)
    if kind == "number":
        return float(text) if any(c in text for c in ".eE") else int(text)
    if text == "[":
        items = []
        while not reader.accept("]"):
            items.append(_parse_operand(graph, reader))
            if not reader.peek("]"):
                reader.expect(",")
        return items
    if text == "device":
        reader.expect("(")
        _, name = reader.next()
        reader.expect(")")
        return torch.device(name[1:-1])
    if text == "complex":
        reader.expect("(")
        real = _parse_operand(graph, reader)
        reader.expect(",")
        imaginary = _parse_operand(graph, reader)
        reader.expect(")")
        return complex(real, imaginary)
    if text in _WORDS:
        return _WORDS[text]
    if text.startswith("torch."):
        literal = getattr(torch, text.removeprefix("torch."), None)
        if isinstance(literal, (torch.dtype, torch.layout, torch.memory_format)):
            return literal
    raise GraphError(f"cannot read the operand {text!r}")
