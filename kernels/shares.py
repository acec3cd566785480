"""Shares of panels that take unequally long.

Threads get shares of all work by its estimated time. A share may begin or end within a panel, which
then is copied once more: not where that takes as long as what it would balance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from graphopt.kernels import memory
from graphopt.kernels.calls import inlined
from graphopt.kernels.register import INT64
from graphopt.kernels.registry import WHOLE, Table

# A type checker sees the first parameter of an intrinsic, which its callers do not give.
read: Any = memory.read


def share_lines(panels: str) -> list[str]:
    """Lines that give this thread its share, ``task`` to ``stop``, of all panels' tasks.

    There are as many panels as the argument of that name says, each of ``parts`` tasks, in each of
    ``places``; ``shares`` is the address of `panel_shares`.
    """
    return [
        f"{task} = first_task({share}, {WHOLE}, shares, places, {panels}, parts)"
        for task, share in (("task", "begin"), ("stop", "end"))
    ]


def panel_shares(cycles: Iterable[tuple[float, float]]) -> Table:
    """From where to where, of `WHOLE`, the tasks of each panel are.

    Args:
        cycles: what each panel costs every thread that works on it, and all its tasks together.
    """
    both = np.array(list(cycles))
    ends = np.cumsum(both.sum(axis=1))
    tasks = np.stack([ends - both[:, 1], ends], axis=1) - both[:, :1] / 2
    shares = (tasks * (WHOLE / ends[-1])).astype(np.int64)
    return Table(tuple(shares.reshape(-1).tolist()))


@inlined
def first_task(share: int, whole: int, shares: int, places: int, panels: int, parts: int) -> int:
    """The task at which a share begins: number 0 for 0, the number of tasks for the whole.

    A thread's share ends where that of the next begins.
    """
    place = share * places // whole
    rest = share * places - place * whole
    if rest == 0:
        return place * panels * parts  # though the first panels may end here, so short are they
    # The first panel that has a task behind.
    panel, beyond = 0, panels
    while panel < beyond:
        middle = (panel + beyond) // 2
        if read(shares + 16 * middle + 8, INT64) > rest:
            beyond = middle
        else:
            panel = middle + 1
    task = (place * panels + panel) * parts
    if panel < panels:
        first = read(shares + 16 * panel, INT64)
        size = read(shares + 16 * panel + 8, INT64) - first
        task += (max(rest - first, 0) * parts + size // 2) // max(size, 1)
    return task
