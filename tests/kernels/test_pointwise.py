"""Fused pointwise kernels against torch, in float64 where they round."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import solve

from graphopt.kernels import pointwise
from graphopt.kernels.elementwise import RULES
from graphopt.kernels.emission import immediate, unsupported
from graphopt.kernels.expression import Builder, Expression, promote
from graphopt.kernels.operand import ITEM_BYTES, Layout, Operand
from graphopt.kernels.problem import PointwiseProblem
from graphopt.kernels.registry import candidates
from graphopt.kernels.simd import LANES

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, -1e-39, 1.17549435e-38]
SPECIAL += [0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 6.0, 1e30, -1e30, 3.4e38, 88.8, -88.8, -104.0]


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are divided among threads too."""
    monkeypatch.setattr(pointwise, "WORTH_SHARING", 0.0)


def sample(seed: int = 0, positive: bool = False) -> np.ndarray:
    """Values of many sizes and every special one, in a length that is no multiple of a vector."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-6, 1.5, 1500)
    values = np.concatenate([SPECIAL, generator.standard_normal(1500) * scales])
    return np.abs(values).astype(np.float32) if positive else values.astype(np.float32)


def single(op: str, dtypes: tuple[str, ...], rest: tuple, dtype: str) -> Expression:
    """One operator on inputs of ``dtypes``, then literals."""
    builder = Builder()
    inputs = [builder.input(kind) for kind in dtypes]
    return builder.finish(builder.apply(op, *inputs, *rest, dtype=dtype))


def several(
    cases: dict[str, tuple[str, tuple]], arrays: list[np.ndarray], dtype: str = ""
) -> dict[str, np.ndarray]:
    """The result of each case, (operator, literals after the inputs), all by one kernel."""
    builder = Builder()
    inputs = [builder.input(str(array.dtype)) for array in arrays]
    refs = [
        builder.apply(op, *inputs, *rest, dtype=dtype or str(arrays[0].dtype))
        for op, rest in cases.values()
    ]
    return dict(zip(cases, apply(builder.finish(*refs), *arrays), strict=True))


def apply(expression: Expression, *arrays: np.ndarray, threads: int = 1, **where: int) -> list:
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    problem = PointwiseProblem(
        expression,
        tuple(Operand.plain(str(array.dtype), array.shape) for array in arrays),
        tuple(Operand.plain(dtype, shape) for dtype in expression.result_dtypes),
    )
    return solve(problem, arrays, threads, **where)


SMOOTH = {
    "exp": (torch.exp, ()),
    "expm1": (torch.expm1, ()),
    "log": (torch.log, ()),
    "log1p": (torch.log1p, ()),
    "sigmoid": (torch.sigmoid, ()),
    "silu": (F.silu, ()),
    "tanh": (torch.tanh, ()),
    "erf": (torch.erf, ()),
    "sin": (torch.sin, ()),
    "cos": (torch.cos, ()),
    "sqrt": (torch.sqrt, ()),
    "rsqrt": (torch.rsqrt, ()),
    "reciprocal": (torch.reciprocal, ()),
    "square": (torch.square, ()),
    "hardsigmoid": (F.hardsigmoid, ()),
    "hardswish": (F.hardswish, ()),
    "log_sigmoid": (F.logsigmoid, ()),
    "mish": (F.mish, ()),
    "selu": (F.selu, ()),
    "elu": (F.elu, (0.7,)),
    "celu": (F.celu, (1.3,)),
    "softplus": (F.softplus, (2.0, 20.0)),
    "leaky_relu": (F.leaky_relu, (0.02,)),
}


def assert_accurate(
    result: np.ndarray, exact: np.ndarray, torch32: np.ndarray, ulps: float, floor: object = 0.0
) -> None:
    """Within ``ulps`` of float64's result; infinite or NaN only where that or torch's is."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float32)
        same = (result == rounded) | (result == torch32)
        same |= np.isnan(result) & (np.isnan(rounded) | np.isnan(torch32))
        error = np.abs(result.astype(np.float64) - exact)
        allowed = ulps * np.spacing(np.abs(rounded)).astype(np.float64) + floor
        good = same | (error <= allowed)
    assert good.all(), (result[~good], exact[~good], torch32[~good])


@pytest.fixture(scope="module")
def smooth() -> dict[str, np.ndarray]:
    return several({op: (op, rest) for op, (_, rest) in SMOOTH.items()}, [sample()])


@pytest.mark.parametrize("op", SMOOTH)
def test_smooth_operators_round_like_float64(op: str, smooth: dict[str, np.ndarray]) -> None:
    function, rest = SMOOTH[op]
    x, result = torch.tensor(sample()), smooth[op]
    exact = function(x.double(), *rest).numpy()
    torch32 = function(x, *rest).numpy()
    ulps = 6 if op in ("mish", "softplus") else 4
    # Of a product with a denormal, the other factor's size in the smallest float32.
    assert_accurate(result, exact, torch32, ulps, floor=1e-43)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    x = sample()
    (result,) = apply(single("gelu", ("float32",), (approximate,), "float32"), x)
    exact = F.gelu(torch.tensor(x).double(), approximate=approximate).numpy()
    torch32 = F.gelu(torch.tensor(x), approximate=approximate).numpy()
    # Below zero 1 + erf cancels, in torch as well: the error is relative to x there.
    floor = np.abs(x.astype(np.float64)) * 2.0**-23
    assert_accurate(result, exact, torch32, ulps=4, floor=floor)


EXACT = {
    "relu": (torch.relu, ()),
    "relu6": (F.relu6, ()),
    "neg": (torch.neg, ()),
    "abs": (torch.abs, ()),
    "floor": (torch.floor, ()),
    "ceil": (torch.ceil, ()),
    "trunc": (torch.trunc, ()),
    "round": (torch.round, ()),
    "sign": (torch.sign, ()),
    "hardtanh": (F.hardtanh, (-1.5, 2.0)),
    "clamp": (torch.clamp, (-0.5, None)),
    "clamp_min": (torch.clamp_min, (0.25,)),
    "clamp_max": (torch.clamp_max, (0.25,)),
    "threshold": (F.threshold, (0.1, 20.0)),
    "add": (torch.add, (1.25,)),
    "sub": (torch.sub, (1.25,)),
    "rsub": (torch.rsub, (1.25,)),
    "mul": (torch.mul, (0.3,)),
    "div": (torch.div, (3.0,)),
    "pow": (torch.pow, (2,)),
}


@pytest.fixture(scope="module")
def exact_results() -> dict[str, np.ndarray]:
    return several({op: (op, rest) for op, (_, rest) in EXACT.items()}, [sample()])


@pytest.mark.parametrize("op", EXACT)
def test_simple_operators_equal_torch(op: str, exact_results: dict[str, np.ndarray]) -> None:
    function, rest = EXACT[op]
    expected = function(torch.tensor(sample()), *rest).numpy()
    np.testing.assert_array_equal(exact_results[op], expected)


def test_powers() -> None:
    x = sample()
    exponents = [0, 1, 2, 3, 0.5, -0.5, -1, -2]
    results = several({str(power): ("pow", (power,)) for power in exponents}, [x])
    for exponent in exponents:
        exact = torch.pow(torch.tensor(x).double(), exponent).numpy()
        torch32 = torch.pow(torch.tensor(x), exponent).numpy()
        assert_accurate(results[str(exponent)], exact, torch32, ulps=3)


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "prelu": lambda x, y: torch.where(x > 0, x, x * y),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_operators_equal_torch_on_all_pairs_of_special_values(dtype: str) -> None:
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL))).astype(dtype)
    x, y = np.ascontiguousarray(pairs.T)
    results = several({op: (op, ()) for op in BINARY}, [x, y])
    for op, function in BINARY.items():
        expected = function(torch.tensor(x), torch.tensor(y)).numpy()
        np.testing.assert_array_equal(results[op], expected, op)


COMPARISONS = {
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}  # fmt: skip


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("int64", "float32"), ("int32", "int8"),
                                    ("bool", "bool"), ("uint8", "int8")])  # fmt: skip
def test_comparisons_equal_torch(dtypes: tuple[str, str]) -> None:
    pairs = np.array(list(itertools.product(range(-3, 4), range(-3, 4))))
    x, y = pairs[:, 0].astype(dtypes[0]), pairs[:, 1].astype(dtypes[1])
    results = several({op: (op, ()) for op in COMPARISONS}, [x, y], "bool")
    for op, function in COMPARISONS.items():
        expected = function(torch.tensor(x), torch.tensor(y)).numpy()
        np.testing.assert_array_equal(results[op], expected, op)


def test_comparisons_with_nan_and_a_number() -> None:
    x = sample()
    ops = ("eq", "ne", "lt", "le", "gt", "ge")
    results = several({op: (op, (0.5,)) for op in ops}, [x], "bool")
    for op in ops:
        expected = COMPARISONS[op](torch.tensor(x), 0.5).numpy()
        np.testing.assert_array_equal(results[op], expected, op)


def test_classification() -> None:
    x = sample()
    ops = ("isnan", "isinf", "isfinite", "logical_not")
    results = several({op: (op, ()) for op in ops}, [x], "bool")
    for op in ops:
        np.testing.assert_array_equal(results[op], getattr(torch, op)(torch.tensor(x)).numpy(), op)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_integers_wrap_like_torch(dtype: str) -> None:
    values = np.array(list(itertools.product([-128, -5, -1, 0, 1, 2, 77, 127], repeat=2)))
    x, y = (np.ascontiguousarray(column.astype(dtype)) for column in values.T)
    if dtype in ("int32", "int64"):
        x[:3] = np.iinfo(dtype).min, np.iinfo(dtype).max, np.iinfo(dtype).min + 1
    unary = ["bitwise_not"] if dtype == "bool" else ["bitwise_not", "neg", "abs", "relu", "sign"]
    binary = ["add", "mul", "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor"]
    binary += [] if dtype == "bool" else ["sub"]
    for ops, arrays in ((unary, [x]), (binary, [x, y])):
        results = several({op: (op, ()) for op in ops}, arrays)
        for op in ops:
            expected = getattr(torch, op)(*(torch.tensor(array) for array in arrays))
            np.testing.assert_array_equal(results[op], expected.numpy(), op)


@pytest.mark.parametrize("source", ITEM_BYTES)
def test_conversions(source: str) -> None:
    values = np.array([0, 1, 2, 3, 100, 1.75, -1.75, -100, 127] * 5)
    for x in (values, np.abs(values)):
        if source in ("uint8", "bool"):
            x = np.abs(x)
        x = x.astype(source)
        builder = Builder()
        value = builder.input(source)
        targets = [dtype for dtype in ITEM_BYTES if dtype != "uint8" or (x >= 0).all()]
        refs = [builder.apply("to", value, dtype=target) for target in targets]
        for target, result in zip(targets, apply(builder.finish(*refs), x), strict=True):
            expected = torch.tensor(x).to(getattr(torch, target)).numpy()
            np.testing.assert_array_equal(result, expected, target)


def test_conversion_of_what_no_integer_holds_is_defined() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9], np.float32)
    (result,) = apply(single("to", ("float32",), (), "int32"), x)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    np.testing.assert_array_equal(result, [0, high, low, high, low])


def test_selection_and_masks() -> None:
    x, y = sample(1), sample(2)
    mask = np.arange(x.size) % 3 == 0
    (chosen,) = apply(single("where", ("bool", "float32", "float32"), (), "float32"), mask, x, y)
    np.testing.assert_array_equal(chosen, np.where(mask, x, y))
    builder = Builder()
    value, where = builder.input("float32"), builder.input("bool")
    filled = builder.apply("masked_fill", value, where, -np.inf)
    (result,) = apply(builder.finish(filled), x, mask)
    np.testing.assert_array_equal(result, np.where(mask, np.float32(-np.inf), x))


@pytest.mark.parametrize("op", ["lerp", "addcmul", "addcdiv"])
def test_three_operands(op: str) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.uniform(0.1, 2, 100).astype(np.float32) for _ in range(3)]
    rest = () if op == "lerp" else (0.7,)
    (result,) = apply(single(op, ("float32",) * 3, rest, "float32"), *arrays)
    tensors = [torch.tensor(array).double() for array in arrays]
    keywords = {"value": rest[0]} if rest else {}
    exact = getattr(torch, op)(*tensors, **keywords).numpy()
    np.testing.assert_allclose(result, exact, rtol=4e-7)


def test_alpha_and_truncated_division() -> None:
    x, y = sample(3), sample(4)
    (result,) = apply(single("sub", ("float32", "float32"), (2.5,), "float32"), x, y)
    with np.errstate(invalid="ignore"):
        exact = x.astype(np.float64) - 2.5 * y.astype(np.float64)
    finite = np.abs(exact) < 3e38
    np.testing.assert_allclose(result[finite], exact[finite], rtol=1e-6, atol=1e-44)
    (result,) = apply(single("div", ("float32", "float32"), ("trunc",), "float32"), x, y)
    expected = torch.div(torch.tensor(x), torch.tensor(y), rounding_mode="trunc")
    np.testing.assert_array_equal(result, expected.numpy())


SHAPES = [
    ((), ()),
    ((0,), (0,)),
    ((3, 0, 2), (2,)),
    ((1,), (1,)),
    ((LANES - 1,), (1,)),
    ((LANES,), (LANES,)),
    ((LANES + 1,), ()),
    ((7, 3), (3,)),
    ((7, 3), (7, 1)),
    ((2, 3, 5, 7), (3, 1, 1)),
    ((2, 3, 5, 7), (2, 1, 5, 1)),
    ((2, 3, 5, 2 * LANES + 3), (1, 3, 1, 2 * LANES + 3)),
    ((2, 1, 3, 1, 5, 2), (3, 1, 5, 1)),
    ((1, 4097), (4097,)),
    ((40, 400), (40, 1)),
]


@pytest.mark.parametrize(("shape", "other"), SHAPES)
def test_broadcasting_between_guard_pages(shape: tuple, other: tuple) -> None:
    builder = Builder()
    x, y, z = builder.input(), builder.input("int64"), builder.input("bool")
    total = builder.apply("add", builder.apply("mul", x, y), 0.5)
    expression = builder.finish(total, builder.apply("logical_or", z, y, dtype="bool"))
    generator = np.random.default_rng(0)
    arrays = [
        np.asarray(generator.standard_normal(shape), np.float32),
        np.asarray(generator.integers(-9, 9, other)),
        np.asarray(generator.integers(0, 2, shape), bool),
    ]
    for threads, at_end, offset in [(1, True, 0), (2, True, 8), (3, False, 0), (2, False, 24)]:
        total32, either = apply(expression, *arrays, threads=threads, at_end=at_end, offset=offset)
        product = arrays[0] * arrays[1].astype(np.float32) + np.float32(0.5)
        np.testing.assert_array_equal(total32, product)
        np.testing.assert_array_equal(either, arrays[2] | (arrays[1] != 0))


def test_permuted_and_pitched_layouts() -> None:
    """Operands that are strided along the innermost loop are gathered and scattered."""
    shape = (5, LANES + 3, 7)
    expression = single("mul", ("float32", "float32"), (), "float32")
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
    layouts = [
        Layout("float32", (0, 1, 2)),
        Layout("float32", (2, 0, 1)),
        Layout("float32", (0, 1, 2), pitch=16),
        Layout("float32", (0, 2, 1), pitch=32),
    ]
    cases = [(0, 1, 0), (1, 0, 2), (0, 0, 1), (1, 1, 1), (2, 3, 0), (3, 2, 3), (2, 1, 2)]
    for left, right, out in ([layouts[index] for index in case] for case in cases):
        operands = Operand(shape, left), Operand(shape, right)
        problem = PointwiseProblem(expression, operands, (Operand(shape, out),))
        (result,) = solve(problem, [x, y], threads=2)
        np.testing.assert_array_equal(result, x * y)


def test_a_chain_with_reused_values_and_several_results() -> None:
    builder = Builder()
    x, bias, scale = builder.input(), builder.input(), builder.input()
    shifted = builder.apply("add", x, bias)
    gate = builder.apply("sigmoid", shifted)
    swished = builder.apply("mul", shifted, gate)
    scaled = builder.apply("clamp", builder.apply("mul", swished, scale), -3, 3)
    positive = builder.apply("gt", scaled, 0, dtype="bool")
    kept = builder.apply("where", positive, scaled, 0.0)
    expression = builder.finish(kept, gate, positive, x)
    generator = np.random.default_rng(0)
    arrays = [
        generator.standard_normal(shape).astype(np.float32)
        for shape in [(3, 11, 29), (11, 1), (1, 1, 29)]
    ]
    results = apply(expression, *arrays, threads=2)
    x64, bias64, scale64 = (torch.tensor(array).double() for array in arrays)
    scaled64 = (F.silu(x64 + bias64) * scale64).clamp(-3, 3)
    np.testing.assert_allclose(results[0], scaled64.clamp_min(0).numpy(), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(results[1], torch.sigmoid(x64 + bias64).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(results[2], results[0] > 0)
    np.testing.assert_array_equal(results[3], arrays[0])


def test_numbers_are_arguments_of_one_kernel() -> None:
    def entry(number: float) -> object:
        expression = single("mul", ("float32",), (number,), "float32")
        operand = Operand.plain("float32", (100,))
        return candidates(PointwiseProblem(expression, (operand,), (operand,)))[0].build(1)[0].entry

    assert entry(2.0) == entry(-0.0)


def test_filling() -> None:
    builder = Builder()
    builder.input()
    (result,) = apply(builder.finish(builder.apply("fill", -0.0)), sample())
    assert (np.signbit(result) & (result == 0)).all()


def test_what_cannot_be_exact_is_declined() -> None:
    operand = Operand.plain("float32", (4,))
    for op, rest in [("pow", (2.7,)), ("div", (2.0, "floor")), ("round", (2,)), ("lgamma", ()),
                     ("clamp_min", (np.nan,))]:  # fmt: skip
        expression = single(op, ("float32",), rest, "float32")
        assert op in str(unsupported(expression))
        assert candidates(PointwiseProblem(expression, (operand,), (operand,))) == []
    assert "float16" in str(unsupported(single("relu", ("float16",), (), "float16")))
    assert "not in int64" in str(unsupported(single("exp", ("int64",), (), "int64")))


def test_malformed_problems_are_refused() -> None:
    operand, wide = Operand.plain("float32", (4,)), Operand.plain("float64", (4,))
    expression = single("relu", ("float32",), (), "float32")
    with pytest.raises(ValueError, match="inputs' dtypes"):
        candidates(PointwiseProblem(expression, (wide,), (operand,)))
    with pytest.raises(ValueError, match="outputs' dtypes"):
        candidates(PointwiseProblem(expression, (operand,), (wide,)))
    with pytest.raises(ValueError, match="does not broadcast"):
        candidates(PointwiseProblem(expression, (Operand.plain("float32", (3,)),), (operand,)))


@pytest.mark.parametrize("a", ITEM_BYTES)
@pytest.mark.parametrize("b", ITEM_BYTES)
def test_promotion_is_torchs(a: str, b: str) -> None:
    expected = torch.promote_types(getattr(torch, a), getattr(torch, b))
    assert promote([a, b]) == str(expected).removeprefix("torch.")
    for literal in (True, 3, 0.5):
        result = torch.result_type(torch.ones(2, dtype=getattr(torch, a)), literal)
        assert promote([a], [literal]) == str(result).removeprefix("torch.")


def test_immediates_are_the_bits_of_their_dtype() -> None:
    assert immediate(1.0, "float32") == 0x3F800000
    assert immediate(-1.0, "float64") == np.float64(-1).view(np.int64)
    assert immediate(1e300, "float32") == np.float32(np.inf).view(np.int32)
    assert immediate(2**64 - 1, "int64") == -1


def test_every_rule_is_tested() -> None:
    tested = {*SMOOTH, *EXACT, *BINARY, *COMPARISONS, "gelu", "pow", "isnan", "isinf", "isfinite",
              "logical_not", "to", "where", "masked_fill", "lerp", "addcmul", "addcdiv",
              "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "fill"}  # fmt: skip
    texts = {RULES[name].text for name in tested}
    assert [name for name, rule in RULES.items() if rule.text not in texts] == []
