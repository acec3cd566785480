"""Functions of kernels, kernels that call others, and the stack that they start with."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.kernels.memory import int64_constant
from graphopt.kernels.register import LANES, MASK_REGISTERS
from graphopt.kernels.registry import WHOLE

inlined: Any = njit(error_model="numpy", nogil=True)
"""For functions that become part of the kernels that call them."""


@intrinsic
def align_stack(typing: Any) -> Any:
    """Let vectors that the registers have no room for begin where none crosses a cache line.

    The stack is aligned to 16 bytes, and vectors on it are read by instructions that could as well
    be arithmetic. With the many registers of AVX-512 little is kept there, and nothing done.
    """

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        if not MASK_REGISTERS:
            place = cgutils.alloca_once(builder, ir.IntType(64))
            place.align = 4 * LANES
            # An instruction that is none needs the place, so that it is not optimized away.
            kind = ir.FunctionType(ir.VoidType(), [place.type])
            builder.asm(kind, "", "r", [place], side_effect=True)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_kernel(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the kernel at ``address`` (of `source.shared`) with a tuple of integers."""
    kinds: Any = arguments  # whose class numba does not describe as the sequence that it is
    if not isinstance(arguments, types.BaseTuple):
        return None

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        word = ir.IntType(64)
        block = cgutils.alloca_once(builder, ir.ArrayType(word, len(kinds)))
        members = cgutils.unpack_tuple(builder, values[1], len(kinds))
        for place, (member, kind) in enumerate(zip(members, kinds, strict=True)):
            number = context.cast(builder, member, kind, types.int64)
            builder.store(number, cgutils.gep_inbounds(builder, block, 0, place))
        _call(builder, values[0], cgutils.gep_inbounds(builder, block, 0, 0), end=0)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@intrinsic
def call_step(typing: Any, address: Any, block: Any) -> Any:
    """Let the kernel at ``address`` do all its work with the arguments at ``block``."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> ir.Value:
        kernel, first = (
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(values, sig.args, strict=True)
        )
        _call(builder, kernel, builder.inttoptr(first, ir.IntType(64).as_pointer()), end=WHOLE)
        return context.get_dummy_value()

    return types.void(address, block), generate


def _call(builder: ir.IRBuilder, kernel: ir.Value, arguments: ir.Value, end: int) -> None:
    """Call the kernel at an address, as thread 0, with the share up to ``end``."""
    word = ir.IntType(64)
    function = ir.FunctionType(ir.VoidType(), [word.as_pointer(), word, word, word])
    share = [int64_constant(number) for number in (0, 0, end)]
    builder.call(builder.inttoptr(kernel, function.as_pointer()), [arguments, *share])
