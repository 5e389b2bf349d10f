"""Deadlines of phases: when a rank stays in one too long, the run ends and says which rank waits for which.

Ranks that hang wait in collectives, so nothing here may need the main thread or another rank's main thread.
Each rank has a small thread. What it publishes travels through the store of the default process group, over a
connection of its own: that store works across nodes, torchrun's agent keeps it outside the ranks, and, unlike
a file in run_dir, it also answers while the shared file system is what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_drpo.config.schema import DeadlinesConfig
from megatron_drpo.errors import DeadlineError

PHASES = {
    "starting": "start_s",
    "loading the checkpoint": "checkpoint_s",
    "data": "rollout_s",
    "rollout": "rollout_s",
    "update": "update_s",
    "weight sync": "weight_sync_s",
    "evaluation": "evaluation_s",
    "checkpoint": "checkpoint_s",
    "export": "checkpoint_s",
}
"""Phase -> its key in `DeadlinesConfig`."""

_STORE_TIMEOUT_S = 10.0
_SHORT_POLL_S = 0.1
_WRITE_TIMEOUT_S = 2.0
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPhase:
    """Where a rank is."""

    rank: int
    phase: str
    step: int
    """0: before the first."""
    count: int
    """Phases begun so far: all ranks go through the same ones, so a lower count is behind."""
    since: float
    """Unix seconds."""
    host: str
    pid: int
    began: float = 0.0
    """As `since`, but by this process's monotonic clock."""
    limit_s: float | None = None
    age_s: float = 0.0
    place: str = ""
    """Of its main thread: file:line function."""
    in_collective: bool = False
    """Whether the main thread is inside torch.distributed."""
    waits_for: str = ""
    """What `Watchdog.describe` says."""

    @property
    def label(self) -> str:
        return repr(self.phase) + (f" of step {self.step}" if self.step else "")

    @property
    def details(self) -> str:
        """Since when, where and for what."""
        text = f"{self.label} since {self.age_s:.0f} s"
        text += f", at {self.place}" if self.place else ""
        return text + (f" ({self.waits_for})" if self.waits_for else "")


class Watchdog:
    """Watches this rank's phases; a context manager, made when the default process group exists.

    Attributes:
        describe: what the rank waits for in a rollout, in words; called in the watchdog's thread.
    """

    def __init__(
        self, deadlines: DeadlinesConfig, run_dir: str | Path, *, poll_s: float = 1.0, answer_s: float = 5.0
    ) -> None:
        """
        Args:
            run_dir: stacks go to its logs/stacks_rank_N.txt; upon SIGUSR1 too, and then the rank goes on.
            poll_s: how often it looks.
            answer_s: how long the rank that ends the run waits for the others' answers.
        """
        self.describe: Callable[[], str] | None = None
        self._deadlines = deadlines
        self._poll_s = poll_s
        self._answer_s = answer_s
        rank = dist.get_rank()
        self._stacks_path = Path(run_dir) / "logs" / f"stacks_rank_{rank}.txt"
        self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stacks_path.open("ab", buffering=0)
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._peers = _Peers(rank, dist.get_world_size()) if dist.get_world_size() > 1 else None
        self._now = RankPhase(
            rank=rank,
            phase="starting",
            step=0,
            count=0,
            since=0.0,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.begin("starting", 0)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if any(limit_s is not None for limit_s in asdict(deadlines).values()):
            self._thread.start()

    def begin(self, phase: str, step: int) -> None:
        """The previous phase is over and this one begins; takes microseconds.

        Args:
            phase: one of `PHASES`.
            step: counted from 1; 0 before the first.
        """
        limit_s: float | None = getattr(self._deadlines, PHASES[phase])
        # Replaced as a whole: the thread sees the old or the new one.
        self._now = replace(
            self._now,
            phase=phase,
            step=step,
            count=self._now.count + 1,
            since=time.time(),
            began=time.monotonic(),
            limit_s=limit_s,
        )

    def close(self) -> None:
        """No deadline from now on."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        if not self._stacks.closed:
            faulthandler.unregister(signal.SIGUSR1)
            self._stacks.close()
            if not self._stacks_path.stat().st_size:
                self._stacks_path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        published = 0
        while not self._closing.wait(self._poll_s):
            now = self._now
            if self._peers is not None:
                try:
                    if published != now.count:
                        self._peers.publish(now)
                        published = now.count
                    if self._peers.is_over():
                        self._answer(self._peers)
                except RuntimeError:  # the store is gone; the deadline stands nevertheless
                    self._peers = None
            if now.limit_s is not None and time.monotonic() - now.began > now.limit_s and self._now is now:
                self._expire()

    def _expire(self) -> NoReturn:
        """End the run, or leave that to the rank that was first."""
        own = self._look()
        others: list[RankPhase] = []
        silent: dict[int, RankPhase | None] = {}
        if self._peers is not None:
            with contextlib.suppress(RuntimeError):
                if not self._peers.end():
                    self._answer(self._peers)
                others, silent = self._peers.collect(self._answer_s)
        self._dump()
        for last in silent.values():
            if last is not None and last.host == own.host:
                # Its thread does not run, but the handler of the signal does: it is C and needs no lock.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(last.pid, signal.SIGUSR1)
        stacks = self._stacks_path.with_name("stacks_rank_*.txt")
        error = DeadlineError(f"{explain(own, others, silent)}\nStacks of all threads: {stacks}")
        os.write(2, f"\n{type(error).__name__} (rank {own.rank}): {error}\n".encode())
        if silent:
            time.sleep(_SHORT_POLL_S)
        if self._peers is not None:
            with contextlib.suppress(RuntimeError):
                self._peers.release()
        os._exit(1)

    def _answer(self, peers: _Peers) -> NoReturn:
        """Another rank ends the run: tell it where this one is, and end when it has spoken."""
        with contextlib.suppress(Exception):  # without a store there is nobody to wait for
            self._dump()
            peers.answer(self._look())
            peers.wait_for_release(2 * self._answer_s)
        os._exit(1)

    def _look(self) -> RankPhase:
        place, in_collective = _place_of_main_thread()
        waits_for = ""
        if self.describe is not None and self._now.phase in ("rollout", "evaluation"):
            with contextlib.suppress(Exception):  # it reads what other threads change
                waits_for = self.describe()
        now = self._now
        age_s = time.monotonic() - now.began
        return replace(now, age_s=age_s, place=place, in_collective=in_collective, waits_for=waits_for)

    def _dump(self) -> None:
        """In a thread of its own: the file system may be what hangs."""

        def dump() -> None:
            now = self._now
            head = f"\n--- rank {now.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, in {now.label}\n"
            self._stacks.write(head.encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)

        thread = threading.Thread(target=dump, name="watchdog stacks", daemon=True)
        thread.start()
        thread.join(_WRITE_TIMEOUT_S)


class _Peers:
    """The ranks' watchdogs, as they see each other through the store."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        store = _get_default_store()
        # One connection serves one caller at a time, and the main thread may wait long on the default one.
        # `clone` is torch 2.8's; before that the connection is shared.
        store = store.clone() if hasattr(store, "clone") else store
        self._store = dist.PrefixStore("megatron_drpo_watchdog", store)
        self._store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))

    def publish(self, phase: RankPhase) -> None:
        self._store.set(f"phase/{self._rank}", json.dumps(asdict(phase)))

    def answer(self, phase: RankPhase) -> None:
        self._store.set(f"answer/{self._rank}", json.dumps(asdict(phase)))

    def end(self) -> bool:
        """Whether this rank was the first to say that the run is over."""
        first = self._store.add("ends", 1) == 1
        if first:
            self._store.set("over", "1")
        return first

    def is_over(self) -> bool:
        return self._store.check(["over"])

    def release(self) -> None:
        """The message is out: all may end."""
        self._store.set("released", "1")

    def wait_for_release(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._store.check(["released"]) and time.monotonic() < deadline:
            time.sleep(_SHORT_POLL_S)

    def collect(self, timeout_s: float) -> tuple[list[RankPhase], dict[int, RankPhase | None]]:
        """The other ranks' answers, and what those that gave none published last."""
        deadline = time.monotonic() + timeout_s
        missing = {rank for rank in range(self._world_size) if rank != self._rank}
        answers: list[RankPhase] = []
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                answer = self._read(f"answer/{rank}")
                if answer is not None:
                    answers.append(answer)
                    missing.remove(rank)
            time.sleep(_SHORT_POLL_S)
        return answers, {rank: self._read(f"phase/{rank}") for rank in sorted(missing)}

    def _read(self, key: str) -> RankPhase | None:
        return RankPhase(**json.loads(self._store.get(key))) if self._store.check([key]) else None


def explain(late: RankPhase, others: Sequence[RankPhase], silent: Mapping[int, RankPhase | None]) -> str:
    """Who waits for whom.

    Args:
        late: of the rank whose phase has taken too long.
        others: answers of the other ranks.
        silent: the ranks that gave none -> what they published last.
    """
    assert late.limit_s is not None, "it has passed it"
    rule = f"deadlines.{PHASES[late.phase]}={late.limit_s:g}"
    head = f"phase {late.label} has taken {late.age_s:.0f} s ({rule})"
    ranks = sorted([late, *others], key=lambda r: r.rank)
    culprits = find_culprits(ranks)
    clauses = [
        f"rank {rank} does not answer (stopped, gone or stuck in native code)"
        + (
            f"; last seen in {last.label}, which it began {time.time() - last.since:.0f} s ago"
            if last
            else ""
        )
        for rank, last in list(silent.items())[:_MAX_NAMED]
    ]
    for culprit in culprits[:_MAX_NAMED]:
        if culprit.rank != late.rank:
            clauses.append(f"waits for rank {culprit.rank}, which is in {culprit.details}")
    if late in culprits or not (culprits or silent):
        clauses.insert(0, f"it is at {late.place}" + (f" ({late.waits_for})" if late.waits_for else ""))
    waiting = [r for r in ranks if r not in culprits and r.rank != late.rank]
    if late in culprits and waiting:
        names = ", ".join(str(r.rank) for r in waiting[:_MAX_NAMED])
        names += f" and {len(waiting) - _MAX_NAMED} more" if len(waiting) > _MAX_NAMED else ""
        who = f"ranks {names} wait" if len(waiting) > 1 else f"rank {names} waits"
        clauses.append(f"{who} for it, in {waiting[0].label}")
    if not culprits and not silent and others:
        clauses.append("all other ranks are in the same phase")
        told = [r for r in ranks if r.waits_for and r.rank != late.rank]
        clauses += [f"rank {r.rank}: {r.waits_for}" for r in told[:_MAX_NAMED]]
    return f"{head}: {'; '.join(clauses)}"


def find_culprits(ranks: Sequence[RankPhase]) -> list[RankPhase]:
    """Those that the others wait for; none if the phases do not tell.

    That is who is furthest behind; if all are in the same phase, who stands outside a collective that others
    wait in.
    """
    lowest = min(rank.count for rank in ranks)
    behind = [rank for rank in ranks if rank.count == lowest]
    if len(behind) == len(ranks):
        behind = [rank for rank in ranks if not rank.in_collective]
    return behind if len(behind) < len(ranks) or len(ranks) == 1 else []


def _place_of_main_thread() -> tuple[str, bool]:
    """(file:line function of our innermost frame, whether it is inside torch.distributed)."""
    ident = threading.main_thread().ident
    frame: FrameType | None = None if ident is None else sys._current_frames().get(ident)
    if frame is None:
        return "", False
    own, in_collective, innermost = None, False, frame
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        in_collective = in_collective or module.startswith("torch.distributed.")
        if own is None and module.startswith(("megatron_drpo.", "__main__")):
            own = frame
        frame = frame.f_back
    shown = own or innermost
    code = shown.f_code
    return f"{Path(code.co_filename).name}:{shown.f_lineno} {code.co_name}", in_collective
