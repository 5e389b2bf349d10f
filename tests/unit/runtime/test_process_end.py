"""A child dies with its parent, even when the parent is killed; what SIGTERM does to the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_drpo.runtime.process_end import (
    Terminated,
    ends_at_once_on_sigterm,
    ends_in_order_on_sigterm,
    tell_end,
)

_PARENT = """
import os, subprocess, sys
command = [sys.executable, "-c", sys.argv[1], str(os.getpid())]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
_CHILD = """
import sys, time
from megatron_drpo.runtime.process_end import die_with_parent
die_with_parent(int(sys.argv[1]))
print("tied", flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    """Of a process that is not a child of this one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(30)
def test_a_child_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, _CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    program = "from megatron_drpo.runtime import process_end as p; p.die_with_parent(1); print('still here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_sigterm_at_once() -> None:
    """Also where a handler's exception would be lost, as in an import that catches everything."""
    program = """
import os, signal
from megatron_drpo.runtime.process_end import ends_at_once_on_sigterm
with ends_at_once_on_sigterm("before anything was written"):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert (done.stdout, done.stderr) == ("", "ended by SIGTERM before anything was written\n")


def test_sigterm_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Once: what is cleaned up after it is not interrupted again."""
    before = signal.getsignal(signal.SIGTERM)
    events = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            events.append("went on")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            events.append("cleaned up")

    with pytest.raises(Terminated) as caught, ends_in_order_on_sigterm(lambda: f"{events} is kept"):
        work()
    assert signal.getsignal(signal.SIGTERM) is before
    assert tell_end(caught.value) == 143
    assert capsys.readouterr().err == "ended by SIGTERM; ['cleaned up'] is kept\n"


def test_ctrl_c_says_what_is_kept_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, ends_in_order_on_sigterm(lambda: "all is kept"):
        raise KeyboardInterrupt
    assert tell_end(caught.value) == 130
    assert capsys.readouterr().err == "interrupted; all is kept\n"


def test_nothing_to_say_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, ends_in_order_on_sigterm(lambda: ""):
        raise KeyboardInterrupt
    tell_end(caught.value)
    assert capsys.readouterr().err == "interrupted\n"


def test_threads_leave_signals_alone() -> None:
    """Python handles signals in the main thread alone."""
    before = signal.getsignal(signal.SIGTERM)

    def run() -> object:
        with ends_at_once_on_sigterm("now"), ends_in_order_on_sigterm(lambda: ""):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run).result() is before
