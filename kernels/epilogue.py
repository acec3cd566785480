"""What is done to the results of a convolution or matrix product before they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.kernels.emission import emit, unsupported
from graphopt.kernels.expression import Expression
from graphopt.kernels.loops import broadcast_strides, indent
from graphopt.kernels.operand import ITEM_BYTES, Operand
from graphopt.kernels.simd import LANES


@dataclass(frozen=True)
class ExtraOperand:
    """An operand of an epilogue beside the product itself.

    ``along`` says whether it varies along a tile's columns, where it is contiguous.
    """

    dtype: str
    along: bool

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]


def epilogue_supported(expression: Expression, extras: Sequence[Operand]) -> bool:
    """Whether a float32 product can be finished by ``expression`` exactly.

    Raises ValueError where the further inputs are not those of the expression.
    """
    if expression.inputs != ("float32", *(extra.dtype for extra in extras)):
        raise ValueError("the operands' dtypes are not those of the epilogue")
    return expression.result_dtypes == ("float32",) and unsupported(expression) is None


def image_strides(extra: Operand, y: Operand) -> tuple[int, int, int] | None:
    """Strides by (image, channel, pixel) of an epilogue's operand; None if there are no such.

    An operand of one dimension has an element per channel, others broadcast to ``y``.
    """
    if len(extra.shape) == 1:
        return (0, 1, 0)
    image, channel, *spatial = broadcast_strides(extra.shape, extra.strides, y.shape)
    varied = [axis for axis, size in enumerate(y.shape[2:]) if size != 1]
    if all(spatial[axis] == 0 for axis in varied):
        return (image, channel, 0)
    if all(spatial[axis] == y.strides[2 + axis] for axis in varied):
        return (image, channel, 1)
    return None


class Epilogue:
    """Kernel text that applies an expression to finished products.

    The expression's first input is the product, the others are ``extras``. For extra i, the text
    expects the address ``e{i}`` of what belongs to a tile's first element, and ``e{i}_row``, the
    bytes from row to row. `functions` are to be defined beside the kernel.
    """

    def __init__(
        self, expression: Expression | None, extras: Sequence[ExtraOperand], argument: int
    ) -> None:
        self.expression = expression
        self.extras = extras
        names = ["product", *(f"v{index}" for index in range(len(extras)))]
        self.emission = emit(expression, names, argument, "step") if expression else None

    @property
    def immediates(self) -> tuple[int, ...]:
        """Values for the argument block, from the place given on."""
        return self.emission.immediates if self.emission else ()

    def functions(self) -> list[str]:
        """Lines that define ``finish``, a function of the product and what else there is."""
        body, result = [], "product"
        if self.emission is not None:
            body, result = list(self.emission.body), self.emission.results[0]
        return [
            "@inlined",
            f"def {self._finished('product')}:",
            *indent(1, [*body, f"return {result}"]),
        ]

    def prologue(self) -> list[str]:
        """Lines before all loops."""
        return list(self.emission.prologue) if self.emission else []

    def lines(self) -> list[str]:
        """Lines that finish a tile in memory, at ``c``, of ``rows`` and ``columns``, whose rows are
        ``c_row`` bytes apart."""
        if self.emission is None:
            return ["pass"]
        return [
            "q = c",
            *(f"f{index} = e{index}" for index in range(len(self.extras))),
            "line = 0",
            "while line < rows:",
            *indent(1, self._constants("f")),
            "    i = 0",
            "    while i + LANES <= columns:",
            *indent(2, self._vector(masked=False)),
            "        i += LANES",
            "    if i < columns:",
            "        mask = mask_first(columns - i, FLOAT32)",
            *indent(2, self._vector(masked=True)),
            "    line += 1",
            "    q += c_row",
            *(f"    f{index} += e{index}_row" for index in range(len(self.extras))),
        ]

    def row_lines(self) -> list[str]:
        """Lines that read what is the same for a row of the tile, from the addresses ``e{i}``."""
        return self._constants("e")

    def register_lines(self, product: str, vector: int, mask: str = "") -> list[str]:
        """Lines that finish a vector of a row, which ``product`` holds, and store it at ``c``.

        They follow `row_lines`; ``mask`` is that of the columns that exist, if some may not.
        """
        masked = ", mask" if mask else ""
        load, store = ("load_masked", "store_first") if mask else ("load", "store")
        lines = [f"mask = {mask}"] if mask else []
        for index in self._along:
            extra = self.extras[index]
            address = f"e{index} + {vector * LANES * extra.width}"
            lines.append(f"v{index} = {load}({address}, {extra.dtype.upper()}{masked})")
        address = f"c + {4 * vector * LANES}"
        return [*lines, f"{store}({address}, {self._finished(product)}{masked})"]

    def tile_line(
        self, tile: str, width: int, whole: int, columns: str = "columns", below: str = ""
    ) -> str:
        """The line that finishes and stores a tile, see `finish_tile`.

        If rows of the tile lie below one another in one row of the weight, ``below`` is how many
        elements each is from the next, and the line follows `row_lines`.
        """
        c_row = f"4 * {below}" if below else "c_row"

        def operands(some: Sequence[int]) -> str:
            triples = []
            for index in some:
                extra = self.extras[index]
                row = f"{extra.width} * {below}" if below else f"e{index}_row"
                triples.append(f"(e{index}, {row}, {extra.dtype.upper()})")
            return _tuple(triples)

        alone, numbers = self._alone, list(self._literals)
        if below:
            alone, numbers = [], [*(f"v{index}" for index in alone), *numbers]
        return (
            f"finish_tile(finish, {tile}, c, {c_row}, rows, {columns}, {operands(self._along)},"
            f" {operands(alone)}, {_tuple(numbers)}, {width}, {whole})"
        )

    @property
    def _along(self) -> list[int]:
        """Extras that vary along a row."""
        return [index for index, extra in enumerate(self.extras) if extra.along]

    @property
    def _alone(self) -> list[int]:
        """Extras that do not."""
        return [index for index, extra in enumerate(self.extras) if not extra.along]

    @property
    def _literals(self) -> tuple[str, ...]:
        """The variables that `prologue` reads."""
        return self.emission.literals if self.emission else ()

    def _finished(self, product: str) -> str:
        """A call of ``finish``."""
        extras = [f"v{index}" for index in (*self._along, *self._alone)]
        return f"finish({', '.join((product, *extras, *self._literals))})"

    def _constants(self, pointer: str) -> list[str]:
        return [
            f"v{index} = broadcast(read({pointer}{index}, {self.extras[index].dtype.upper()}),"
            f" {self.extras[index].dtype.upper()})"
            for index in self._alone
        ]

    def _vector(self, masked: bool) -> list[str]:
        operands = [("product", "q", "float32")]
        operands += [(f"v{index}", f"f{index}", self.extras[index].dtype) for index in self._along]
        load = "{} = load_masked({} + {} * i, {}, mask)" if masked else "{} = load({} + {} * i, {})"
        lines = [
            load.format(name, start, ITEM_BYTES[dtype], dtype.upper())
            for name, start, dtype in operands
        ]
        store, more = ("store_first", ", mask") if masked else ("store", "")
        return [*lines, f"{store}(q + 4 * i, {self._finished('product')}{more})"]


def _tuple(members: Sequence[str]) -> str:
    return f"({', '.join(members)}{',' if len(members) == 1 else ''})"
