"""A rank that hangs is named, with its stacks, and every rank ends; a run that does not hang notices nothing.

Run as a program this file is one rank of the tests below: `test_watchdog.py BEHAVIOUR RUN_DIR`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_drpo.config.schema import DeadlinesConfig
from megatron_drpo.runtime.watchdog import PHASES, RankPhase, Watchdog, explain, find_culprits

pytestmark = pytest.mark.distributed

DEADLINE_S = 1.5
ENDS_WITHIN_S = 8.0
"""After the deadline: the answers of silent ranks are waited for, 2 s here."""
WORLD_SIZE = 3
CULPRIT = 1


# ------------------------------------------------------------------------------------- one rank's program


def sleep_long() -> None:
    time.sleep(60)


def hold_the_interpreter() -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")


def is_culprit() -> bool:
    return dist.get_rank() == min(CULPRIT, dist.get_world_size() - 1)


def rollout_hangs(watchdog: Watchdog) -> None:
    watchdog.begin("rollout", 3)
    watchdog.describe = lambda: "http://127.0.0.1:1: 3 samples in flight"
    if is_culprit():
        sleep_long()
    watchdog.begin("update", 3)
    dist.barrier()


def update_hangs(watchdog: Watchdog) -> None:
    watchdog.begin("update", 3)
    if is_culprit():
        sleep_long()
    dist.barrier()


def interpreter_is_held(watchdog: Watchdog) -> None:
    watchdog.begin("rollout", 3)
    time.sleep(0.5)  # so that it is published
    if is_culprit():
        hold_the_interpreter()
    watchdog.begin("update", 3)
    dist.barrier()


def nothing_hangs(watchdog: Watchdog) -> None:
    """Phases of 0.6 s each, over 4 s in all, and a signal in between."""
    for step in (1, 2):
        for phase in ("rollout", "update", "weight sync"):
            watchdog.begin(phase, step)
            time.sleep(0.6)
            dist.barrier()
        os.kill(os.getpid(), signal.SIGUSR1)


BEHAVIOURS = {f.__name__: f for f in (rollout_hangs, update_hangs, interpreter_is_held, nothing_hangs)}


def run_rank(behaviour: str, run_dir: str) -> None:
    dist.init_process_group("gloo")
    limits = DeadlinesConfig(rollout_s=20.0, update_s=DEADLINE_S, weight_sync_s=DEADLINE_S)
    with Watchdog(limits, run_dir, poll_s=0.1, answer_s=2.0) as watchdog:
        dist.barrier()
        print("begins", time.time(), flush=True)
        BEHAVIOURS[behaviour](watchdog)
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- the tests


@dataclass
class Outcome:
    statuses: list[int]
    errors: list[str]
    seconds: list[float]
    """From the first phase to the rank's end."""
    stacks: list[str]
    """stacks_rank_N.txt; empty if there is none."""


@pytest.fixture
def run_ranks(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    ranks: list[subprocess.Popen[str]] = []

    def run(behaviour: str, world_size: int = WORLD_SIZE) -> Outcome:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        environ = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
        }
        for rank in range(world_size):
            command = [sys.executable, __file__, behaviour, str(tmp_path)]
            pipe = subprocess.PIPE
            ranks.append(
                subprocess.Popen(
                    command, env={**environ, "RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True
                )
            )
        ends = _ends(ranks)
        output = [process.communicate() for process in ranks]
        begun = [float(out.split()[1]) for out, _ in output]
        paths = [tmp_path / "logs" / f"stacks_rank_{rank}.txt" for rank in range(world_size)]
        return Outcome(
            statuses=[process.returncode for process in ranks],
            errors=[error for _, error in output],
            seconds=[end - begin for end, begin in zip(ends, begun, strict=True)],
            stacks=[path.read_text() if path.exists() else "" for path in paths],
        )

    yield run
    for process in ranks:
        process.kill()
        process.wait()


def _ends(ranks: list[subprocess.Popen[str]]) -> list[float]:
    """When each ended; as torchrun does, one that outlives a failed one for long is killed."""
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 60.0
    while len(ends) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank not in ends and process.poll() is not None:
                ends[rank] = time.time()
                deadline = min(deadline, time.monotonic() + 2.0)
            elif rank not in ends and time.monotonic() > deadline:
                process.kill()
        time.sleep(0.02)
    return [ends[rank] for rank in range(len(ranks))]


def message_of(outcome: Outcome) -> str:
    """The one message over all ranks, without the part about the stacks."""
    texts = [e[e.index("DeadlineError") :] for e in outcome.errors if "DeadlineError" in e]
    assert len(texts) == 1, outcome.errors
    first, second, *_ = texts[0].splitlines()
    assert re.fullmatch(r"Stacks of all threads: .*/logs/stacks_rank_\*\.txt", second)
    return first


def test_a_rank_that_is_still_in_an_earlier_phase(run_ranks: Callable[..., Outcome]) -> None:
    outcome = run_ranks("rollout_hangs")
    assert re.fullmatch(
        r"DeadlineError \(rank [02]\): phase 'update' of step 3 has taken 2 s \(deadlines\.update_s=1\.5\): "
        r"waits for rank 1, which is in 'rollout' of step 3 since 2 s, at test_watchdog\.py:\d+ sleep_long "
        r"\(http://127\.0\.0\.1:1: 3 samples in flight\)",
        message_of(outcome),
    )
    assert outcome.statuses == [1, 1, 1]
    assert all(DEADLINE_S < seconds < DEADLINE_S + ENDS_WITHIN_S for seconds in outcome.seconds)
    assert "in sleep_long" in outcome.stacks[CULPRIT]
    for rank in (0, 2):
        assert "in barrier" in outcome.stacks[rank]
        assert "in sleep_long" not in outcome.stacks[rank]


def test_a_rank_that_misses_a_collective_of_the_same_phase(run_ranks: Callable[..., Outcome]) -> None:
    outcome = run_ranks("update_hangs")
    message = message_of(outcome)
    place = r"at test_watchdog\.py:\d+ sleep_long"
    assert re.search(
        rf"rank 1, which is in 'update' of step 3 since 2 s, {place}$"
        rf"|rank 1\): phase 'update' .* it is {place}; ranks 0, 2 wait for it, in 'update' of step 3$",
        message,
    ), message
    assert outcome.statuses == [1, 1, 1]
    assert all(seconds < DEADLINE_S + ENDS_WITHIN_S for seconds in outcome.seconds)


def test_a_rank_whose_python_stands_still(run_ranks: Callable[..., Outcome]) -> None:
    """Not even its watchdog runs: the others name it, and a signal gets its stacks nevertheless."""
    outcome = run_ranks("interpreter_is_held")
    message = message_of(outcome)
    assert re.search(
        r"rank 1 does not answer \(stopped, gone or stuck in native code\); "
        r"last seen in 'rollout' of step 3, which it began [3-6] s ago$",
        message,
    ), message
    assert outcome.statuses[0] == outcome.statuses[2] == 1
    assert outcome.statuses[CULPRIT] == -signal.SIGKILL
    assert "in hold_the_interpreter" in outcome.stacks[CULPRIT]


@pytest.mark.parametrize("world_size", [1, WORLD_SIZE])
def test_nothing_happens_to_a_run_that_goes_on(run_ranks: Callable[..., Outcome], world_size: int) -> None:
    outcome = run_ranks("nothing_hangs", world_size)
    assert outcome.statuses == [0] * world_size
    assert all("DeadlineError" not in error for error in outcome.errors)
    assert min(outcome.seconds) > 2 * DEADLINE_S
    for stacks in outcome.stacks:  # the two signals
        assert stacks.count("in nothing_hangs") == 2


def test_one_rank_alone(run_ranks: Callable[..., Outcome]) -> None:
    outcome = run_ranks("update_hangs", 1)
    assert re.search(r": it is at test_watchdog\.py:\d+ sleep_long$", message_of(outcome))
    assert outcome.statuses == [1]
    assert "in sleep_long" in outcome.stacks[0]


def rank_phase(rank: int, phase: str = "update", count: int = 7, **fields: object) -> RankPhase:
    values = {"step": 2, "since": 0.0, "host": "a", "pid": 1, "age_s": 5.0, "limit_s": 4.0, **fields}
    return RankPhase(rank=rank, phase=phase, count=count, **values)  # pyrefly: ignore[bad-argument-type]


def test_the_late_rank_itself_is_what_the_others_wait_for() -> None:
    late = rank_phase(0, "rollout", 6, place="engine.py:5 wait", waits_for="2 groups")
    others = [rank_phase(rank) for rank in range(1, 8)]
    assert explain(late, others, {}) == (
        "phase 'rollout' of step 2 has taken 5 s (deadlines.rollout_s=4): it is at engine.py:5 wait "
        "(2 groups); ranks 1, 2, 3, 4 and 3 more wait for it, in 'update' of step 2"
    )


def test_all_ranks_are_at_the_same_place() -> None:
    place = "policy.py:9 train_step"
    ranks = [rank_phase(rank, place=place, waits_for="2 groups" if rank == 1 else "") for rank in range(3)]
    assert find_culprits(ranks) == []
    assert explain(ranks[2], ranks[:2], {}) == (
        "phase 'update' of step 2 has taken 5 s (deadlines.update_s=4): it is at policy.py:9 train_step; "
        "all other ranks are in the same phase; rank 1: 2 groups"
    )


def test_a_rank_that_never_said_anything() -> None:
    late = rank_phase(1, "starting", 1, step=0)
    assert explain(late, [rank_phase(2, "starting", 1, step=0)], {0: None}) == (
        "phase 'starting' has taken 5 s (deadlines.start_s=4): rank 0 does not answer (stopped, gone or "
        "stuck in native code)"
    )


def test_every_deadline_belongs_to_a_phase() -> None:
    assert set(PHASES.values()) == set(vars(DeadlinesConfig()))


def test_a_phase_costs_microseconds(one_rank: object, tmp_path: Path) -> None:
    with Watchdog(DeadlinesConfig(), tmp_path) as watchdog:
        seconds = []
        for step in range(2000):
            start = time.perf_counter()
            watchdog.begin("update", step)
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 2] < 50e-6
    assert not list((tmp_path / "logs").iterdir()), "no stacks, no file"


def test_without_deadlines_there_is_no_thread(one_rank: object, tmp_path: Path) -> None:
    none = DeadlinesConfig(**dict.fromkeys(vars(DeadlinesConfig())))
    with Watchdog(none, tmp_path) as watchdog:
        watchdog.begin("update", 1)
        assert not watchdog._thread.is_alive()


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
