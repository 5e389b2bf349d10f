"""Phases of a step, on a clock that the test moves by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.metrics.timing import BESIDE_THE_STEP, CORE_PHASES, StepTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> StepTimer:
    return StepTimer(clock)


def test_step_is_split_among_its_phases(clock: Clock, timer: StepTimer) -> None:
    """1 s outside, rollout 5 s, reward 2 s, training 8 + 1 s, sync 3 s: overhead is (1 + 3) / 20."""
    clock.now += 1
    for name, seconds in (
        ("rollout", 5),
        ("reward", 2),
        ("forward_backward", 8),
        ("optimizer", 1),
        ("weight_sync", 3),
    ):
        with timer.phase(name):
            clock.now += seconds
    assert timer.finish() == {
        "time/rollout_s": 5,
        "time/reward_s": 2,
        "time/forward_backward_s": 8,
        "time/optimizer_s": 1,
        "time/weight_sync_s": 3,
        "time/other_s": 1,
        "time/step_s": 20,
        "time/overhead_share": pytest.approx(0.2),
    }


def test_eval_and_checkpoint_are_no_part_of_the_step(clock: Clock, timer: StepTimer) -> None:
    for name, seconds in (("eval", 40), ("rollout", 3), ("checkpoint", 50), ("other_work", 1)):
        with timer.phase(name):
            clock.now += seconds
    metrics = timer.finish()
    assert (metrics["time/eval_s"], metrics["time/checkpoint_s"]) == (40, 50)
    assert metrics["time/step_s"] == 4
    assert metrics["time/overhead_share"] == pytest.approx(0.25)


def test_nested_phase_counts_once(clock: Clock, timer: StepTimer) -> None:
    """optimizer inside forward_backward: 2 + 3 s around, 4 s inside."""
    with timer.phase("forward_backward"):
        clock.now += 2
        with timer.phase("optimizer"):
            clock.now += 4
        clock.now += 3
    metrics = timer.finish()
    assert metrics["time/forward_backward_s"] == 5
    assert metrics["time/optimizer_s"] == 4
    assert metrics["time/step_s"] == 9


def test_phase_of_one_name_adds_up(clock: Clock, timer: StepTimer) -> None:
    for _ in range(3):
        with timer.phase("reward"):
            clock.now += 0.5
    assert timer.finish()["time/reward_s"] == 1.5


def test_phase_that_raises_is_closed(clock: Clock, timer: StepTimer) -> None:
    def fail() -> None:
        clock.now += 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), timer.phase("reward"):
        fail()
    clock.now += 1
    metrics = timer.finish()
    assert (metrics["time/reward_s"], metrics["time/other_s"]) == (2, 1)


def test_finish_starts_the_next_step(clock: Clock, timer: StepTimer) -> None:
    with timer.phase("rollout"):
        clock.now += 7
    timer.finish()
    clock.now += 2
    assert timer.finish() == {"time/other_s": 2, "time/step_s": 2, "time/overhead_share": 1.0}


def test_a_phase_pays_for_what_it_has_queued() -> None:
    """Kernels run on after they are launched; the phase ends when they do."""
    clock = Clock()
    queued = [0.0]

    def wait() -> None:
        clock.now += queued[0]
        queued[0] = 0.0

    timer = StepTimer(clock, wait)
    with timer.phase("forward_backward"):
        queued[0] = 5.0
    with timer.phase("optimizer"):
        clock.now += 1
    metrics = timer.finish()
    assert (metrics["time/forward_backward_s"], metrics["time/optimizer_s"]) == (5, 1)


def test_empty_step_has_no_overhead(timer: StepTimer) -> None:
    assert timer.finish() == {"time/other_s": 0, "time/step_s": 0, "time/overhead_share": 0.0}


@given(
    st.lists(
        st.tuples(st.sampled_from(["rollout", "optimizer", "eval", "sync"]), st.integers(0, 9), st.booleans())
    )
)
def test_no_moment_is_lost_or_counted_twice(moves: list[tuple[str, int, bool]]) -> None:
    """Whatever the order and nesting, the phases add up to the time that passed."""
    clock = Clock()
    timer = StepTimer(clock)
    for name, seconds, nested in moves:
        with timer.phase(name):
            clock.now += seconds
            if nested:
                with timer.phase("reward"):
                    clock.now += 1
        clock.now += 2
    metrics = timer.finish()
    beside = sum(metrics.get(f"time/{name}_s", 0.0) for name in BESIDE_THE_STEP)
    core = sum(metrics.get(f"time/{name}_s", 0.0) for name in CORE_PHASES)
    assert metrics["time/step_s"] + beside == clock.now - 100
    assert metrics["time/overhead_share"] * metrics["time/step_s"] == pytest.approx(
        metrics["time/step_s"] - core
    )
