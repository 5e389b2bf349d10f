"""Speed and memory of the conversions beside a copy of the same bytes.

    python tools/bench_conversion.py                          # within 8 minutes; 8 GB of disk meanwhile
    python tools/bench_conversion.py FOLDER --output DISK

FOLDER is an HF folder, such as tools/random_checkpoint.py writes; without it a random one is made, of one
layer of Qwen3-30B-A3B's shape (2.5 GB), and deleted at the end. All take turns, so that a busy moment of the
machine meets each; a ratio is the median over turns of the `cp`'s time divided by the own one.
Times are of whole commands, fsync and Python's start included.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import random_checkpoint
from tools.bench_end import run_bench

COPY = "cp_fsync"
TO_MEGATRON = "hf_to_megatron"
TO_HF = "megatron_to_hf"
_SAMPLE_S = 0.05
_MADE = ("--layers", "1")
"""The arguments of random_checkpoint.py."""
_MADE_BYTES = 8e9
"""With all that is made of it, at the most."""


@dataclass
class Row:
    """What was measured of one command, a value per turn."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tree_bytes: list[int] = field(default_factory=list)
    """Peak of the resident memory summed over the command's processes; what they share counts for each."""
    process_bytes: list[int] = field(default_factory=list)
    """Peak of the largest process."""


class MemorySampler(threading.Thread):
    """Watches the resident memory of a process and its descendants until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.tree_bytes = 0
        self.process_bytes = 0

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            sizes = [0]
            with suppress(psutil.Error):  # a process has just ended
                for process in (self._process, *self._process.children(recursive=True)):
                    sizes.append(process.memory_info().rss)
            self.tree_bytes = max(self.tree_bytes, sum(sizes))
            self.process_bytes = max(self.process_bytes, *sizes)
            time.sleep(_SAMPLE_S)


def commands(source: Path, output: Path, peers: list[str], options: str) -> dict[str, tuple[str, Path]]:
    """Name -> shell command and what it reads; each writes to `output` / name."""
    python, work = shlex.quote(sys.executable), {name: output / name for name in (COPY, TO_MEGATRON, TO_HF)}
    copied = shlex.quote(str(work[COPY]))
    checkpoint = work[TO_MEGATRON]
    found = {
        COPY: (f"cp -r {shlex.quote(str(source))} {copied} && sync {copied}/* {copied}", source),
        TO_MEGATRON: (f"{python} -m conversion.hf_to_megatron {source} {checkpoint} {options}", source),
        TO_HF: (f"{python} -m conversion.megatron_to_hf {checkpoint} {work[TO_HF]} {options}", checkpoint),
    }
    for peer in peers:
        name, _, command = peer.partition(":")
        found[name] = command.format(source=source, target=output / name), source
    return found


def set_cache(folder: Path, *, warm: bool) -> None:
    """Have all files of a folder in the page cache, or none of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as stream:
                if warm:
                    while stream.read(2**24):
                        pass
                else:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: str, row: Row) -> None:
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    sampler = MemorySampler(process.pid)
    sampler.start()
    _, errors = process.communicate()
    row.seconds.append(time.perf_counter() - started)
    sampler.join()
    row.tree_bytes.append(sampler.tree_bytes)
    row.process_bytes.append(sampler.process_bytes)
    if process.returncode != 0:
        raise RuntimeError(f"{command}: exit status {process.returncode}: {errors.decode()[-2000:]}")


def run_turns(
    console: Console, found: dict[str, tuple[str, Path]], output: Path, options: argparse.Namespace
) -> list[Row]:
    """One turn at least; no further one that would not fit into the time, as the latest took it."""
    rows = {name: Row(name) for name in found}
    deadline = psutil.Process().create_time() + 60.0 * options.minutes
    repeats = options.repeats
    for turn in range(repeats):
        started = time.time()
        for name, (command, source) in found.items():
            shutil.rmtree(output / name, ignore_errors=True)
            os.sync()
            set_cache(source, warm=options.warm)
            load = os.getloadavg()[0]
            console.print(f"turn {turn + 1} of {repeats}: {name} ... ", end="")
            measure(command, rows[name])
            console.print(f"{rows[name].seconds[-1]:.1f} s (load before: {load:.1f})")
            if name != TO_MEGATRON:  # the way back reads it
                shutil.rmtree(output / name)
        shutil.rmtree(output / TO_MEGATRON)
        if turn + 1 < repeats and 2 * time.time() - started > deadline:
            console.print(f"no time for turn {turn + 2} of {repeats}: --minutes {options.minutes:g}")
            break
    return list(rows.values())


def show(console: Console, rows: list[Row], num_bytes: int) -> None:
    table = Table("", "seconds", "of turns", "GB/s", "speed beside cp", "peak RSS, all processes", "largest")
    copies = next(row for row in rows if row.name == COPY).seconds
    for row in rows:
        seconds = statistics.median(row.seconds)
        ratio = statistics.median(copy / own for copy, own in zip(copies, row.seconds, strict=True))
        table.add_row(
            row.name,
            f"{seconds:.1f}",
            f"{min(row.seconds):.1f} to {max(row.seconds):.1f}",
            f"{num_bytes / seconds / 1e9:.2f}",
            f"{ratio:.2f}x",
            f"{max(row.tree_bytes) / 1e9:.2f} GB",
            f"{max(row.process_bytes) / 1e9:.2f} GB",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="HF folder to convert; default: a random one")
    parser.add_argument(
        "--output", type=Path, help="write below this folder; default: FOLDER's own, or the temporary one"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, help="begin no further turn that would take longer; 8 without a FOLDER"
    )
    parser.add_argument(
        "--warm", action="store_true", help="each command finds its input in the page cache; default: none"
    )
    parser.add_argument("--options", default="", help="for both conversions, such as '--workers 4'")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME:COMMAND",
        help="another converter; its command has {source} and {target}",
    )
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = 8.0 if arguments.folder is None else float("inf")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)

    def measure_all() -> None:
        with ExitStack() as stack:
            source = arguments.folder or make_folder(console, arguments.output, stack)
            bench(console, source.absolute(), arguments)

    return run_bench(measure_all, console)


def make_folder(console: Console, output: Path | None, stack: ExitStack) -> Path:
    """An HF folder that goes with the stack."""
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output)))
    free = shutil.disk_usage(temporary).free
    if free < _MADE_BYTES:
        sys.exit(
            f"{temporary.parent} has {free / 1e9:.1f} GB free, of {_MADE_BYTES / 1e9:.0f} GB needed: --output"
        )
    console.print(f"writing a random model below {temporary}")
    random_checkpoint.main([str(temporary / "model"), *_MADE])
    return temporary / "model"


def bench(console: Console, source: Path, arguments: argparse.Namespace) -> None:
    """All turns, with a table."""
    num_bytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    console.print(
        f"{num_bytes / 1e9:.2f} GB, input {'cached' if arguments.warm else 'not cached'}; {os.cpu_count()} x "
        f"{_cpu_model()}, {psutil.virtual_memory().total / 1e9:.0f} GB; Python {platform.python_version()}, "
        f"torch {version('torch')}, Linux {platform.release()}; load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(dir=arguments.output or source.parent) as output:
        found = commands(source, Path(output), arguments.peer, arguments.options)
        rows = run_turns(console, found, Path(output), arguments)
    show(console, rows, num_bytes)
    console.print(f"load at the end: {os.getloadavg()[0]:.1f}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
