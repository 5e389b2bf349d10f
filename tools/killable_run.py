"""Runs that are started as a user starts them, and can be killed with everything they started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "MEGATRON_DRPO_KILL_RESUME"
"""Environment variable by which all processes of a run are recognised, orphans included."""
TRAIN = (sys.executable, "-m", "megatron_drpo.cli", "train")
TIMES = ("time/", "throughput/")
RUN_TIMEOUT_S = 1200.0
ORPHAN_TIMEOUT_S = 10.0


@dataclass
class Run:
    """A run directory and the command that works on it; `start` may be called again after a kill."""

    folder: Path
    overrides: tuple[str, ...]
    mark: str
    started: float = 0.0
    """When it was started last, as files' times are counted."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*TRAIN, f"run_dir={self.folder}", *self.overrides],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            )

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll without sleeping long: a save of a tiny model takes a few hundredths of a second."""
        assert self.process is not None
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended before {what}; the end of its output:\n{self.log_tail()}")
            if time.time() - self.started > RUN_TIMEOUT_S:
                raise RuntimeError(f"no {what} within {RUN_TIMEOUT_S:g} s:\n{self.log_tail()}")
            time.sleep(0.0005)

    def finish(self) -> None:
        """Wait until the run has ended well."""
        assert self.process is not None
        status = self.process.wait(RUN_TIMEOUT_S)
        if status != 0:
            raise RuntimeError(f"exit status {status}; the end of its output:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def last_step(self) -> int:
        """Of metrics.jsonl; 0 before the first line."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def is_saving(self) -> bool:
        """There is an unfinished checkpoint from after the last start: what earlier kills left is older."""
        for path in self.checkpoints.glob(".partial_step_*"):
            with suppress(FileNotFoundError):  # just finished
                if path.stat().st_mtime >= self.started:
                    return True
        return False

    def latest(self) -> str:
        pointer = self.checkpoints / "latest"
        return pointer.read_text().strip() if pointer.is_file() else "none"

    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock measured."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if not name.startswith(TIMES)}
            for line in lines
        ]

    def loss(self, step: int) -> float:
        [loss] = [float(record["loss/value"]) for record in self.metrics() if record["step"] == step]
        return loss


def marked_processes(mark: str) -> list[psutil.Process]:
    """All living processes started by this tool, orphans included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or is somebody else's
            continue
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_for_orphans(mark: str) -> list[psutil.Process]:
    """Give the processes of a killed run time to end; those that did not."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
