"""The pipeline: verification, reports, numeric checks, failures that leave no damage."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import registry
from graphopt.bisection import bisect
from graphopt.errors import PassError
from graphopt.ir import Graph, TensorType, Value
from graphopt.ir.rewriting import Match, op, rewrite, rule, value
from graphopt.numerics import Yardstick, relative_error
from graphopt.pipeline import Context, Pipeline
from graphopt.registry import register_pass
from graphopt.reproducer import load_reproducer
from graphopt.target import Target

TEXT = """
graph(%x: f32[batch=2, 3]) {
  %w: f32[3] = parameter [1.0, 2.0, 3.0]
  %m: f32[2, 3] = aten.mul.Tensor(%x, %w)  # layer
  %r: f32[2, 3] = aten.relu(%m)
  %y: f32[2, 3] = aten.sin(%r)
  return %y
}
"""
INPUTS = [torch.tensor([[1.0, -2.0, 3.0], [0.1, 0.2, -0.3]])]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def graph() -> Graph:
    return Graph.from_text(TEXT)


def scaling(factor: float, accuracy: Any = "exact", name: str = "scaling") -> Any:
    """A pass that multiplies the weight."""

    @register_pass(name, accuracy=accuracy)
    def scale(graph: Graph, ctx: Context) -> bool:
        weight = graph.value("w")
        assert weight.constant is not None
        graph.set_constant(weight, weight.constant * factor)
        return True

    return scale


# -- running ----------------------------------------------------------------------------------


def test_passes_run_in_order_and_the_run_is_reported(graph: Graph) -> None:
    order = []

    def first(graph: Graph, ctx: Context) -> bool:
        order.append("first")
        return False

    def second(graph: Graph, ctx: Context) -> bool:
        order.append("second")
        graph.replace(graph.value("y"), graph.value("r"))
        return True

    run = Pipeline([first, second, "dead-code"]).run(graph)
    assert order == ["first", "second"]
    assert [(p.name, p.changed, p.nodes, p.error) for p in run.passes] == [
        ("first", False, 3, None),
        ("second", True, 3, None),
        ("dead-code", True, 2, None),
    ]
    assert all(p.seconds >= 0 for p in run.passes)
    assert run
    assert re.search(r"dead-code\W+yes\W+2\W", str(run))
    assert not Pipeline(["dead-code"]).run(graph)


def test_nodes_are_attributed_to_the_pass_that_adds_them(graph: Graph) -> None:
    @register_pass("cosine")
    def to_cosine(graph: Graph, ctx: Context) -> bool:
        graph.replace(graph.value("y"), graph.add("aten.cos", graph.value("r")))
        return True

    Pipeline([to_cosine]).run(graph)
    assert graph.value("cos").producer.origin.made_by == "cosine"  # type: ignore[union-attr]
    assert graph.made_by == ""


def test_stop_after_and_print_after(graph: Graph) -> None:
    printed: list[str] = []
    passes = [scaling(2.0, name="double"), "dead-code", scaling(3.0, name="triple")]
    run = Pipeline(passes).run(graph, stop_after=2, print_after=printed.append)
    assert [p.name for p in run.passes] == ["double", "dead-code"]
    assert printed == [f"after double:\n{graph}"]
    assert graph.value("w").constant.tolist() == [2.0, 4.0, 6.0]  # type: ignore[union-attr]


def test_the_context_reaches_the_pass(graph: Graph, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def asks(graph: Graph, ctx: Context) -> bool:
        seen.extend(ctx.track([1, 2], "numbers"))
        seen.append(ctx.target.time(graph))
        seen.append(torch.rand(1, generator=ctx.generator).item())
        seen.append((ctx.options["depth"], ctx.logger.name))
        return False

    for _ in range(2):
        context = Context(
            target=Target(time=lambda fragment: 0.5, threads=3),
            options={"depth": 7},
            logger=logging.getLogger("mine"),
        )
        Pipeline([asks]).run(graph, context)
    assert seen[:3] == [1, 2, 0.5]
    assert seen[4] == (7, "mine")
    assert seen[:5] == seen[5:], "the default generator gives the same numbers each time"
    assert capsys.readouterr().out == ""


def test_progress_is_shown_on_request(graph: Graph) -> None:
    bars = []

    def slow(graph: Graph, ctx: Context) -> bool:
        for _ in ctx.track(range(3), "inside"):
            assert ctx._bar is not None
            bars.append([(task.description, task.completed) for task in ctx._bar.tasks])
        return False

    context = Context(progress=True)
    Pipeline([slow]).run(graph, context)
    assert bars == [[("passes", 0), ("inside", k)] for k in range(3)]
    assert context._bar is None


def test_a_target_without_a_timer_says_so(graph: Graph) -> None:
    def asks(graph: Graph, ctx: Context) -> bool:
        return ctx.target.time(graph) > 1

    with pytest.raises(PassError, match="this target cannot measure time"):
        Pipeline([asks]).run(graph)


# -- what is checked always -------------------------------------------------------------------


def _lie(graph: Graph, ctx: Context) -> bool:
    scaling(2.0)(graph, ctx)
    return False


def _boast(graph: Graph, ctx: Context) -> bool:
    return True


def _mumble(graph: Graph, ctx: Context) -> Any:
    return None


def _corrupt(graph: Graph, ctx: Context) -> bool:
    graph.value("r").users.clear()
    return False


def _crash(graph: Graph, ctx: Context) -> bool:
    graph.replace(graph.value("y"), graph.value("r"))
    raise ZeroDivisionError("half way")


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (_lie, "'_lie' failed: it says that it did not change the graph, and did"),
        (_boast, "'_boast' failed: it says that it changed the graph, and did not"),
        (_mumble, "'_mumble' failed: it returned None"),
        (_corrupt, "'_corrupt' failed: %r lists nobody as users; it is used by y"),
        (_crash, "'_crash' failed: ZeroDivisionError: half way"),
    ],
)
def test_a_faulty_pass_is_named_and_the_graph_is_as_before(
    graph: Graph, faulty: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    text, tensor = str(graph), graph.value("w").constant
    with pytest.raises(PassError, match=re.escape(message)) as caught:
        Pipeline(["dead-code", faulty]).run(graph, reproducer=tmp_path)
    notes = "\n".join(caught.value.__notes__)
    assert "aten.relu(%m)" in notes, "the notes show the graph"
    assert str(tmp_path) in notes
    assert str(graph) == text
    assert graph.value("w").constant is tensor
    graph.verify()
    assert all(v.graph is graph for v in graph.values)
    assert all(node in graph for node in graph.nodes)
    Pipeline([scaling(2.0)]).run(graph)
    graph.verify()


def test_an_edit_that_changes_nothing_is_no_change(graph: Graph) -> None:
    def touch(graph: Graph, ctx: Context) -> bool:
        graph.set_operand(graph.nodes[0], "self", graph.value("x"))
        return False

    assert not Pipeline([touch]).run(graph)


def test_an_interrupt_restores_the_graph_and_passes_through(graph: Graph) -> None:
    def interrupted(graph: Graph, ctx: Context) -> bool:
        graph.replace(graph.value("y"), graph.value("r"))
        raise KeyboardInterrupt

    text = str(graph)
    with pytest.raises(KeyboardInterrupt):
        Pipeline([interrupted]).run(graph)
    assert str(graph) == text


# -- numeric checks ---------------------------------------------------------------------------


def test_numbers_are_checked_on_request(graph: Graph, tmp_path: Path) -> None:
    wrong = scaling(1.001)
    Pipeline([wrong]).run(graph.clone())
    with pytest.raises(PassError, match="declared exact, but output 0 has a relative error"):
        Pipeline([wrong]).run(graph, check=INPUTS, reproducer=tmp_path)


def test_rounding_is_not_an_error(graph: Graph) -> None:
    run = Pipeline([scaling(1.0 + 2**-23), "dead-code"]).run(graph, check=INPUTS)
    assert 0 < run.passes[0].error < 4e-6  # type: ignore[operator]
    assert run.passes[1].error == 0
    assert "relative error" in str(run)


@pytest.mark.parametrize(("accuracy", "fits"), [(0.5, True), ("lossy", True), (1e-4, False)])
def test_the_declared_tolerance_decides(
    graph: Graph, accuracy: Any, fits: bool, tmp_path: Path
) -> None:
    rough = scaling(1.01, accuracy)
    if fits:
        run = Pipeline([rough]).run(graph, check=INPUTS)
        assert 1e-3 < run.passes[0].error < 0.5  # type: ignore[operator]
    else:
        with pytest.raises(PassError, match=r"declares a tolerance of 0\.0001, and has"):
            Pipeline([rough]).run(graph, check=INPUTS, reproducer=tmp_path)


def test_random_operators_do_not_count_as_a_change() -> None:
    graph = Graph.from_text("""
    graph(%x: f32[2, 3]) {
      %y: f32[2, 3] = aten.dropout(%x, 0.5, True)
      %z: f32[2, 3] = aten.relu(%x)
      return %y
    }""")
    state = torch.random.get_rng_state()
    run = Pipeline(["dead-code"]).run(graph, check=INPUTS)
    assert run.passes[0].error == 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, 4.0], [1.0, 4.0], 0.0),
        ([1.0, 4.0], [1.5, 4.0], 0.125),
        ([0.0, 0.0], [0.0, 1e-9], float("inf")),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("nan"), 2.0], [0.0, 2.0], float("inf")),
        ([float("inf"), 2.0], [float("inf"), 3.0], 0.5),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf")),
        ([1.0, 2.0], [1.0, float("inf")], float("inf")),
        ([], [], 0.0),
    ],
)
def test_relative_error(expected: list[float], actual: list[float], error: float) -> None:
    assert relative_error([torch.tensor(expected)], [torch.tensor(actual)]) == error


def test_relative_error_of_other_outputs() -> None:
    one, two = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert relative_error([one, 3, None], [one.clone(), 3, None]) == 0
    assert relative_error([one], [two]) == float("inf")
    assert relative_error([3], [3.0]) == float("inf")
    assert relative_error([torch.ones(2)], [torch.ones(2, 1)]) == float("inf")
    assert relative_error([torch.tensor([3 + 4j])], [torch.tensor([3 + 3j])]) == pytest.approx(0.2)


def test_a_yardstick_notices_a_small_relative_fault() -> None:
    """A tenth of a percent of one of many elements, in a graph that itself rounds a lot."""
    graph = Graph()
    x = graph.add_input("x", TensorType(torch.float32, (64, 256)))
    weight = torch.randn(256, 256)
    weight[7, 9] = 1.0
    w = graph.constant(weight, "w")
    graph.set_outputs([graph.add("aten.mm", x, w)])
    yardstick = Yardstick(graph, [torch.randn(64, 256)])
    assert yardstick.departs(graph) is None
    wrong = weight.clone()
    wrong[7, 9] = 1.001
    graph.set_constant(w, wrong)
    assert yardstick.departs(graph) is not None


# -- reproducers ------------------------------------------------------------------------------


def test_a_reproducer_holds_graph_constants_and_pipeline(tmp_path: Path) -> None:
    @register_pass("fails")
    @dataclass(frozen=True)
    class Fails:
        level: float = 0.5
        names: tuple[str, ...] = ("a",)
        dtype: torch.dtype = torch.int8

        def run(self, graph: Graph, ctx: Context) -> bool:
            raise RuntimeError("as always")

    shared = torch.randn(4, 3)
    tensors = [
        shared,
        shared.t(),
        shared[:2],
        torch.tensor(0.5),
        torch.randn(3, dtype=torch.complex128).conj(),
        torch.ones(1).expand(3),
        torch.randn(10).to(torch.bfloat16),
        torch.empty(0, 2),
        torch.tensor([float("nan"), -0.0]),
    ]
    graph = Graph()
    outputs = [graph.constant(t, f"layer.{k}", trainable=k == 0) for k, t in enumerate(tensors)]
    graph.set_outputs(outputs)
    with pytest.raises(PassError) as caught:
        Pipeline([scaling_nothing, Fails(0.25, ("b", "c")), "dead-code"]).run(
            graph, reproducer=tmp_path / "new"
        )
    assert "load_reproducer" in caught.value.__notes__[-1]
    description = json.loads((tmp_path / "new" / "pipeline.json").read_text())
    assert [entry["name"] for entry in description["passes"]] == ["fails", "dead-code"]
    assert "as always" in description["error"]

    loaded, passes = load_reproducer(tmp_path / "new")
    assert str(loaded) == str(graph)
    for wanted, got in zip(graph.constants, loaded.constants, strict=True):
        assert wanted.trainable == got.trainable
        torch.testing.assert_close(
            got.constant, wanted.constant.resolve_conj(), rtol=0, atol=0, equal_nan=True
        )  # type: ignore[union-attr]
    assert passes[0].source == Fails(0.25, ("b", "c"))
    with pytest.raises(PassError, match="'fails' failed: RuntimeError: as always"):
        Pipeline(passes).run(loaded, reproducer=tmp_path / "again")


def scaling_nothing(graph: Graph, ctx: Context) -> bool:
    return False


def test_an_option_that_no_file_holds_is_named(graph: Graph, tmp_path: Path) -> None:
    @register_pass("calibrate")
    @dataclass(frozen=True)
    class Calibrate:
        data: Any

        def run(self, graph: Graph, ctx: Context) -> bool:
            raise RuntimeError

    with pytest.raises(PassError):
        Pipeline([Calibrate(object())]).run(graph, reproducer=tmp_path)
    with pytest.raises(PassError, match="the option 'data' of 'calibrate' was <object object"):
        load_reproducer(tmp_path)


def test_a_folder_that_is_no_reproducer(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="is no reproducer"):
        load_reproducer(tmp_path)


# -- bisection --------------------------------------------------------------------------------

LAYERS = """
graph(%x: f32[batch=2, 3]) {
  %a: f32[2, 3] = aten.sin(%x)
  %b: f32[2, 3] = aten.mul.Tensor(%a, 1.5)
  %c: f32[2, 3] = aten.sin(%b)
  %d: f32[2, 3] = aten.mul.Tensor(%c, 1.00001)
  %e: f32[2, 3] = aten.sin(%d)
  %f: f32[2, 3] = aten.mul.Tensor(%e, 1.25)
  %g: f32[2, 3] = aten.sin(%f)
  %h: f32[2, 3] = aten.mul.Tensor(%g, 1.5)
  return %h
}
"""


@rule("x * k => x", op("aten.mul.Tensor", value("x"), ...))
def forget_factor(graph: Graph, match: Match) -> Value:
    result: Value = match["x"]
    return result


def forgets_factors(graph: Graph, ctx: Context) -> bool:
    return rewrite(graph, [forget_factor])


def test_bisect_finds_the_pass_and_the_application() -> None:
    """The factors are forgotten one by one; the second of 1.00001 is tolerable, the first not."""
    graph = Graph.from_text(LAYERS)
    text = str(graph)
    passes = ["dead-code", "constant-folding", forgets_factors, "dead-code"]
    culprit = bisect(passes, graph, INPUTS, 1e-3)
    assert culprit is not None
    assert (culprit.position, culprit.name) == (2, "forgets_factors")
    assert culprit.application == "'x * k => x' at %b"
    assert [len(culprit.before), len(culprit.after)] == [8, 7]
    assert culprit.error > 1e-3
    assert "pass 2 ('forgets_factors'), applying 'x * k => x' at %b," in str(culprit)
    assert str(graph) == text


def test_bisect_finds_a_later_application() -> None:
    graph = Graph.from_text(LAYERS.replace("1.5)", "1.0)"))
    culprit = bisect([forgets_factors], graph, INPUTS, 1e-3)
    assert culprit is not None
    assert culprit.application == "'x * k => x' at %f"


def test_bisect_of_a_pass_without_rules() -> None:
    graph = Graph.from_text(TEXT)
    good, bad = scaling(1.0 + 1e-6, name="good"), scaling(1.5, "lossy", name="bad")
    culprit = bisect([good, bad, "dead-code"], graph, INPUTS, 1e-3)
    assert culprit is not None
    assert (culprit.position, culprit.name, culprit.application) == (1, "bad", None)
    assert bisect([good, "dead-code"], graph, INPUTS, 1e-3) is None


def test_bisect_tells_what_a_pass_does_beside_its_rules() -> None:
    def mixed(graph: Graph, ctx: Context) -> bool:
        rewrite(graph, [forget_factor])
        graph.replace(graph.value("h" if "h" in names(graph) else "g"), graph.value("a"))
        return True

    def names(graph: Graph) -> set[str]:
        return {value.name for value in graph.values}

    culprit = bisect([mixed], Graph.from_text(LAYERS), INPUTS, 1e-3)
    assert culprit is not None
    assert culprit.application is None


def test_bisect_refuses_a_tolerance_that_means_nothing() -> None:
    with pytest.raises(PassError, match="must not be negative"):
        bisect([], Graph.from_text(LAYERS), INPUTS, float("nan"))
