"""Lowering: what is fused, what must not be, and that the numbers are the graph's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graphopt import reference
from graphopt.engine import Plan, Selection, compile_graph
from graphopt.ir import Graph, TensorType, Value
from graphopt.kernels.problem import ConvolutionProblem


def new_graph(*shapes: Sequence[int], batch: bool = False) -> tuple[Graph, list[Value]]:
    """A graph with float32 inputs; with `batch`, dimension 0 is free."""
    graph = Graph({"batch": shapes[0][0]} if batch else {})
    free = {0: "batch"} if batch else {}
    inputs = [
        graph.add_input(f"x{k}", TensorType(torch.float32, tuple(shape)), free)
        for k, shape in enumerate(shapes)
    ]
    return graph, inputs


def plan_of(graph: Graph, sizes: dict[str, int] | None = None, threads: int = 2) -> Plan:
    return compile_graph(graph, sizes, threads=threads, selection=Selection(measure=False))


def check(graph: Graph, inputs: Sequence[Tensor], sizes: dict[str, int] | None = None) -> Plan:
    """Compile, run, and compare with torch in float64."""
    graph.verify()
    plan = plan_of(graph, sizes)
    results = plan.run(*inputs)
    exact = [r for r in reference.run(graph, inputs, dtype=torch.float64) if torch.is_tensor(r)]
    own = [r for r in reference.run(graph, inputs) if torch.is_tensor(r)]
    assert len(results) == len(exact)
    for result, correct, torch_result in zip(results, exact, own, strict=True):
        assert result.shape == correct.shape
        assert result.dtype == torch_result.dtype
        if result.numel() and result.is_floating_point():
            error = (torch_result.double() - correct).abs().max()
            bound = 4 * error + 1e-6 * correct.abs().max()
            assert (result.double() - correct).abs().max() <= bound
        else:
            assert torch.equal(result, torch_result)
    return plan


def ops_of(plan: Plan) -> list[list[str]]:
    return [[node.op.split(".")[1] for node in step.nodes] for step in plan.steps]


def test_a_chain_is_one_loop() -> None:
    graph, (x, y) = new_graph((3, 7), (7,))
    z = graph.add("aten.relu", graph.add("aten.add.Tensor", graph.add("aten.mul.Tensor", x, y), y))
    graph.set_outputs([z])
    assert ops_of(check(graph, [torch.randn(3, 7), torch.randn(7)])) == [["mul", "add", "relu"]]


def test_branches_of_one_shape_are_one_loop_with_several_results() -> None:
    graph, (x, y) = new_graph((5, 3), (5, 3))
    a, b = graph.add("aten.relu", x), graph.add("aten.neg", y)
    c = graph.add("aten.add.Tensor", a, b)
    graph.set_outputs([c, a])
    assert len(check(graph, [torch.randn(5, 3), torch.randn(5, 3)]).steps) == 1


def test_a_loop_does_not_swallow_what_its_operand_depends_on() -> None:
    graph, (x,) = new_graph((4, 6))
    y = graph.add("aten.mul.Tensor", x, 2.0)
    total = graph.add("aten.sum.dim_IntList", y, [1], True)
    graph.set_outputs([graph.add("aten.add.Tensor", y, total)])
    assert ops_of(check(graph, [torch.randn(4, 6)])) == [["mul"], ["sum"], ["add"]]


def test_a_circle_through_another_fused_loop_is_avoided() -> None:
    # a and d fused, b and c fused, would wait for each other: b <- a, d <- c.
    graph, (x,) = new_graph((4, 6))
    a = graph.add("aten.mul.Tensor", x, 2.0)
    mean = graph.add("aten.mean.dim", a, [1], True)
    b = graph.add("aten.add.Tensor", mean, 1.0)
    e = graph.add("aten.relu", x)
    c = graph.add("aten.sum.dim_IntList", e, [1], True)
    f = graph.add("aten.add.Tensor", b, c)
    d = graph.add("aten.add.Tensor", a, graph.add("aten.add.Tensor", e, f))
    graph.set_outputs([d, b])
    check(graph, [torch.randn(4, 6)])


def convolution(graph: Graph, x: Value, channels: int, name: str, **options: object) -> Value:
    weight = graph.constant(torch.randn(channels, x.shape[1], 3, 3), f"{name}.weight")
    bias = graph.constant(torch.randn(channels), f"{name}.bias")
    return graph.add("aten.conv2d", x, weight, bias, **options)


def test_a_convolution_takes_bias_residual_and_activation() -> None:
    graph, (x, r) = new_graph((2, 3, 8, 8), (2, 5, 8, 8))
    y = convolution(graph, x, 5, "conv", padding=[1, 1])
    graph.set_outputs([graph.add("aten.relu", graph.add("aten.add.Tensor", r, y))])
    plan = check(graph, [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)])
    assert ops_of(plan) == [["conv2d", "add", "relu"]]


def test_a_result_with_two_users_is_written() -> None:
    graph, (x,) = new_graph((1, 3, 6, 6))
    y = convolution(graph, x, 4, "conv")
    graph.set_outputs([graph.add("aten.relu", y), graph.add("aten.neg", y)])
    assert ["conv2d"] in ops_of(check(graph, [torch.randn(1, 3, 6, 6)]))


def test_a_returned_convolution_is_written() -> None:
    graph, (x,) = new_graph((1, 3, 6, 6))
    y = convolution(graph, x, 4, "conv")
    graph.set_outputs([y, graph.add("aten.relu", y)])
    check(graph, [torch.randn(1, 3, 6, 6)])


def test_a_row_is_not_taken_for_channels() -> None:
    # 4 channels and rows of 4: a vector of 4 runs along the rows, as in torch.
    graph, (x, row) = new_graph((1, 3, 4, 4), (4,))
    y = convolution(graph, x, 4, "conv", padding=[1, 1])
    graph.set_outputs([graph.add("aten.mul.Tensor", y, row)])
    check(graph, [torch.randn(1, 3, 4, 4), torch.randn(4)])


def test_two_uses_of_one_result_in_one_epilogue() -> None:
    graph, (x,) = new_graph((1, 3, 6, 6))
    y = convolution(graph, x, 4, "conv")
    gate = graph.add("aten.sigmoid", y)
    graph.set_outputs([graph.add("aten.mul.Tensor", y, gate)])
    check(graph, [torch.randn(1, 3, 6, 6)])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    graph, (x,) = new_graph((1, 2, 7, 9))
    weight = graph.constant(torch.randn(3, 2, 4, 3), "weight")
    graph.set_outputs([graph.add("aten.conv2d.padding", x, weight, None, [1, 1], padding)])
    check(graph, [torch.randn(1, 2, 7, 9)])


def test_views_cost_nothing_where_they_are_contiguous() -> None:
    graph, (x,) = new_graph((4, 6))
    flat = graph.add("aten.reshape", x, [24])
    part = graph.add("aten.slice.Tensor", graph.add("aten.reshape", flat, [4, 6]), 0, 1, 3)
    row = graph.add("aten.select.int", part, 0, 1)
    graph.set_outputs([graph.add("aten.relu", row)])
    assert ops_of(check(graph, [torch.randn(4, 6)])) == [["relu"]]


def test_views_that_move_elements() -> None:
    graph, (x,) = new_graph((3, 4, 5))
    outputs = [
        graph.add("aten.permute", x, [2, 0, 1]),
        graph.add("aten.transpose.int", x, -1, 0),
        graph.add("aten.slice.Tensor", x, 2, 1, 5, 2),
        graph.add("aten.select.int", x, 1, -1),
        graph.add("aten.expand", graph.add("aten.select.int", x, 1, 0), [2, 3, 5]),
        *graph.add_node("aten.split.Tensor", x, 3, -1).outputs,
        *graph.add_node("aten.chunk", x, 2, 1).outputs,
        *graph.add_node("aten.unbind.int", x, 1).outputs,
    ]
    graph.set_outputs(outputs)
    check(graph, [torch.randn(3, 4, 5)])


def test_concatenation_padding_and_rolling() -> None:
    graph, (x, y) = new_graph((2, 3, 4), (2, 1, 4))
    graph.set_outputs(
        [
            graph.add("aten.cat", [x, y, x], 1),
            graph.add("aten.constant_pad_nd", x, [1, 2, 0, -1], 3.5),
            graph.add("aten.roll", x, [-1], [2]),
            graph.add("aten.roll", x, [1, 1], [1, 2]),
        ]
    )
    check(graph, [torch.randn(2, 3, 4), torch.randn(2, 1, 4)])


def test_reductions_take_what_follows() -> None:
    graph, (x,) = new_graph((2, 5, 3, 3))
    mean = graph.add("aten.mean.dim", x, [2, 3], True)
    graph.set_outputs([graph.add("aten.sigmoid", mean), graph.add("aten.sum", x)])
    check(graph, [torch.randn(2, 5, 3, 3)])


def test_what_follows_a_reduction_may_change_the_dtype() -> None:
    graph, (x,) = new_graph((3, 37))
    mean = graph.add("aten.mean.dim", x, [1], True)
    total = graph.add("aten.sum.dim_IntList", x, [1])
    positive = graph.add("aten.gt.Scalar", mean, 0.0)
    graph.set_outputs([positive, graph.add("aten.to.dtype", total, torch.float64)])
    assert len(check(graph, [torch.randn(3, 37)]).steps) == 2


def test_dtypes_and_promotion() -> None:
    graph, (x,) = new_graph((3, 4))
    whole = graph.add("aten.to.dtype", x, torch.int64)
    half = graph.constant(torch.tensor(0.5, dtype=torch.float64), "half")
    mask = graph.add("aten.gt.Tensor", x, half)
    graph.set_outputs(
        [
            mask,
            graph.add("aten.mul.Tensor", x, half),
            graph.add("aten.add.Tensor", whole, 1, alpha=3),
            graph.add("aten.div.Tensor", whole, 2),
            graph.add("aten.where.self", mask, x, half),
            graph.add("aten.eq.Scalar", whole, 0.5),
            graph.add("aten.bitwise_not", mask),
        ]
    )
    check(graph, [torch.randn(3, 4) * 3])


def test_what_kernels_do_not_know_is_left_to_torch() -> None:
    graph, (x,) = new_graph((4, 6))
    cumulated = graph.add("aten.cumsum", x, 1)
    values, indices = graph.add_node("aten.max.dim", x, 1).outputs
    diagonal = graph.add("aten.diagonal", x)
    half = graph.add("aten.to.dtype", x, torch.float16)
    graph.set_outputs([graph.add("aten.relu", cumulated), values, indices, diagonal, half])
    plan = check(graph, [torch.randn(4, 6)])
    assert {step.nodes[0].op for step in plan.call_backs} >= {"aten.cumsum", "aten.max.dim"}
    assert all(step.kernel.startswith("torch: ") for step in plan.call_backs)


def test_sizes_become_numbers_of_the_plan() -> None:
    graph, (x,) = new_graph((2, 3, 4), batch=True)
    size = graph.add("aten.sym_size.int", x, 0)
    rows = graph.add("operator.mul", size, 3)
    flat = graph.add("aten.reshape", x, [rows, 4])
    scaled = graph.add("aten.mul.Scalar", flat, size)
    graph.set_outputs([scaled, size, None])
    for batch in (2, 1, 5):
        x_given = torch.randn(batch, 3, 4)
        plan = check(graph, [x_given], {"batch": batch})
        assert plan.literals[1:] == (batch, None)
        assert plan.is_computed == (True, False, False)


def test_inputs_and_constants_as_outputs() -> None:
    graph, (x,) = new_graph((2, 3))
    constant = graph.constant(torch.randn(3), "row")
    graph.set_outputs([x, constant, x, graph.add("aten.reshape", x, [6])])
    check(graph, [torch.randn(2, 3)])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single(shape: tuple[int, int]) -> None:
    graph, (x,) = new_graph(shape)
    y = graph.add("aten.relu", x)
    graph.set_outputs([y, graph.add("aten.cat", [y, x], 1), graph.add("aten.sum", y)])
    check(graph, [torch.randn(shape)])


def test_another_size_takes_over_kernels_and_packed_constants() -> None:
    graph, (x,) = new_graph((2, 3, 8, 8), batch=True)
    graph.set_outputs([convolution(graph, x, 5, "conv")])
    first = plan_of(graph)
    second = compile_graph(graph, {"batch": 3}, threads=2, like=first)
    assert [step.kernel for step in second.steps] == [step.kernel for step in first.steps]
    (ours,), (theirs,) = first.packed.values(), second.packed.values()
    assert [a is b for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)


def test_a_convolution_is_a_problem_once() -> None:
    graph, (x,) = new_graph((1, 3, 6, 6))
    graph.set_outputs([convolution(graph, x, 4, "conv")])
    from graphopt.engine.lowering import lower

    (work,) = lower(graph, graph.types_under({}))
    assert isinstance(work.problem, ConvolutionProblem)
    assert [value.name for value in work.inputs] == ["x0", "conv.weight", "conv.bias"]


@pytest.mark.parametrize("op", ["aten.pad", "aten.constant_pad_nd"])
@pytest.mark.parametrize("own", [0, 1])
def test_zeros_around_an_image_are_the_padding_of_its_convolution(op: str, own: int) -> None:
    for groups, outputs in ((1, 5), (4, 8)):
        graph, (x,) = new_graph((2, 4, 9, 8))
        w = graph.constant(torch.randn(outputs, 4 // groups, 3, 3), "w")
        amounts = [0, 1, 2, 0]
        pad = (
            graph.add(op, x, amounts, "constant", None)
            if op == "aten.pad"
            else graph.add(op, x, amounts)
        )
        y = graph.add("aten.conv2d", pad, w, None, [2, 2], [own, own], [1, 1], groups)
        graph.set_outputs([y])
        assert ops_of(check(graph, [torch.randn(2, 4, 9, 8)])) == [["conv2d"]]


@pytest.mark.parametrize(
    ("amounts", "value"), [([0, 1, 0, 1], 1.0), ([-1, 1, 0, 1], 0.0), ([0, 1, 0, 1, 1, 0], 0.0)]
)
def test_other_padding_is_a_copy(amounts: list[int], value: float) -> None:
    graph, (x,) = new_graph((2, 4, 9, 8))
    channels = 4 + sum(amounts[4:])
    w = graph.constant(torch.randn(5, channels, 3, 3), "w")
    pad = graph.add("aten.constant_pad_nd", x, amounts, value)
    graph.set_outputs([graph.add("aten.conv2d", pad, w, None)])
    plan = check(graph, [torch.randn(2, 4, 9, 8)])
    assert ops_of(plan) == [["constant_pad_nd"], ["conv2d"]]


def test_padding_that_others_see_is_made_for_them() -> None:
    graph, (x,) = new_graph((2, 4, 9, 8))
    w = graph.constant(torch.randn(5, 4, 3, 3), "w")
    pad = graph.add("aten.constant_pad_nd", graph.add("aten.relu", x), [0, 1, 0, 1])
    graph.set_outputs([graph.add("aten.conv2d", pad, w, None), pad])
    steps = ops_of(check(graph, [torch.randn(2, 4, 9, 8)]))
    assert sorted(steps) == [["constant_pad_nd"], ["conv2d"], ["relu"]]
