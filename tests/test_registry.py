"""Registration: what counts as a pass, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest

import graphopt.passes
from graphopt import registry
from graphopt.errors import PassError
from graphopt.ir import Graph
from graphopt.passes.dead_code import DeadCode
from graphopt.registry import as_pass, find_pass, register_pass, registered_passes


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def define(name: str = "scale", **declared: Any) -> Any:
    @register_pass(name, **declared)
    @dataclass(frozen=True)
    class Scale:
        """Scales everything.

        Not really.
        """

        amount: int
        also: tuple[int, ...] = (1, 2)

        def run(self, graph: Graph, ctx: Any) -> bool:
            return False

    return Scale


def test_a_dataclass_is_registered_with_its_options_and_summary() -> None:
    cls = define(accuracy=1e-3)
    known = find_pass("scale")
    assert known.definition is cls
    assert known.options == {"amount": MISSING, "also": (1, 2)}
    assert known.summary == "Scales everything."
    assert known.accuracy == 1e-3
    made = known.make({"amount": 3})
    assert (made.name, made.options) == ("scale", {"amount": 3, "also": (1, 2)})
    assert "scale" in registered_passes()


def test_a_function_is_registered() -> None:
    @register_pass("noop", accuracy="lossy")
    def noop(graph: Graph, ctx: Any) -> bool:
        """Nothing."""
        return False

    assert find_pass("noop").options == {}
    assert as_pass(noop).name == as_pass("noop").name == "noop"
    assert as_pass(noop).accuracy == "lossy"
    with pytest.raises(PassError, match="is a function and takes no options"):
        find_pass("noop").make({"amount": 1})


def test_names_instances_classes_and_functions_are_passes() -> None:
    cls = define()
    instance = cls(2)
    assert as_pass(instance).name == "scale"
    assert as_pass(instance).options["amount"] == 2
    assert as_pass("dead-code").source == DeadCode()
    assert as_pass(DeadCode).name == "dead-code"
    assert as_pass(as_pass(instance)) == as_pass(instance)

    def unregistered(graph: Graph, ctx: Any) -> bool:
        return False

    assert as_pass(unregistered).name == "unregistered"
    assert as_pass(unregistered).accuracy == "exact"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("dead-cod", "did you mean 'dead-code'?"),
        ("fold-batchnorm", "did you mean 'fold-batch-norm'?"),
        ("zzz", "registered are: "),
    ],
)
def test_an_unknown_name_gets_a_suggestion(given: str, hint: str) -> None:
    with pytest.raises(PassError, match=f"unknown pass '{given}'") as caught:
        as_pass(given)
    assert hint in str(caught.value)


def test_a_required_option_must_be_given() -> None:
    define()
    with pytest.raises(PassError, match=r"'scale' cannot be made: .*amount"):
        as_pass("scale")
    with pytest.raises(PassError, match=r"cannot be made: .*colour"):
        find_pass("scale").make({"colour": 1})


def test_duplicates_are_refused() -> None:
    with pytest.raises(PassError, match=r"'dead-code' is registered already, by graphopt\.passes"):
        define("dead-code")
    assert find_pass("dead-code").definition is DeadCode


def test_the_same_definition_may_run_again() -> None:
    """As in a notebook, where a cell runs twice."""
    first, second = define(), define()
    assert first is not second
    assert find_pass("scale").definition is second


@pytest.mark.parametrize("accuracy", ["precise", 0.0, -1.0])
def test_an_accuracy_that_means_nothing_is_refused(accuracy: Any) -> None:
    with pytest.raises(PassError, match="declares the accuracy"):
        define(accuracy=accuracy)


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(PassError, match="must be a frozen dataclass"):

        @register_pass("thawed")
        @dataclass
        class Thawed:
            def run(self, graph: Graph, ctx: Any) -> bool:
                return False

    with pytest.raises(PassError, match="must have run"):

        @register_pass("idle")
        @dataclass(frozen=True)
        class Idle:
            pass

    with pytest.raises(PassError, match="must have run"):

        @register_pass("narrow")
        @dataclass(frozen=True)
        class Narrow:
            def run(self, graph: Graph) -> bool:
                return False

    with pytest.raises(PassError, match="must have the arguments"):
        register_pass("unary")(lambda graph: False)
    with pytest.raises(PassError, match="3 is no pass"):
        as_pass(3)  # type: ignore[arg-type]
    assert not {"thawed", "idle", "narrow", "unary"} & set(registered_passes())


@pytest.mark.parametrize("name", ["passes.dead_code", "dead_code", "__main__copy"])
def test_a_built_in_pass_under_a_wrong_name_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = graphopt.passes.__path__
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "dead_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(PassError) as caught:
        spec.loader.exec_module(module)
    assert f"comes from the module '{name}'" in str(caught.value)
    assert "'graphopt.passes.dead_code'" in str(caught.value)
    assert find_pass("dead-code").definition is DeadCode


def test_a_copy_of_the_folder_named_passes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Python runs in a checkout while graphopt is installed elsewhere."""
    (tmp_path / "passes").mkdir()
    (folder,) = graphopt.passes.__path__
    source = (Path(folder) / "dead_code.py").read_text()
    (tmp_path / "passes" / "dead_code.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "passes", raising=False)
    with pytest.raises(PassError, match=r"module 'passes\.dead_code'"):
        importlib.import_module("passes.dead_code")


def test_every_built_in_pass_tells_what_it_does() -> None:
    for known in registered_passes().values():
        assert known.summary, f"{known.name} has no docstring"
        assert known.name == known.name.lower()
        assert " " not in known.name
    assert set(graphopt.passes.EXACT) <= set(registered_passes())
    assert all(find_pass(name).accuracy == "exact" for name in graphopt.passes.EXACT)
