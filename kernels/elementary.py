"""Elementary functions on float32 vectors, callable from kernels.

Straight-line code without tables: a range reduction, a polynomial and the way back, good to one
or two units in the last place over the whole range, with the limits of IEEE 754 at infinities,
NaN, signed zeros and denormals. Sources of the polynomials:

- exp, log, tanh: S. L. Moshier, Cephes mathematical library, single precision (expf.c, logf.c,
  tanhf.c).
- erf: N. Juffa's ``my_erff`` (two minimax polynomials, published at stackoverflow.com/q/35148198).
- sin, cos: FreeBSD msun (k_sinf.c, k_cosf.c, e_rem_pio2f.c), which reduces and evaluates in
  float64.
"""

from __future__ import annotations

from collections.abc import Sequence

from numba import types

from graphopt.kernels.register import Register, operation

_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # nine bits, so that its product with an exponent is exact
_LN2_LOW = -2.12194440e-4
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


def _polynomial(x: Register, coefficients: Sequence[float]) -> Register:
    """Horner's scheme; the coefficient of the highest power comes first."""
    result = x.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result.fma(x, coefficient)
    return result


def _power_of_two(exponent: Register) -> Register:
    """``2.0 ** exponent`` of int32 lanes in -126..127."""
    return ((exponent + 127) << 23).reinterpret(types.float32)


def _reduce_exp(x: Register) -> tuple[Register, Register]:
    """``n`` (int32) and ``exp(r) - 1`` with ``x = n * ln 2 + r``, ``|r| <= ln 2 / 2``."""
    shifted = x.fma(_LOG2_E, _ROUNDER)
    whole = shifted - _ROUNDER
    r = whole.fma(-_LN2_HIGH, x)
    r = whole.fma(-_LN2_LOW, r)
    tail = _polynomial(
        r,
        (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
         4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    )  # fmt: skip
    return shifted.reinterpret(types.int32) - _ROUNDER_BITS, tail.fma(r * r, r)


def _exp(x: Register) -> Register:
    """e to the power of each lane."""
    n, tail = _reduce_exp(x.maximum(-105.0).minimum(90.0))
    # Two factors, because 2**n alone leaves the range of float32 before the result does.
    half = n >> 1
    return (tail + 1.0) * _power_of_two(half) * _power_of_two(n - half)


def _expm1(x: Register) -> Register:
    """``exp(x) - 1`` without cancellation near zero."""
    n, tail = _reduce_exp(x.maximum(-30.0).minimum(89.0))
    # Half the result, because 2**128 is no float32.
    half = _power_of_two(n - 1)
    result = (half.fma(tail, half - 0.5) * 2.0).copysign(x)
    return (abs(x) < 1e-30).select(x, result)  # halves of denormals would be lost


def _log(x: Register) -> Register:
    """The natural logarithm; NaN below zero, -inf at zero."""
    tiny = x < 1.17549435e-38
    bits = tiny.select(x * 8388608.0, x).reinterpret(types.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).reinterpret(types.float32)
    power = exponent.convert(types.float32)
    power = tiny.select(power - 23.0, power)
    f = mantissa - 1.0
    square = f * f
    tail = _polynomial(
        f,
        (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
         -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )  # fmt: skip
    tail = (tail * f * square) + power * _LN2_LOW
    result = power * _LN2_HIGH + (f + square.fma(-0.5, tail))
    result = (x < float("inf")).select(result, x)  # inf and NaN are their own logarithms
    result = (x < 0.0).select(float("nan"), result)
    return x.equal(0.0).select(float("-inf"), result)


def _log1p(x: Register) -> Register:
    """``log(1 + x)`` without cancellation near zero."""
    total = x + 1.0
    lost = (x < 1.0).select(x - (total - 1.0), 1.0 - (total - x))
    finite = (total > 0.0) & (total < float("inf"))
    result = _log(total) + finite.select(lost / total, 0.0)
    return x.equal(0.0).select(x, result)


def _sigmoid(x: Register) -> Register:
    """``1 / (1 + exp(-x))``, accurate in both tails."""
    e = _exp(-abs(x))
    return (x < 0.0).select(e, 1.0) / (e + 1.0)


def _tanh(x: Register) -> Register:
    """The hyperbolic tangent."""
    magnitude = abs(x)
    square = x * x
    near = _polynomial(
        square,
        (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2,
         1.33314422036e-1, -3.33332819422e-1),
    )  # fmt: skip
    near = (near * square).fma(magnitude, magnitude)
    n, tail = _reduce_exp(magnitude.minimum(10.0) * 2.0)
    far = 1.0 - 2.0 / ((tail + 1.0) * _power_of_two(n) + 1.0)
    return (magnitude < 0.625).select(near, far).copysign(x)


def _erf(x: Register) -> Register:
    """The error function."""
    magnitude = abs(x)
    square = x * x
    near = _polynomial(
        square,
        (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1,
         1.28379166e-1),
    ).fma(magnitude, magnitude)  # fmt: skip
    t = magnitude.minimum(4.0)  # where the result has long been 1
    square = t * t
    high = t.constant(-1.72853470e-5).fma(t, 3.83197126e-4)
    low = t.constant(-3.88396438e-3).fma(t, 2.42546219e-2)
    far = high.fma(square, low)
    far = far.fma(t, -1.06777877e-1).fma(t, -6.34846687e-1).fma(t, -1.28717512e-1).fma(t, -t)
    n, tail = _reduce_exp(far)
    far = 1.0 - (tail + 1.0) * _power_of_two(n)
    return (magnitude > 0.927734375).select(far, near).copysign(x)


def _sin(x: Register) -> Register:
    """The sine of radians."""
    return _circular(x, quarter=0)


def _cos(x: Register) -> Register:
    """The cosine of radians."""
    return _circular(x, quarter=1)


def _circular(x: Register, quarter: int) -> Register:
    """The sine of ``x + quarter * pi / 2``."""
    wide = x.convert(types.float64)
    # Beyond this the number of quarter turns and the first part of pi / 2 no longer multiply
    # exactly; such arguments are rare enough for one call of the C library per lane.
    huge = abs(wide) >= 2.0**28
    block = x.builder.block
    fast = _circular_reduced(wide, quarter)
    with x.builder.if_then(huge.reduce(lambda a, b: a | b), likely=False):
        name = "llvm.cos" if quarter else "llvm.sin"
        exact = huge.select(wide.llvm(name), fast)
        slow_block = x.builder.block
    merged = x.builder.phi(fast.value.type)
    merged.add_incoming(fast.value, block)
    merged.add_incoming(exact.value, slow_block)
    return Register(x.builder, fast.type, merged).convert(types.float32)


def _circular_reduced(x: Register, quarter: int) -> Register:
    turns = (x * 6.36619772367581382433e-01).llvm("llvm.rint")
    r = turns.fma(-1.57079631090164184570, x)
    r = turns.fma(-1.58932547735281966916e-08, r)
    square = r * r
    sine = _polynomial(
        square,
        (2.7183114939898219064e-6, -1.98393348360966317347e-4, 8.3333293858894631756e-3,
         -0.166666666416265235595),
    )  # fmt: skip
    sine = (sine * square + 1.0) * r
    cosine = _polynomial(
        square,
        (2.43904487962774090654e-5, -1.38867637746099294692e-3, 4.16666233237390631894e-2,
         -0.499999997251031003120),
    )  # fmt: skip
    cosine = cosine * square + 1.0
    count = turns.convert(types.int64) + quarter
    result = (count & 1).equal(0).select(sine, cosine)
    result = (count & 2).equal(0).select(result, -result)
    return result if quarter else x.equal(0.0).select(x, result)  # keeps the sign of zero


exp = operation(_exp)
expm1 = operation(_expm1)
log = operation(_log)
log1p = operation(_log1p)
sigmoid = operation(_sigmoid)
tanh = operation(_tanh)
erf = operation(_erf)
sin = operation(_sin)
cos = operation(_cos)
