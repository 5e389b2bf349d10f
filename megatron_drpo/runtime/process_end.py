"""How processes end: children with their parent, whatever ended it, and a command by SIGTERM with a word."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SUPERVISOR_PID = "MEGATRON_DRPO_SUPERVISOR_PID"
"""Environment variable of ranks that were started by the supervisor, which is their parent."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
_STDERR = 2
"""Its descriptor, whatever sys.stderr is at present."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is dead, even by SIGKILL.

    Linux ties a child to the *thread* that started it: start children in a thread that lives as long as its
    process. https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

    Args:
        parent_pid: as the parent knows it. If it died before this call, this process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


class Terminated(BaseException):
    """A signal asks the program to end. Like KeyboardInterrupt it passes those who catch an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number
        """As a shell gives for a process that the signal killed."""


@contextmanager
def ends_at_once_on_sigterm(when: str) -> Iterator[None]:
    """While the program has nothing to clean up: SIGTERM writes one line and ends it, also amid an import.

    Args:
        when: completes "ended by SIGTERM ".
    """

    def end(number: int, _: FrameType | None) -> None:
        # Not an exception: an import may swallow it, or be left in pieces and complain. Nor a buffered write,
        # which may not begin within another.
        os.write(_STDERR, f"{Terminated(number)} {when}\n".encode())
        os._exit(128 + number)

    with _on_sigterm(end):
        yield


@contextmanager
def ends_in_order_on_sigterm(kept: Callable[[], str]) -> Iterator[None]:
    """SIGTERM raises `Terminated` in the body, once, so that everything in it is cleaned up.

    Args:
        kept: what the interrupted work leaves and how it goes on, for `tell_end`; called when SIGTERM or
            Ctrl-C has left the body.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up is under way
        raise Terminated(number)

    with _on_sigterm(end):
        try:
            yield
        except (KeyboardInterrupt, Terminated) as error:
            if words := kept():
                error.add_note(words)
            raise


def tell_end(error: KeyboardInterrupt | Terminated) -> int:
    """Write the one line that says what ended the program and what is kept; the exit status."""
    what, status = (
        ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else (str(error), error.status)
    )
    print("; ".join([what, *getattr(error, "__notes__", ())]), file=sys.stderr)
    return status


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python handles no signal there
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
