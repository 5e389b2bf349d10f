"""SIGTERM at several moments of a command: one line, the right exit status, and nothing left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(240)]

AT_ONCE = "ended by SIGTERM before anything was started or written\n"


class Command:
    """`megatron-drpo` as a process of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._err = folder / "err"
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_drpo.cli", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=err,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200.0
        while not condition():
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def handles_sigterm(self) -> bool:
        """The kernel's word; before it the interpreter itself starts."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def has_loaded(self, library: str) -> bool:
        return library in Path(f"/proc/{self.process.pid}/maps").read_text()

    def terminate(self) -> None:
        """The process, and what becomes of those that it started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []

    @property
    def end(self) -> tuple[int | None, str]:
        """Exit status and errors, but for what a CUDA build of torch says of a machine without a GPU while a
        rank imports it."""
        lines = self.stderr.splitlines(keepends=True)
        told = "".join(line for line in lines if "] No CUDA runtime is found" not in line)
        return self.process.returncode, told


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """`start("train", ...)`."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        command = Command(list(arguments), tmp_path)
        started.append(command)
        return command

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


@pytest.mark.parametrize("command", ["train", "check", "fleet up"])
@pytest.mark.parametrize("library", ["", "libtorch"])
def test_while_modules_are_imported(
    start: Callable[..., Command],
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
    command: str,
    library: str,
) -> None:
    """At the first moment at which the program can answer, and within torch's import."""
    running = start(*command.split(), *run_arguments())
    running.wait_for(running.handles_sigterm)
    if library:
        running.wait_for(lambda: running.has_loaded(library))
    running.terminate()
    assert running.end == (143, AT_ONCE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "kept"),
    [("train", "{run} has no complete checkpoint"), ("fleet up", "its servers have ended, too")],
)
def test_while_servers_start(
    start: Callable[..., Command],
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
    command: str,
    kept: str,
) -> None:
    running = start(*command.split(), *run_arguments())
    running.wait_for((tmp_path / "run" / "logs" / "rollout_server_0.log").exists)
    running.terminate()
    assert running.end == (143, f"ended by SIGTERM; {kept.format(run=tmp_path / 'run')}\n")
    assert not (tmp_path / "run" / "fleet.json").exists()


@pytest.mark.distributed
def test_while_two_ranks_train(
    start: Callable[..., Command], run_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Their launcher, and Python's tracker of semaphores, have nothing to say; the checkpoint is named."""
    layout = ["parallel.data_parallel_size=2", "parallel.expert_parallel_size=2"]
    running = start("train", *run_arguments("train.num_steps=1000", "checkpoint.save_every_steps=1", *layout))
    latest = tmp_path / "run" / "checkpoints" / "latest"
    running.wait_for(latest.exists)
    running.terminate()
    time.sleep(1.0)  # the trackers end after those they watch
    kept = f"{latest.parent / latest.read_text().strip()} is kept; the same command goes on from it"
    assert running.end == (143, f"ended by SIGTERM; {kept}\n")
