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
from megatron_drpo.lifetime import die_with_parent

Work = Callable[[Unit, Callable[[int], None]], dict[str, Any]]
"""Does one unit and returns its record; calls the second argument with the bytes of every piece done."""

_POLL_S = 0.2


class _Worker:
    """What a worker process has inherited from its parent."""

    work: Work
    counter: Any


def run_units(
    units: Sequence[Unit], work: Work, workspace: Workspace, *, num_workers: int, title: str
) -> None:
    """Do all units that are not in the workspace's journal yet.

    Workers are forked: they share what this process has imported, and start at once. Should this process be
    killed, they end with it.

    Raises:
        ConversionError: a worker was killed. Any error of `work` is raised as it is. Either way the journal
            holds what was finished.
    """
    todo = [unit for unit in units if unit.index not in workspace.done]
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        max(1, min(num_workers, len(todo))), context, _start_worker, (work, counter, os.getpid())
    )
    futures: dict[Future[dict[str, Any]], Unit] = {}
    try:
        futures = {pool.submit(_do, unit): unit for unit in todo}
        total = sum(unit.num_bytes for unit in units)
        with _progress(title, total, workspace.num_bytes_done) as show:
            for unit, record in _as_completed(futures, lambda: show(counter.value)):
                workspace.record(unit.index, record)
            show(counter.value)
    except BrokenProcessPool:
        raise ConversionError(
            "a worker process was killed (out of memory?): "
            f"{len(workspace.done)} of {len(units)} units are done; the same command goes on from there"
        ) from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_completed(
    futures: dict[Future[dict[str, Any]], Unit], tick: Callable[[], None]
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Finished units as they come. After an error those that are running still come, then it is raised."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(parent_pid)
    _Worker.work = work
    _Worker.counter = counter


def _do(unit: Unit) -> dict[str, Any]:
    return _Worker.work(unit, _count)


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
        console.print(f"{title}: {total / 1e9:.2f} GB{again}", highlight=False)
        done = [0]

        def remember(num_bytes: int) -> None:
            done[0] = num_bytes

        yield remember
        elapsed = time.monotonic() - started
        console.print(
            f"{title}: {done[0] / 1e9:.2f} GB in {elapsed:.1f} s ({done[0] / 1e9 / elapsed:.2f} GB/s)",
            highlight=False,
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
