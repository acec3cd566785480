"""Faults to plant into graphopt, and the check that must notice each of them.

A fault is a small change of a function's source, as a slip of the pen would make it. Where the
text to be changed is no longer there, planting fails loudly and the fault must be rewritten.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from random_graphs import Case, cases, check_engine, check_pass

Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """A fault, and what must fail while it is there.

    Attributes:
        plant: puts the fault in place.
        check: an existing check; passes without the fault, raises with it.
    """

    name: str
    plant: Plant
    check: Check


FAULTS: list[Fault] = []


def fault(name: str, check: Check, *plants: Plant) -> None:
    """Declare a fault, of one change or several."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for change in plants:
            change(monkeypatch)

    FAULTS.append(Fault(name, plant, check))


# -- planting -----------------------------------------------------------------------------------


def changed(function: Any, old: str, new: str) -> Plant:
    """A change of a function's source, for everyone who holds the function."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        plain: FunctionType = inspect.unwrap(getattr(function, "fget", None) or function)
        source = textwrap.dedent(inspect.getsource(plain))
        source = source[source.index("def ") :]  # without decorators, which act on the function
        assert source.count(old) == 1, f"{plain.__qualname__} holds {old!r} not exactly once"
        module = compile(
            source.replace(old, new),
            f"<{plain.__name__}, faulty>",
            "exec",
            annotations.compiler_flag,
        )
        code = next(c for c in module.co_consts if isinstance(c, CodeType))
        monkeypatch.setattr(plain, "__code__", code)

    return plant


def changed_text(module: ModuleType, name: str, old: str, new: str) -> Plant:
    """A change of a text that kernels are generated from."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        text: str = getattr(module, name)
        assert text.count(old) == 1, f"{module.__name__}.{name} holds {old!r} not exactly once"
        monkeypatch.setattr(module, name, text.replace(old, new))

    return plant


def substituted(owner: Any, name: str, faulty: Callable[[Any], Any]) -> Plant:
    """Another function in the place of one; ``faulty`` makes it from the right one."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, faulty(getattr(owner, name)))


# -- checks -------------------------------------------------------------------------------------


def on_random_graphs(check: Callable[[Case], None], steps: Sequence[str], count: int) -> Check:
    """The random-graph check, on graphs made of some steps; the same ones every time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(steps, longest=3))
    def run(case: Case) -> None:
        check(case)

    return run


def pass_on_random_graphs(name: str, *steps: str, count: int = 30) -> Check:
    return on_random_graphs(lambda case: check_pass(case.in_double(), name), steps, count)


def engine_on_random_graphs(*steps: str, count: int = 8) -> Check:
    return on_random_graphs(check_engine, steps, count)


def test_of(path: str, name: str, *args: Any, **kwargs: Any) -> Check:
    """A test function of another file, such as ``kernels/test_matmul.py``, with its parameters."""

    def run() -> None:
        file = Path(__file__).parent / path
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
        getattr(importlib.import_module(file.stem), name)(*args, **kwargs)

    return run


test_of.__test__ = False  # type: ignore[attr-defined]


def in_a_child(check: Check) -> Check:
    """The check in a process of its own, for faults that touch memory which is not theirs."""

    def run() -> None:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            torch.set_num_threads(1)  # OpenMP's threads stayed behind in the parent
            try:
                check()
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child ended with status {status}"

    return run
