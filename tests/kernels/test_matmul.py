"""Matrix products against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import chain, check, constant, numbers
from support import solve

from graphopt.kernels.expression import Expression
from graphopt.kernels.operand import Layout, Operand
from graphopt.kernels.problem import MatmulProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES
from graphopt.kernels.tile import TILES

HEIGHT, WIDTH = TILES[0].height, TILES[0].width * LANES


def plain(*shape: int) -> Operand:
    return Operand.plain("float32", shape)


def turned(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape


def multiply(
    a: np.ndarray, b: np.ndarray, transposed: tuple[bool, bool] = (False, False)
) -> np.ndarray:
    """torch's result in float64."""
    factors = [torch.tensor(factor).double() for factor in (a, b)]
    for index in (0, 1):
        if transposed[index]:
            factors[index] = factors[index].mT
    return torch.matmul(*factors).numpy()


def check_product(
    a: Operand,
    b: Operand,
    transposed: tuple[bool, bool] = (False, False),
    epilogue: Expression | None = None,
) -> None:
    left, right = numbers(a.shape), numbers(b.shape, 1)
    expected = multiply(left, right, transposed)
    magnitude = multiply(np.abs(left), np.abs(right), transposed)
    problem = MatmulProblem((a, b), (plain(*expected.shape),), transposed, epilogue)
    check(problem, [left, right], expected, magnitude)


SIZES = [
    (1, 1, 1),
    (1, 7, 1000),
    (1, 300, WIDTH + 1),
    (2, 40, 3),
    (3, 40, LANES),
    (HEIGHT - 1, 33, WIDTH - 1),
    (HEIGHT, 64, WIDTH),
    (HEIGHT + 1, 5, WIDTH + LANES),
    (37, 390, 2 * WIDTH + 3),
    (60, 20, 1),
    (4, 0, 5),
    (0, 4, 5),
    (5, 4, 0),
]


@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_linear(rows: int, depth: int, columns: int) -> None:
    check_product(plain(rows, depth), constant((columns, depth)), (False, True))


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_two_tensors(rows: int, depth: int, columns: int, transposed: tuple[bool, bool]) -> None:
    a = plain(*turned((rows, depth), transposed[0]))
    b = plain(*turned((depth, columns), transposed[1]))
    check_product(a, b, transposed)


@pytest.mark.parametrize("rows", [3, 100])
def test_a_constant_on_the_left(rows: int) -> None:
    check_product(constant((rows, 30)), plain(30, 40))
    check_product(constant((rows, 30)), plain(30, 1))
    check_product(constant((30, rows)), plain(1, 30), (True, True))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3, 5, 7), (2, 3, 7, 4)),
        ((2, 3, 5, 7), (7, 4)),
        ((5, 7), (2, 3, 7, 4)),
        ((2, 1, 5, 7), (3, 7, 4)),
        ((3, 1, 7), (3, 7, 20)),
        ((3, 1, 7), (7, 20)),
        ((1, 1, 1, 7), (1, 1, 7, 20)),
        ((2, 3, 70, 7), (2, 3, 7, 1)),
        ((2, 0, 5, 7), (2, 0, 7, 4)),
        ((1, 2, 1, 2, 1, 3, 2), (2, 1, 2, 1, 2, 1, 2, 3)),
    ],
)
def test_batches(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check_product(plain(*a), plain(*b))


@pytest.mark.parametrize("turned_left", [False, True])
@pytest.mark.parametrize(("left", "shared"), [((2, 5, 7), (7, 20)), ((3, 2, 1, 4), (4, 1))])
def test_a_batch_of_constants_times_one_matrix(
    left: tuple[int, ...], shared: tuple[int, ...], turned_left: bool
) -> None:
    check_product(constant(turned(left, turned_left)), plain(*shared), (turned_left, False))


def test_attention() -> None:
    """Heads of queries and keys as they come out of a linear layer, not moved in memory."""
    heads = Layout("float32", (0, 2, 1, 3))
    query, key = Operand((2, 4, 19, 8), heads), Operand((2, 4, 21, 8), heads)
    check_product(query, key, (False, True))
    weights, value = plain(2, 4, 19, 21), Operand((2, 4, 21, 8), heads)
    left, right = numbers(weights.shape), numbers(value.shape, 1)
    result = Operand((2, 4, 19, 8), heads)
    check(
        MatmulProblem((weights, value), (result,)),
        [left, right],
        multiply(left, right),
        multiply(np.abs(left), np.abs(right)),
    )


def test_every_layout() -> None:
    rows_first, columns_first, pitched = (
        Layout("float32", (0, 1)),
        Layout("float32", (1, 0)),
        Layout("float32", (0, 1), pitch=64),
    )
    left, right = numbers((9, 30)), numbers((30, 35), 1)
    expected, magnitude = multiply(left, right), multiply(np.abs(left), np.abs(right))
    for a in (rows_first, columns_first, pitched):
        for b in (rows_first, columns_first, pitched):
            for y in (rows_first, columns_first, pitched):
                operands = (Operand((9, 30), a), Operand((30, 35), b))
                problem = MatmulProblem(operands, (Operand((9, 35), y),))
                check(problem, [left, right], expected, magnitude, [(1, True, 0)])


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    def size(high: int) -> int:
        return data.draw(st.integers(1, high))

    batch = [size(3) for _ in range(data.draw(st.integers(0, 2)))]
    rows, depth, columns = size(40), size(80), size(120)
    transposed = data.draw(st.tuples(st.booleans(), st.booleans()))
    operands = []
    for shape, turn in zip(((rows, depth), (depth, columns)), transposed, strict=True):
        kept = data.draw(st.integers(0, len(batch)))
        outer = [data.draw(st.sampled_from([1, n])) for n in batch[len(batch) - kept :]]
        whole = turned((*outer, *shape), turn)
        fixed = data.draw(st.booleans())
        operands.append(constant(whole) if fixed else plain(*whole))
    check_product(*operands, transposed)


def test_epilogues() -> None:
    x, weight, bias = numbers((2, 19, 40)), numbers((50, 40), 1), numbers((50,), 2)
    residual, scale = numbers((2, 19, 50), 3), numbers((2, 1, 50), 4)
    product = multiply(x, weight, (False, True))
    magnitude = 1 + multiply(np.abs(x), np.abs(weight), (False, True))

    def run(epilogue: Expression, others: list[np.ndarray], expected: np.ndarray) -> None:
        inputs = (plain(2, 19, 40), constant((50, 40)), *(plain(*other.shape) for other in others))
        problem = MatmulProblem(inputs, (plain(2, 19, 50),), (False, True), epilogue)
        check(problem, [x, weight, *others], expected, 10 * magnitude)

    run(chain(("add", "e0"), extras=1), [bias], product + bias)
    run(
        chain(("add", "e0"), ("gelu",), extras=1),
        [bias],
        torch.nn.functional.gelu(torch.tensor(product + bias)).numpy(),
    )
    run(
        chain(("mul", "e0"), ("add", "e1"), extras=2), [scale, residual], product * scale + residual
    )
    run(chain(("relu",)), [], np.maximum(product, 0))
    column = numbers((2, 19, 1), 5)
    run(chain(("sub", "e0"), extras=1), [column], product - column)


def test_epilogue_of_one_column() -> None:
    x, weight, bias = numbers((60, 20)), numbers((1, 20), 1), numbers((1,), 2)
    rows = numbers((60, 1), 3)
    product = multiply(x, weight, (False, True)) + bias + rows
    inputs = (plain(60, 20), constant((1, 20)), plain(1), plain(60, 1))
    epilogue = chain(("add", "e0"), ("add", "e1"), extras=2)
    problem = MatmulProblem(inputs, (plain(60, 1),), (False, True), epilogue)
    check(problem, [x, weight, bias, rows], product, 10 + np.abs(product))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("transposed", [False, True])
def test_special_values_stay_where_they_belong(value: float, transposed: bool) -> None:
    a, b = numbers((11, 30)), numbers(turned((30, 37), transposed), 1)
    a[3, 29] = b[0, 0] = b[-1, -1] = value
    expected = multiply(a, b, (False, transposed))
    magnitude = np.full(expected.shape, 1000.0)
    problem = MatmulProblem(
        (plain(*a.shape), plain(*b.shape)), (plain(11, 37),), (False, transposed)
    )
    check(problem, [a, b], expected, magnitude)


def test_accuracy_is_that_of_torch() -> None:
    a, b = numbers((16, 3000)), numbers((3000, 64), 1)
    exact = multiply(a, b)
    (result,) = solve(MatmulProblem((plain(*a.shape), plain(*b.shape)), (plain(16, 64),)), [a, b])
    theirs = torch.matmul(torch.tensor(a), torch.tensor(b)).numpy()
    assert np.abs(result - exact).mean() < 2 * np.abs(theirs - exact).mean()


def test_what_is_left_to_others() -> None:
    wide = Operand.plain("float64", (3, 3))
    assert not candidates(MatmulProblem((wide, wide), (wide,)))
    assert not candidates(MatmulProblem((plain(3, 3),) * 2, (plain(3, 3),), epilogue=chain(("x",))))


def test_malformed_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="is not"):
        candidates(MatmulProblem((plain(3, 4), plain(5, 4)), (plain(3, 4),)))
    with pytest.raises(ValueError, match="is not"):
        candidates(MatmulProblem((plain(3, 4), plain(5, 4)), (plain(3, 4),), (False, True)))
