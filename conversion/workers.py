"""Runs the units of a plan in worker processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from conversion.plan import Unit
from conversion.workspace import Workspace
from megatron_drpo.errors import ConversionError
from megatron_drpo.runtime.process_end import Terminated, die_with_parent

Work = Callable[[Any, Callable[[int], None]], Any]
"""Does one job and returns what the parent needs; calls the second argument with bytes as they are done."""

_POLL_S = 0.2


class _Worker:
    """What a worker process has inherited from its parent."""

    work: Work
    counter: Any


def run_units(
    units: Sequence[Unit], work: Work, workspace: Workspace, *, num_workers: int, title: str
) -> None:
    """Do all units of a plan that are not in the workspace's journal yet.

    Raises:
        ConversionError: a worker was killed. Any error of `work` is raised as it is. Either way the journal
            holds what was finished.
    """
    todo = [unit for unit in units if unit.index not in workspace.done]
    before = workspace.num_bytes_done
    total = sum(unit.num_bytes for unit in units)
    Console(stderr=True).print(title, highlight=False, markup=False, soft_wrap=True)
    try:
        with _progress("converting", total, before) as show:
            for unit, record in run_jobs(todo, work, num_workers=num_workers, show=show):
                workspace.record(unit.index, record)
    except BrokenProcessPool:
        raise ConversionError(
            "a worker process was killed (out of memory?): "
            f"{len(workspace.done)} of {len(units)} units are done; the same command goes on from there"
        ) from None


def check_jobs(jobs: Sequence[Any], work: Work, *, total: int, num_workers: int, title: str) -> list[str]:
    """Do jobs that return the problems they find; all problems, in no order.

    Args:
        total: bytes of all jobs.
    """
    problems: list[str] = []
    try:
        with _progress(title, total, 0) as show:
            for _, found in run_jobs(jobs, work, num_workers=num_workers, show=show):
                problems += found
    except BrokenProcessPool:
        raise ConversionError(f"{title}: a worker process was killed (out of memory?)") from None
    return problems


def run_jobs(
    jobs: Sequence[Any], work: Work, *, num_workers: int, show: Callable[[int], None]
) -> Iterator[tuple[Any, Any]]:
    """Do jobs in worker processes; yields each with its result as they come.

    Workers are forked: they share what this process has imported, and start at once. Should this process be
    killed, they end with it. After an error, jobs that are running still come, then it is raised.

    Args:
        show: called now and then with the bytes done.
    """
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    num_workers = max(1, min(num_workers, len(jobs)))
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (work, counter, os.getpid()))
    try:
        futures = {pool.submit(_do, job): job for job in jobs}
        # Read without its lock: a worker may be killed while it holds that.
        yield from _as_completed(futures, lambda: show(counter.get_obj().value))
    except (KeyboardInterrupt, Terminated, GeneratorExit):  # nobody waits for the rest
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_completed(futures: dict[Future[Any], Any], tick: Callable[[], None]) -> Iterator[tuple[Any, Any]]:
    waiting = set(futures)
    failure: BaseException | None = None
    while waiting:
        done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        tick()
        for future in done:
            error = None if future.cancelled() else future.exception()
            if error is None and not future.cancelled():
                yield futures[future], future.result()
            elif failure is None and error is not None:
                failure = error
                for other in waiting:
                    other.cancel()
    if failure is not None:
        raise failure


def _start_worker(work: Work, counter: Any, parent_pid: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid)
    torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
    _Worker.work = work
    _Worker.counter = counter


def _do(job: Any) -> Any:
    return _Worker.work(job, _count)


def _count(num_bytes: int) -> None:
    with _Worker.counter.get_lock():
        _Worker.counter.value += num_bytes


@contextmanager
def _progress(title: str, total: int, done_before: int) -> Iterator[Callable[[int], None]]:
    """A live bar on a terminal, two lines elsewhere. Yields a function that takes the bytes done."""
    console = Console(stderr=True)
    started = time.monotonic()
    if not sys.stderr.isatty():
        again = f" ({done_before / 1e9:.2f} GB are there from before)" if done_before else ""
        console.print(f"{title}: {total / 1e9:.2f} GB{again}", highlight=False, markup=False, soft_wrap=True)
        done = [0]

        def remember(num_bytes: int) -> None:
            done[0] = num_bytes

        yield remember
        elapsed = time.monotonic() - started
        console.print(
            f"{title}: {done[0] / 1e9:.2f} GB in {elapsed:.1f} s ({done[0] / 1e9 / elapsed:.2f} GB/s)",
            highlight=False,
            markup=False,
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        # Its speed is that of this run: bytes from before do not count.
        task = bar.add_task(title, total=total - done_before)
        yield lambda num_bytes: bar.update(task, completed=num_bytes)
