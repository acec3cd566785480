"""How rows of an image lie that `panel.pad_rows` copied: with zeros around them, and columns that
are a stride apart side by side, so that what lies under a position of a kernel is a plain vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.kernels.register import LANES


@dataclass(frozen=True)
class PaddedRows:
    """Rows that are read for ``columns`` columns of outputs; the rest is by (vertical, horizontal).

    Where whole vectors are read, they count as columns.
    """

    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def phase_pitch(self) -> int:
        """Bytes of the columns of a row that have one remainder modulo the stride."""
        reach = (self.kernel[1] - 1) * self.dilation[1] // self.stride[1]
        return 4 * LANES * math.ceil((self.columns + reach) / LANES)

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.stride[1] * self.phase_pitch

    def needed(self, rows: int) -> int:
        """Rows of the image that ``rows`` output rows need."""
        return (rows - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def place(self, column: int) -> tuple[int, int]:
        """Where, in a row, what lies under a column of the kernel begins: behind how many phases,
        and how many bytes further."""
        place, phase = divmod(column * self.dilation[1], self.stride[1])
        return phase, 4 * place

    def tap(self, row: int, column: int) -> int:
        """Bytes from what lies under the kernel's first position to what lies under another."""
        phase, more = self.place(column)
        return row * self.dilation[0] * self.pitch + phase * self.phase_pitch + more
