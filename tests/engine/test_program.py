"""Programs of small kernels, call-backs and aliases against torch."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kernels import add, affine, late_increment, minus_maximum, rotate, shares
from torch import Tensor

from graphopt.engine import plan as planner
from graphopt.engine.builder import ProgramBuilder
from graphopt.engine.program import Program
from graphopt.errors import GraphError, TraceError
from graphopt.kernels.registry import Step

FLOAT = torch.float32

FUNCTIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.sub,
    lambda x, y: x,
    lambda x, y: x.flip(0),
    lambda x, y: torch.stack([x, y], 1)[:, 1],
    lambda x, y: x.view(1, -1)[0],
]


class RandomProgram:
    """A program of random operations on vectors, and the values that torch gives for it."""

    def __init__(self, data: st.DataObject, threads: int) -> None:
        self.data, self.threads = data, threads
        self.count = data.draw(st.sampled_from([0, 1, 2, 7, 16, 61, 256]))
        self.builder = ProgramBuilder()
        self.keys: list[str] = []
        self.values: list[Tensor] = []
        self.inputs = [self.random() for _ in range(data.draw(st.integers(1, 3)))]
        for tensor in self.inputs:
            self.builder.add_input(self.name(tensor), tensor.shape, FLOAT)
        constant = self.random()
        self.builder.add_constant(self.name(constant), constant)

    def random(self) -> Tensor:
        return torch.randint(-4, 5, (self.count,)).float()

    def name(self, value: Tensor) -> str:
        self.keys.append(f"v{len(self.keys)}")
        self.values.append(value)
        return self.keys[-1]

    def buffer(self, value: Tensor) -> str:
        key = self.name(value)
        self.builder.add_buffer(key, value.shape, FLOAT)
        return key

    def kernel(
        self, steps: Sequence[Step], inputs: Sequence[str], output: str, scratch: int = 0
    ) -> None:
        self.builder.add_kernel(
            steps, inputs, [output], scratch_bytes=scratch, label="kernel", estimate=1.0
        )

    def grow(self) -> None:
        """Add one operation on two random values."""
        n, choose = self.count, self.data.draw
        i, j = (choose(st.integers(0, len(self.keys) - 1)) for _ in range(2))
        a, b, x, y = self.keys[i], self.keys[j], self.values[i], self.values[j]
        match choose(st.sampled_from(["affine", "add", "rotate", "maximum", "torch", "parts"])):
            case "affine":
                self.kernel(affine(n, 0.5, 2.0, choose(st.booleans())), [a], self.buffer(x / 2 + 2))
            case "add":
                self.kernel(add(n), [a, b], self.buffer(x + y))
            case "rotate":
                steps = rotate(n, choose(st.integers(0, 9)), choose(st.booleans()))
                shift = steps[0].arguments[-1]
                self.kernel(steps, [a], self.buffer(torch.roll(x, -int(str(shift))) + 1))
            case "maximum":
                steps, scratch = minus_maximum(n, self.threads)
                value = x - x.max() if n else x
                self.kernel(steps, [a], self.buffer(value), scratch)
            case "torch":
                function = choose(st.sampled_from(FUNCTIONS))
                output = self.buffer(function(x, y).clone())
                self.builder.add_call_back(function, [a, b], [output], label="torch")
            case "parts":
                self.concatenate(a, b, x, y)

    def concatenate(self, a: str, b: str, x: Tensor, y: Tensor) -> None:
        """A buffer whose halves are written in place, one by a kernel and one by torch."""
        n, whole = self.count, f"whole {len(self.keys)}"
        self.builder.add_buffer(whole, (2, n), FLOAT)
        left, right = self.name(x + 1), self.name(y + y)
        self.builder.add_alias(left, whole, (n,), FLOAT)
        self.builder.add_alias(right, whole, (n,), FLOAT, offset=4 * n)
        self.kernel(affine(n), [a], left)
        self.builder.add_call_back(torch.add, [b, b], [right], label="right")
        folded = self.buffer((x + 1) - (y + y))
        self.builder.add_call_back(lambda w: w[0] - w[1], [whole], [folded], label="fold")

    def finish(self) -> tuple[Program, list[Tensor]]:
        wanted = []
        for _ in range(self.data.draw(st.integers(1, 5))):
            index = self.data.draw(st.integers(0, len(self.keys) - 1))
            key, value = self.keys[index], self.values[index]
            if self.data.draw(st.booleans()):
                self.builder.add_alias(f"out {len(wanted)}", key, (1, self.count, 1), FLOAT)
                key, value = f"out {len(wanted)}", value.view(1, -1, 1)
            self.builder.add_output(key)
            wanted.append(value)
        return self.builder.build(self.threads), wanted


@given(st.data(), st.integers(1, 3))
@settings(max_examples=150)
def test_random_programs(data: st.DataObject, threads: int) -> None:
    random = RandomProgram(data, threads)
    for _ in range(data.draw(st.integers(0, 10))):
        random.grow()
    program, wanted = random.finish()
    before = [tensor.clone() for tensor in random.inputs]
    for _ in range(2):
        results = program(*random.inputs)
        assert all(torch.equal(x, y) for x, y in zip(results, wanted, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(random.inputs, before, strict=True))
        # Outputs own their memory: nothing written to one is seen anywhere else.
        for index, result in enumerate(results):
            result.fill_(index)
        for index, result in enumerate(results):
            assert torch.equal(result, torch.full_like(result, index))
    assert program.arena_bytes >= program.arena_lower_bound
    profile = program.profile(random.inputs, repeats=1)
    assert all(seconds >= 0 for _, seconds in profile)
    assert {label for label, _ in profile} <= {"kernel", "torch", "right", "fold"}


def chain(count: int, length: int, threads: int, alone_below: float = 0.0) -> Program:
    """Rotations, each of which reads what other threads have just written."""
    builder = ProgramBuilder()
    builder.add_input(0, (count,), FLOAT)
    for i in range(length):
        builder.add_buffer(i + 1, (count,), FLOAT)
        steps = rotate(count, i, parallel=i % 5 != 3)
        builder.add_kernel(steps, [i], [i + 1], label=f"rotate {i}", estimate=1.0)
    builder.add_output(length)
    return builder.build(threads, alone_below=alone_below)


def chain_reference(x: Tensor, length: int) -> Tensor:
    return torch.roll(x, -sum(range(length))) + length


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_threads_agree(threads: int, count: int) -> None:
    program = chain(count, 40, threads)
    for _ in range(20):
        x = torch.randint(-9, 9, (count,)).float()
        assert torch.equal(program(x)[0], chain_reference(x, 40))


def test_a_step_waits_for_all_threads() -> None:
    """The other thread's half is written a millisecond late, and read by the first at once."""
    count = 64
    builder = ProgramBuilder()
    builder.add_input("x", (count,), FLOAT)
    for key, size in (("late", count), ("y", count), ("shares", 2)):
        builder.add_buffer(key, (size,), FLOAT)
    late = late_increment(count, 300_000)
    builder.add_kernel(late, ["x"], ["late"], label="late", estimate=1.0)
    builder.add_kernel(rotate(count, count // 2), ["late"], ["y"], label="rotate", estimate=1.0)
    builder.add_kernel(shares(), ["x"], ["shares"], label="shares", estimate=1.0)
    builder.add_output("y")
    builder.add_output("shares")
    program = builder.build(2)
    together, deadline = 0, time.monotonic() + 30
    while together < 20:
        x = torch.arange(count) + torch.randint(10**6, (1,)).float()
        y, seen = program(x)
        assert torch.equal(y, torch.roll(x, -(count // 2)) + 2)
        together += float(seen[0]) < 1
        assert time.monotonic() < deadline


def shares_seen(alone_below: float) -> Iterator[float]:
    """Calls a program that tells the caller's share of the work, again and again."""
    builder = ProgramBuilder()
    builder.add_input("x", (2,), FLOAT)
    builder.add_buffer("y", (2,), FLOAT)
    builder.add_kernel(shares(), ["x"], ["y"], label="shares", estimate=1.0)
    builder.add_output("y")
    program = builder.build(2, alone_below=alone_below)
    while True:
        yield float(program(torch.zeros(2))[0][0])


def test_small_programs_run_alone() -> None:
    assert set(islice(shares_seen(alone_below=1.5), 200)) == {1}


def test_team_takes_part() -> None:
    """Workers that are slow to come are not waited for, but come they must."""
    deadline = time.monotonic() + 30
    assert any(share < 1 or time.monotonic() > deadline for share in shares_seen(0.5))
    assert time.monotonic() < deadline


def test_returned_parts_of_a_buffer_outlive_later_steps() -> None:
    builder = double((1000,))
    builder.add_alias("part", "y", (10,), FLOAT, offset=400)
    keys = ["y", *(f"later {i}" for i in range(4))]
    for source, target in pairwise(keys):
        builder.add_buffer(target, (1000,), FLOAT)
        builder.add_kernel(affine(1000), [source], [target], label="later", estimate=1.0)
    builder.add_output("part")
    builder.add_output(keys[-1])
    x = torch.arange(1000.0)
    part, last = builder.build(1)(x)
    assert torch.equal(part, 2 * x[100:110])
    assert torch.equal(last, 2 * x + 4)


def sums(*, kept: str = "", twice: bool = False, overwrites: tuple[int, ...] = (1,)) -> Program:
    """a = 2 x, b = x + 1, c = a + b, d = a + c, e = 2 d; ``kept`` is a result beside e."""
    count = 1000
    builder = double((count,))
    for key in "bcde":
        builder.add_buffer(key, (count,), FLOAT)
    builder.add_kernel(affine(count), ["x"], ["b"], label="b", estimate=1.0)
    pairs = (("y", "b", "c"), ("c" if twice else "y", "c", "d"))
    for left, right, target in pairs:
        builder.add_kernel(
            add(count), [left, right], [target], label=target, estimate=1.0, overwrites=overwrites
        )
    builder.add_kernel(affine(count, 2.0, 0.0), ["d"], ["e"], label="e", estimate=1.0)
    for key in ("e", *kept):
        builder.add_output(key)
    return builder.build(2)


def test_outputs_take_the_place_of_inputs() -> None:
    x = torch.arange(1000.0)
    apart, together = sums(overwrites=()), sums()
    assert apart.arena_lower_bound == 3 * 4096
    assert together.arena_lower_bound == together.arena_bytes == 2 * 4096
    for program in (apart, together, sums(overwrites=(0, 1))):
        assert torch.equal(program(x)[0], 2 * (2 * x + 3 * x + 1))


def test_what_is_needed_afterwards_is_not_overwritten() -> None:
    x = torch.arange(1000.0)
    b, c = x + 1, 3 * x + 1
    e, kept = sums(kept="b")(x)
    assert torch.equal(e, 2 * (2 * x + c))
    assert torch.equal(kept, b)
    e, kept = sums(kept="c")(x)
    assert torch.equal(e, 2 * (2 * x + c))
    assert torch.equal(kept, c)
    # y is read again for d, and c is both operands of d.
    assert sums(overwrites=(0,)).arena_bytes == 3 * 4096
    assert torch.equal(sums(overwrites=(0,))(x)[0], 2 * (2 * x + c))
    assert torch.equal(sums(twice=True)(x)[0], 4 * c)


def double(shape: tuple[int, ...] = (6,)) -> ProgramBuilder:
    """y = 2 x."""
    builder = ProgramBuilder()
    builder.add_input("x", shape, FLOAT)
    builder.add_buffer("y", shape, FLOAT)
    count = int(np.prod(shape))
    builder.add_kernel(affine(count, 2.0, 0.0), ["x"], ["y"], label="double", estimate=1.0)
    return builder


def through_torch(
    function: Callable[..., object], outputs: Sequence[str | None] = ("z",)
) -> Program:
    """z = function(2 x) + 1, through the arena."""
    builder = double()
    builder.add_buffer("z", (6,), FLOAT)
    builder.add_buffer("w", (6,), FLOAT)
    builder.add_call_back(function, ["y"], outputs, label="aten.strange")
    builder.add_kernel(affine(6), ["z"], ["w"], label="after", estimate=1.0)
    builder.add_output("w")
    return builder.build(2)


@pytest.fixture
def doubler() -> Program:
    builder = double()
    builder.add_output("y")
    return builder.build(1)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0)[::2],
        torch.arange(7.0)[1:],
        torch.arange(6.0).requires_grad_(),
        torch.nn.Parameter(torch.arange(6.0)),
        torch.frombuffer(bytearray(range(25)), dtype=FLOAT, offset=1, count=6),
        torch.arange(6.0).to(torch.complex64).mul(1j).conj().imag,
        torch.tensor(3.0).expand(6),
    ],
)
def test_any_strides(doubler: Program, x: Tensor) -> None:
    (y,) = doubler(x)
    assert torch.equal(y, 2 * x.detach())
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 input"),
        ((torch.ones(6), torch.ones(6)), "takes 1 input"),
        ((torch.ones(7),), r"float32\[7\].*float32\[6\]"),
        ((torch.ones(6, dtype=torch.float64),), r"float64\[6\]"),
        (([1.0] * 6,), "must be a tensor, got list"),
        ((torch.ones(6, device="meta"),), "on meta"),
        ((torch.ones(6).to_sparse(),), "torch.sparse_coo"),
    ],
)
def test_wrong_inputs_are_refused(doubler: Program, inputs: tuple, message: str) -> None:
    for program in (doubler, through_torch(torch.neg)):
        with pytest.raises(TraceError, match=message):
            program(*inputs)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    builder = double(shape)
    builder.add_output("y")
    x = torch.ones(shape)
    assert torch.equal(builder.build(2)(x)[0], 2 * x)


def test_outputs_are_the_callers() -> None:
    builder = double()
    builder.add_constant("c", np.arange(3, dtype=np.int64))
    for key in ("y", "x", "c", "y", "x"):
        builder.add_output(key)
    program = builder.build(2)
    x = torch.arange(6.0)
    first = program(x)
    kept = [tensor.clone() for tensor in first]
    second = program(x + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert torch.equal(second[0], 2 * (x + 1))
    pointers = {t.data_ptr() for t in (*first, *second, x)}
    assert len(pointers) == 11


def test_call_back_results_are_not_copied() -> None:
    made: list[int] = []

    def function(x: Tensor) -> Tensor:
        made.append((result := x + 1).data_ptr())
        return result

    builder = double()
    builder.add_buffer("z", (6,), FLOAT)
    builder.add_call_back(function, ["y"], ["z"], label="add")
    builder.add_output("z")
    (z,) = builder.build(1)(torch.zeros(6))
    assert z.data_ptr() == made[0]


def test_call_back_results_are_freed() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        result = x + 1
        alive.append(weakref.ref(result))
        return result

    builder = ProgramBuilder()
    builder.add_input(0, (6,), FLOAT)
    for i in range(8):
        builder.add_buffer(i + 1, (6,), FLOAT)
        builder.add_call_back(function, [i], [i + 1], label="add")
    builder.add_buffer("out", (6,), FLOAT)
    builder.add_kernel(affine(6), [8], ["out"], label="last", estimate=1.0)
    builder.add_output("out")
    assert torch.equal(builder.build(1)(torch.zeros(6))[0], torch.full((6,), 9.0))
    gc.collect()
    assert all(reference() is None for reference in alive)


def test_call_back_that_returns_its_input() -> None:
    builder = double((1000,))
    for key in ("z", "a", "b", "out"):
        builder.add_buffer(key, (1000,), FLOAT)
    builder.add_call_back(lambda y: y, ["y"], ["z"], label="view")
    # Free to take the memory of y:
    builder.add_kernel(affine(1000), ["x"], ["a"], label="a", estimate=1.0)
    builder.add_kernel(affine(1000), ["a"], ["b"], label="b", estimate=1.0)
    builder.add_kernel(add(1000), ["z", "b"], ["out"], label="add", estimate=1.0)
    builder.add_output("out")
    x = torch.arange(1000.0)
    assert torch.equal(builder.build(1)(x)[0], 2 * x + x + 2)


@pytest.mark.parametrize("of", ["input", "constant", "result", "call-back"])
def test_parts_of_any_memory(of: str) -> None:
    builder = ProgramBuilder()
    builder.add_input("x", (2, 4), FLOAT)
    x = torch.arange(8.0).view(2, 4)
    whole = of
    if of == "input":
        whole = "x"
    elif of == "constant":
        builder.add_constant(whole, x)
    else:
        builder.add_buffer(whole, (2, 4), FLOAT)
        if of == "result":
            builder.add_kernel(affine(8, 1.0, 0.0), ["x"], [whole], label="copy", estimate=1.0)
            builder.add_output(whole)
        else:
            builder.add_call_back(torch.clone, ["x"], [whole], label="clone")
    builder.add_alias("row", whole, (4,), FLOAT, offset=16)
    builder.add_alias("end", "row", (1, 2), FLOAT, offset=8)
    builder.add_buffer("sum", (4,), FLOAT)
    builder.add_buffer("negative", (1, 2), FLOAT)
    builder.add_kernel(add(4), ["row", "row"], ["sum"], label="add", estimate=1.0)
    builder.add_call_back(torch.neg, ["end"], ["negative"], label="neg")
    for key in ("sum", "negative", "end"):
        builder.add_output(key)
    total, negative, end = builder.build(2)(x)[-3:]
    assert torch.equal(total, 2 * x[1])
    assert torch.equal(negative, -x[1:, 2:])
    assert torch.equal(end, x[1:, 2:])


def test_unused_results_of_a_call_back() -> None:
    program = through_torch(lambda x: (x - 5, -x, None), [None, "z", None])
    assert torch.equal(program(torch.ones(6))[0], torch.full((6,), -1.0))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), "2 results instead of 1"),
        (lambda x: x[:3], r"float32\[3\] instead of float32\[6\]"),
        (lambda x: x.double(), r"float64\[6\] instead of float32\[6\]"),
    ],
)
def test_wrong_results_of_a_call_back(function: Callable[..., object], message: str) -> None:
    with pytest.raises(GraphError, match=f"aten.strange returned {message}"):
        through_torch(function)(torch.ones(6))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_errors_in_a_call_back_pass_and_do_no_harm(error: BaseException) -> None:
    failing = True

    def function(x: Tensor) -> Tensor:
        if failing:
            raise error
        return -x

    program = through_torch(function)
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            program(torch.ones(6))
    if isinstance(error, ValueError):
        assert any("aten.strange" in note for note in caught.value.__notes__)
    failing = False
    for _ in range(100):
        assert torch.equal(program(torch.ones(6))[0], torch.full((6,), -1.0))


def test_call_backs_are_free_of_the_callers_modes() -> None:
    def function(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return x.view(2, 3) @ torch.eye(3)

    builder = double()
    builder.add_buffer("z", (2, 3), FLOAT)
    builder.add_call_back(function, ["y"], ["z"], label="matmul")
    builder.add_output("z")
    program = builder.build(1)
    x = torch.ones(6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = program(x)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert not result.requires_grad
    assert torch.equal(result, torch.full((2, 3), 2.0))


def test_first_call_in_inference_mode() -> None:
    program = through_torch(torch.neg)
    with torch.inference_mode():
        inside = program(torch.ones(6))[0]
    assert torch.equal(program(torch.ones(6))[0], inside)


def test_arena_memory_is_used_again_and_planted_overlap_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chain(1000, 40, 1).arena_bytes == 2 * 4096
    monkeypatch.setattr(planner, "_greedy", lambda buffers, order: ([0] * len(buffers), 2**20))
    with pytest.raises(RuntimeError, match="overlap"):
        chain(1000, 40, 1)


def test_constants_are_shared_not_copied() -> None:
    builder = double()
    constant = torch.ones(6)
    assert constant.data_ptr() % 64 == 0
    builder.add_constant("c", constant)
    builder.add_buffer("z", (6,), FLOAT)
    builder.add_kernel(add(6), ["y", "c"], ["z"], label="add", estimate=1.0)
    builder.add_output("z")
    program = builder.build(1)
    del builder
    assert torch.equal(program(torch.ones(6))[0], torch.full((6,), 3.0))
    constant.fill_(5)
    assert torch.equal(program(torch.ones(6))[0], torch.full((6,), 7.0))


@pytest.mark.parametrize("make", [lambda: chain(6, 3, 2), lambda: through_torch(torch.neg)])
def test_memory_goes_with_the_program(make: Callable[[], Program]) -> None:
    program = make()
    program(torch.zeros(6))
    gone = weakref.ref(program)
    gc.disable()
    try:
        del program
        assert gone() is None
    finally:
        gc.enable()


def test_profile_names_every_part_in_order() -> None:
    program = through_torch(torch.neg)
    profile = program.profile([torch.ones(6)])
    assert [label for label, _ in profile] == ["double", "aten.strange", "after"]
    assert profile[1][1] > 0


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda b: b.add_buffer("y", (6,), FLOAT), "'y' is declared twice"),
        (lambda b: b.add_output("q"), "'q' is not declared"),
        (lambda b: b.add_alias("a", "y", (7,), FLOAT), "does not lie in 'y'"),
        (lambda b: b.add_alias("a", "y", (1,), FLOAT, offset=2), "does not lie in 'y'"),
        (lambda b: b.add_call_back(abs, ["y"], ["x"], label="f"), "'x' is an input"),
        (
            lambda b: b.add_kernel(add(6), ["y"], ["z"], label="add", estimate=1.0),
            "Input\\(index=1, offset=0\\), which its kernel was not given",
        ),
        (
            lambda b: b.add_kernel(minus_maximum(6, 1)[0], ["y"], ["z"], label="m", estimate=1.0),
            "asked for no scratch",
        ),
        (lambda b: b.add_output("z"), "'z' is returned before anything has written it"),
        (
            lambda b: b.add_call_back(abs, ["z"], ["z"], label="f"),
            "'z' is read by f before anything has written it",
        ),
    ],
)
def test_misuse_is_refused(misuse: Callable[[ProgramBuilder], None], message: str) -> None:
    builder = double()
    builder.add_buffer("z", (6,), FLOAT)
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        misuse(builder)
        builder.build(1)


def test_thread_counts_are_bounded() -> None:
    for threads in (0, 100_000):
        with pytest.raises(ValueError, match="threads must be"):
            double().build(threads)
