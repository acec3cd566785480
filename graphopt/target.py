"""What passes may know of the machine that the result will run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graphopt.errors import PassError
from graphopt.ir import Graph


def _no_timer(fragment: Graph) -> float:
    raise PassError(
        "this target cannot measure time: graphopt.optimize gives passes one that can; where a "
        "pipeline runs on its own, give it Context(target=Target(time=...))"
    )


def _default_threads() -> int:
    from graphopt.engine.threads import default_threads

    return default_threads()


def _vector_bytes() -> int:
    from graphopt.kernels.register import LANES

    return 4 * LANES


@dataclass(frozen=True)
class Target:
    """The machine, as far as passes may ask.

    Attributes:
        time: seconds that a fragment takes on this machine, measured with kernels chosen for its
            shapes and zero pattern. Raises PassError where the pipeline was given no such
            function.
        threads: how many threads one call may use.
        vector_bytes: size of a vector register.
    """

    time: Callable[[Graph], float] = field(default=_no_timer, repr=False)
    threads: int = field(default_factory=_default_threads)
    vector_bytes: int = field(default_factory=_vector_bytes)

    def require_timer(self) -> None:
        """For passes that will measure time after much work.

        Raises:
            PassError: this target cannot measure time.
        """
        if self.time is _no_timer:
            _no_timer(Graph())
