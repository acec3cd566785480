"""The team under concurrent callers, forks, errors, and the end of the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_kernels import late_increment, minus_maximum, rotate

from graphopt.engine import walker
from graphopt.engine.builder import ProgramBuilder
from graphopt.engine.program import Program
from graphopt.engine.team import team
from graphopt.engine.walker import compare_speeds, divide
from graphopt.kernels.registry import WHOLE

FLOAT = torch.float32
COUNT = 512


def mixed(threads: int, call_back: Callable[[torch.Tensor], torch.Tensor] | None) -> Program:
    """Rotations, then minus the maximum, with a call-back in the middle if there is one."""
    builder = ProgramBuilder()
    builder.add_input(0, (COUNT,), FLOAT)
    for i in range(20):
        builder.add_buffer(i + 1, (COUNT,), FLOAT)
        if i == 10 and call_back is not None:
            builder.add_call_back(call_back, [i], [i + 1], label="call-back")
        else:
            steps = rotate(COUNT, i, parallel=i % 5 != 3)
            builder.add_kernel(steps, [i], [i + 1], label="rotate", estimate=1.0)
    steps, scratch = minus_maximum(COUNT, threads)
    builder.add_buffer("out", (COUNT,), FLOAT)
    builder.add_kernel(steps, [20], ["out"], scratch_bytes=scratch, label="maximum", estimate=1.0)
    builder.add_output("out")
    return builder.build(threads)


def reference(x: torch.Tensor) -> torch.Tensor:
    rotated = torch.roll(x, -sum(range(20)))
    return rotated - rotated.max()


def rotate_10(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, -10) + 1


@pytest.mark.parametrize("call_back", [None, rotate_10])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sixteen_callers(
    threads: int, call_back: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    program = mixed(threads, call_back)
    together = threading.Barrier(16)
    right = [0] * 16

    def call(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        together.wait(30)
        for _ in range(200):
            x = torch.randint(-99, 99, (COUNT,), generator=generator).float()
            right[index] += torch.equal(program(x)[0], reference(x))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert right == [200] * 16


def test_programs_with_teams_of_different_sizes() -> None:
    programs = [mixed(threads, None) for threads in (1, 4, 2, 3)]
    for _ in range(50):
        for program in programs:
            x = torch.randint(-99, 99, (COUNT,)).float()
            assert torch.equal(program(x)[0], reference(x))


def test_workers_that_sleep_wake_again() -> None:
    program = mixed(2, None)
    for pause in (0.0, 0.0005, 0.02) * 3:
        x = torch.randint(-99, 99, (COUNT,)).float()
        assert torch.equal(program(x)[0], reference(x))
        time.sleep(pause)


def test_idle_workers_use_no_processor() -> None:
    program = mixed(3, None)
    for _ in range(10):
        program(torch.zeros(COUNT))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05


def test_nested_programs() -> None:
    inner = mixed(2, None)
    outer = mixed(2, lambda x: rotate_10(x) + 0 * inner(x)[0])
    for _ in range(20):
        x = torch.randint(-99, 99, (COUNT,)).float()
        assert torch.equal(outer(x)[0], reference(x))


def in_child(work: Callable[[], bool], seconds: float = 30) -> None:
    """Assert that `work` is true in a forked child, which must end in time."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@needs_fork
def test_forked_child_has_a_team_of_its_own() -> None:
    program = mixed(2, None)
    x = torch.randint(-99, 99, (COUNT,)).float()
    for _ in range(5):
        program(x)

    def work() -> bool:
        right = all(torch.equal(program(x)[0], reference(x)) for _ in range(50))
        return right and len(team._threads) == 1 and team._threads[0].is_alive()

    in_child(work)
    assert torch.equal(program(x)[0], reference(x))


@needs_fork
def test_fork_while_others_call() -> None:
    program = mixed(2, None)
    x = torch.randint(-99, 99, (COUNT,)).float()
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            program(x)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(10):
            in_child(lambda: all(torch.equal(program(x)[0], reference(x)) for _ in range(5)))
    finally:
        stop.set()
        for caller in callers:
            caller.join()


FORK_WITH_CONVOLUTION = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(4)
from small_kernels import affine
from test_team import in_child, ProgramBuilder, FLOAT
weight = torch.randn(64, 64, 3, 3)
image = torch.randn(1, 64, 64, 64)
builder = ProgramBuilder()
builder.add_input("x", image.shape, FLOAT)
builder.add_constant("w", weight)
builder.add_buffer("y", image.shape, FLOAT)
builder.add_buffer("z", image.shape, FLOAT)
builder.add_call_back(
    lambda x, w: torch.conv2d(x, w, padding=1), ["x", "w"], ["y"], label="aten.conv2d"
)
builder.add_kernel(affine(image.numel()), ["y"], ["z"], label="affine", estimate=1.0)
builder.add_output("z")
builder.add_output("x")
program = builder.build(2)
strided = image.transpose(2, 3)
wanted = torch.conv2d(strided, weight, padding=1) + 1
def work():
    return all(torch.allclose(program(strided)[0], wanted, atol=1e-4) for _ in range(3))
assert work()
in_child(work)
assert work()
print("done")
"""


def run_python(source: str) -> str:
    """Output of a program in a process of its own, which must end well and in time."""
    source = source.replace("{tests!r}", repr(str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    return done.stdout


@needs_fork
def test_forked_child_calls_torch_back() -> None:
    assert run_python(FORK_WITH_CONVOLUTION) == "done\n"


EXITS = """
import atexit, gc, sys, threading, time
sys.path.insert(0, {tests!r})
from small_kernels import affine
from test_team import COUNT, FLOAT, ProgramBuilder, mixed, reference, team, torch
program = mixed(3, None)
x = torch.zeros(COUNT)
def call():
    assert torch.equal(program(x)[0], reference(x))
for _ in range(20):
    call()
"""

# Minutes of steps, which a daemon thread is still at when the process ends. (One that came back
# to the interpreter while that ends would be killed by it, and torch or Numba with it.)
BUSY = """
builder = ProgramBuilder()
builder.add_input(0, (10**7,), FLOAT)
builder.add_buffer(1, (10**7,), FLOAT)
builder.add_kernel(affine(10**7) * 50000, [0], [1], label="long", estimate=1.0)
builder.add_output(1)
long = builder.build(2)
threading.Thread(target=long, args=(torch.zeros(10**7),), daemon=True).start()
time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "ending",
    [
        "del program; gc.collect()",
        # Calls that come after the team was dismissed run alone.
        "team.stop(); call(); atexit.register(call); sys.exit()",
        BUSY,
    ],
    ids=["collected", "stopped", "busy"],
)
def test_process_ends_cleanly(ending: str) -> None:
    assert run_python(EXITS + ending + "\n") == ""


@needs_fork
def test_no_thread_to_be_had() -> None:
    """A forked child has no workers yet, and must do without."""
    program = mixed(2, None)
    x = torch.zeros(COUNT)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> bool:
        threading.Thread.start = refuse  # type: ignore[method-assign]
        with pytest.warns(RuntimeWarning, match="no team of 2 threads .can't start") as seen:
            right = all(torch.equal(program(x)[0], reference(x)) for _ in range(5))
        return right and len(seen) == 1

    in_child(work)


def test_busy_machine_slows_but_does_not_stop_the_team() -> None:
    program = mixed(5, None)
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        for _ in range(20):
            x = torch.randint(-99, 99, (COUNT,)).float()
            assert torch.equal(program(x)[0], reference(x))
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def jobs() -> int:
    """How many jobs the team was given."""
    return int(team._words[walker.JOB_GENERATION // 8])


def increment(turns: int, gives_way: bool) -> Program:
    """Adds one; a second thread turns a loop so many times before it begins."""
    builder = ProgramBuilder()
    builder.add_input("x", (COUNT,), FLOAT)
    builder.add_buffer("y", (COUNT,), FLOAT)
    builder.add_kernel(late_increment(COUNT, turns), ["x"], ["y"], label="increment", estimate=1.0)
    builder.add_output("y")
    return builder.build(2, gives_way=gives_way)


def jobs_of_calls(program: Program, calls: int) -> int:
    """How many of some calls were jobs of the team, after one that starts and wakes it."""
    x = torch.arange(COUNT).float()
    before = jobs()
    deadline = time.monotonic() + 60
    while jobs() == before:
        assert time.monotonic() < deadline, "the team never worked"
        assert torch.equal(program(x)[0], x + 1)
    before = jobs()
    for _ in range(calls):
        assert torch.equal(program(x)[0], x + 1)
    return jobs() - before


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"),
    reason="there is no clock that is cheap enough to tell how long a thread waited",
)
def test_a_caller_that_waits_for_a_late_team_goes_alone_for_a_while() -> None:
    # Calls alone take microseconds, but this thread may itself lose its processor between two. It
    # tries the team again each time, or `jobs_of_calls` would fail.
    program = increment(2_000_000, gives_way=True)
    assert any(jobs_of_calls(program, 3) == 0 for _ in range(10))


def test_a_caller_may_wait_for_its_team_all_the_same() -> None:
    program = increment(2_000_000, gives_way=False)
    first = jobs_of_calls(program, 0)
    deadline = time.monotonic() + 60
    # Workers that sleep long may miss a job.
    while first < 3:
        assert time.monotonic() < deadline, "the team was not waited for"
        first += jobs_of_calls(program, 1)


def shares_after(ticks: list[list[int]]) -> np.ndarray:
    """The shares of threads after jobs in which they were busy for so many ticks."""
    threads = len(ticks[0])
    block = np.zeros(walker.FIRST_THREAD + threads * walker.THREAD_BYTES, np.uint8).view(np.int64)
    rows = block[walker.FIRST_THREAD // 8 :].reshape(threads, -1)
    rows[:, walker.SPEED // 8] = walker.UNIT_SPEED
    divide(block.ctypes.data, threads)
    for busy in ticks:
        rows[:, walker.TICKS // 8] = busy
        compare_speeds(block.ctypes.data, threads)
        divide(block.ctypes.data, threads)
    begins, ends = rows[:, walker.BEGIN // 8], rows[:, walker.END // 8]
    assert begins[0] == 0
    assert ends[-1] == WHOLE == walker.WHOLE
    np.testing.assert_array_equal(begins[1:], ends[:-1])
    return (ends - begins) / WHOLE


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 512])
def test_threads_begin_with_equal_shares(threads: int) -> None:
    np.testing.assert_allclose(shares_after([[0] * threads]), 1 / threads, atol=1e-5)


@pytest.mark.parametrize(
    "slowness", [(1, 1), (1, 2), (3, 1), (2, 2, 1, 4), (1,) * 200 + (2,) * 312]
)
def test_shares_follow_the_speed_of_threads(slowness: tuple[int, ...]) -> None:
    speeds = 1 / np.array(slowness)
    shares, known = np.full(len(slowness), 1 / len(slowness)), []
    for _ in range(30):
        known.append(
            [int(10**9 * share * slow) for share, slow in zip(shares, slowness, strict=True)]
        )
        shares = shares_after(known)
    np.testing.assert_allclose(shares, speeds / speeds.sum(), rtol=0.02)


def test_threads_of_nearly_one_speed_get_equal_shares() -> None:
    np.testing.assert_array_equal(shares_after([[1_000_000, 1_080_000]] * 30), [0.5, 0.5])
    (first, second) = shares_after([[1_000_000, 1_150_000]] * 30)
    assert first > 0.52 > second


def test_shares_after_short_or_disturbed_jobs() -> None:
    np.testing.assert_array_equal(shares_after([[9000, 20000]] * 9), [0.5, 0.5])
    (first, second) = shares_after([[10**6, 10**6]] * 3 + [[10**6, 10**9]])
    assert 0.5 < first < 0.65
    assert first + second == 1
    (first, second) = shares_after([[2**62, 10**4]] * 99)
    assert first > 0.05, "a thread that seems to stand still keeps some work, or it never recovers"


def test_results_do_not_depend_on_shares() -> None:
    program, x = mixed(2, None), torch.randint(-99, 99, (COUNT,)).float()
    speeds = team._words[(walker.FIRST_THREAD + walker.SPEED) // 8 :: walker.THREAD_BYTES // 8]
    for speed in (walker.UNIT_SPEED // 4, walker.UNIT_SPEED // 3, 4 * walker.UNIT_SPEED):
        for _ in range(20):
            speeds[0] = speed
            assert torch.equal(program(x)[0], reference(x))
    speeds[0] = walker.UNIT_SPEED
