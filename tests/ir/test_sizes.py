"""Free sizes: expressions, guards, the second assignment, and binding to shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import GraphError
from graphopt.ir.sizes import bind, evaluate, other_assignment, violated


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("batch", 6),
        ("2*batch + 1", 13),
        ("batch // 4", 1),
        ("batch % 4 == 2", True),
        ("max(batch, tokens) - min(batch, 3)", 7),
        ("math.floor(batch / 4)", 1),
        ("batch if batch > tokens else tokens", 10),
        ("not (batch > 2 and tokens <= 3)", True),
        ("-batch + abs(-3)", -3),
        ("int(batch / 5) ** 2", 1),
    ],
)
def test_expressions(expression, value):
    assert evaluate(expression, {"batch": 6, "tokens": 10}) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("bach", "names 'bach'"),
        ("batch +", "cannot be read"),
        ("batch // 0", "has no value"),
        ("().__class__", "more than arithmetic"),
        ("batch.real", "more than arithmetic"),
        ("math.__loader__", "more than arithmetic"),
        ("[batch for x in (1,)]", "more than arithmetic"),
        ("(lambda: batch)()", "more than arithmetic"),
        ("math.nothing(batch)", "has no value"),
        ("open('x')", "names 'open'"),
    ],
)
def test_what_is_no_size_expression(expression, reason):
    with pytest.raises(GraphError, match=reason):
        evaluate(expression, {"batch": 6})


def test_the_first_violated_guard():
    guards = ["batch >= 2", "batch % 2 == 0", "batch < 10"]
    assert violated(guards, {"batch": 4}) is None
    assert violated(guards, {"batch": 13}) == "batch % 2 == 0"
    assert violated(guards, {"batch": 12}) == "batch < 10"


@pytest.mark.parametrize(
    ("example", "guards"),
    [
        ({"batch": 2}, []),
        ({"batch": 4}, ["batch % 4 == 0"]),
        ({"batch": 3}, ["batch <= 5"]),
        ({"batch": 5}, ["batch <= 5"]),
        ({"batch": 2}, ["batch != 5", "batch != 7", "batch > 1"]),
        ({"batch": 8}, ["2048 % batch == 0", "batch >= 8"]),
        ({"batch": 4, "double": 8}, ["double == 2*batch"]),
        ({"batch": 4, "tokens": 12}, ["tokens % batch == 0"]),
        ({"batch": 2, "tokens": 3}, ["batch*tokens <= 6"]),
        ({c: 16 for c in "abcdef"}, [f"{c} % 8 == 0" for c in "abcdef"]),
        ({"batch": 4}, ["64 % (batch - 5) == 0"]),
    ],
)
def test_another_assignment_satisfies_the_guards(example, guards):
    other = other_assignment(example, guards)
    assert other is not None
    assert other.keys() == example.keys()
    assert all(other[name] != example[name] for name in example)
    assert all(size > 1 for size in other.values())
    assert len(set(other.values())) == len(other)
    assert violated(guards, other) is None


def test_a_size_that_its_guard_fixes_does_not_fix_the_others():
    other = other_assignment({"batch": 4, "tokens": 8}, ["batch == 4"])
    assert other is not None
    assert other["batch"] == 4
    assert other["tokens"] not in (1, 8)


def test_no_other_assignment():
    assert other_assignment({}, []) is None
    assert other_assignment({"batch": 4}, ["batch == 4"]) is None
    assert other_assignment({"a": 3, "b": 4}, ["a == 3", "b == a + 1"]) is None


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(2, 40), min_size=1),
    st.integers(1, 8),
    st.integers(0, 40),
)
def test_another_assignment_is_found_where_there_is_one(example, divisor, bound):
    guards = [f"{name} % {divisor} == {size % divisor}" for name, size in example.items()]
    guards += [f"{name} <= {size + bound}" for name, size in example.items()]
    other = other_assignment(example, guards)
    exists = any(
        n % divisor == size % divisor and n != size
        for size in example.values()
        for n in range(2, size + bound + 1)
    )
    assert (other is not None) == exists
    if other is not None:
        assert other != example
        assert violated(guards, other) is None


def test_binding():
    shapes = [(4, 3, 9), (9, 8)]
    expressions = [{0: "batch", 2: "tokens"}, {0: "tokens", 1: "2*batch"}]
    assert bind(shapes, expressions, ["batch", "tokens"]) == {"batch": 4, "tokens": 9}


@pytest.mark.parametrize(
    ("shapes", "expressions", "reason"),
    [
        ([(4,), (5,)], [{0: "batch"}, {0: "batch"}], "input 1 has size 5 in dimension 0"),
        ([(4,), (9,)], [{0: "batch"}, {0: "2*batch"}], "2\\*batch is 8"),
        ([(4,)], [{0: "2*batch"}], "'batch' is the size of no input"),
        ([()], [{0: "batch"}], "rank"),
    ],
)
def test_shapes_that_do_not_bind(shapes, expressions, reason):
    with pytest.raises(GraphError, match=reason):
        bind(shapes, expressions, ["batch"])
