"""Proof that a killed conversion loses nothing: `python tools/kill_conversion.py`.

A random model is converted undisturbed, then again and again with SIGKILL at random moments: at all
processes, the parent alone or one worker alone, sometimes twice in a row. After each kill no process may be
left, and TARGET must not exist or be complete. The same command then goes on, and every file must have the
bytes of the undisturbed conversion. tests/conversion/test_kills.py visits every change of the disk in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tools import random_checkpoint
from tools.killable_run import MARK, kill_all, marked_processes, wait_for_orphans

DIRECTIONS = {"to Megatron": "conversion.hf_to_megatron", "to HF": "conversion.megatron_to_hf"}
SHAPE = {"hidden-size": 1024, "heads": 16, "experts": 32, "expert-size": 512, "vocab-size": 32000}
UNIT_MIB = 16
TIMEOUT_S = 600.0
SECOND_KILL = 0.3
"""Probability."""


class Victim(StrEnum):
    """Who is killed."""

    all = "all"
    parent = "parent"
    worker = "a worker"


@dataclass
class Conversion:
    """A command that may be started again and again."""

    module: str
    source: Path
    target: Path
    mark: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.target.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", self.module, str(self.source), str(self.target)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers=2", f"--unit-mib={UNIT_MIB}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT_S)

    @property
    def _log(self) -> Path:
        return self.target.parent.with_suffix(".log")

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def kill(self, victim: Victim) -> str:
        """Kill now; who was hit."""
        assert self.process is not None
        try:
            parent = psutil.Process(self.process.pid)
            workers = parent.children(recursive=True)
        except psutil.NoSuchProcess:
            return "nobody"
        if self.process.poll() is not None:
            return "nobody"
        if victim is Victim.all:
            kill_all([parent, *workers])
            return f"all {1 + len(workers)}"
        if victim is Victim.worker and workers:
            kill_all(workers[-1:])
            return "a worker"
        kill_all([parent])
        return "the parent"


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    stream, "sha256"
                ).hexdigest()
    return hashes


@dataclass
class Trial:
    """A conversion that was killed, and what came of it."""

    kills: list[str] = field(default_factory=list)
    units_done: list[int] = field(default_factory=list)
    """By the journal, after each kill; 0 once there is the target."""
    problems: list[str] = field(default_factory=list)


def kill_and_resume(
    conversion: Conversion, moments: list[tuple[float, Victim]], expected: dict[str, str]
) -> Trial:
    """Kill it at each moment in turn (seconds after its start), then let it end."""
    trial = Trial()
    target = conversion.target
    for delay_s, victim in moments:
        conversion.start()
        time.sleep(delay_s)
        trial.kills.append(f"{conversion.kill(victim)} after {delay_s:.2f} s")
        status = conversion.wait()
        if orphans := wait_for_orphans(conversion.mark):
            trial.problems.append(f"{len(orphans)} orphans")
            kill_all(orphans)
        trial.units_done.append(_units_done(target))
        if target.exists() and file_hashes(target) != expected:
            trial.problems.append("half a target")
        if target.exists() and _left_beside(target) == []:  # it was killed while its interpreter ended
            status = 0
        if status == 0:
            break
    else:
        conversion.start()
        status = conversion.wait()
    if status != 0:
        trial.problems.append(f"exit status {status}: {conversion.log_tail()}")
    found = file_hashes(target)
    differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if differing:
        trial.problems.append(f"differ: {', '.join(differing[:5])}")
    if left := _left_beside(target):
        trial.problems.append(f"left: {', '.join(left)}")
    return trial


def _left_beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def _units_done(target: Path) -> int:
    journal = target.with_name(f".{target.name}.converting.jsonl")
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0


def prove(
    direction: str, source: Path, folder: Path, num_kills: int, generator: random.Random, mark: str
) -> tuple[Path, bool]:
    """One direction, with a table; returns the undisturbed target and whether all was well."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    folder = folder / direction.replace(" ", "_")
    folder.mkdir()
    undisturbed = Conversion(DIRECTIONS[direction], source, folder / "undisturbed" / "target", mark)
    started = time.monotonic()
    console.print(f"{direction}: undisturbed", style="dim")
    undisturbed.start()
    if undisturbed.wait() != 0:
        raise RuntimeError(f"the undisturbed conversion failed: {undisturbed.log_tail()}")
    wall_s = time.monotonic() - started
    expected = file_hashes(undisturbed.target)
    table = Table("", "killed", "units done", "", title=f"{direction}: {wall_s:.1f} s undisturbed")
    all_well = True
    for number in range(num_kills):
        count = 2 if generator.random() < SECOND_KILL else 1
        moments = [(generator.uniform(0, wall_s), generator.choice(list(Victim))) for _ in range(count)]
        conversion = Conversion(DIRECTIONS[direction], source, folder / f"{number}" / "target", mark)
        trial = kill_and_resume(conversion, moments, expected)
        shutil.rmtree(conversion.target.parent)
        all_well &= not trial.problems
        verdict = f"[red]{'; '.join(trial.problems)}[/]" if trial.problems else "[green]ok[/]"
        console.print(
            f"[dim]{direction}: {number + 1} of {num_kills}:[/] {', then '.join(trial.kills)} {verdict}"
        )
        table.add_row(
            str(number + 1), ", then ".join(trial.kills), ", ".join(map(str, trial.units_done)), verdict
        )
    console.print(table)
    return undisturbed.target, all_well


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="per direction; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="130 MB each; default: %(default)s")
    parser.add_argument("--both", action="store_true", help="the way back to HF as well")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "model"
        shape = [f"--{name}={value}" for name, value in {**SHAPE, "layers": arguments.layers}.items()]
        random_checkpoint.main([str(source), *shape])
        try:
            checkpoint, is_well = prove("to Megatron", source, folder, arguments.kills, generator, mark)
            if arguments.both:
                is_well &= prove("to HF", checkpoint, folder, arguments.kills, generator, mark)[1]
        finally:
            kill_all(marked_processes(mark))
    print("all well" if is_well else "FAILED")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
