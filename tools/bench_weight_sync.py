"""Time and memory of a weight sync beside a plain gloo broadcast of the same bytes.

    python tools/bench_weight_sync.py                         # needs `make sglang-env`; within 10 minutes
    python tools/bench_weight_sync.py FOLDER [URL ...]

FOLDER is an HF folder, such as tools/tiny_model.py writes; the URLs are SGLang servers of it. What is not
given is made, in a temporary folder that is deleted: a random model of 529 MB in fp32 whose experts have the
size of Qwen3-30B-A3B's, and two servers. Measured with the first server alone and with all. The plain
broadcast goes to as many processes that do nothing else; all take turns, so that a busy moment of the machine
meets each. Times are medians of whole pushes: pause, buckets, version, continue. Memory is what the pushing
process took beyond the model it holds, at the peak.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.errors import WeightSyncError
from megatron_drpo.fleet.build import build_fleet
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weights.hf_folder import HfFolder
from tools.bench_end import run_bench
from tools.tiny_model import write_tiny_moe

Tensors = list[tuple[str, torch.Tensor]]
_PLAIN = "plain broadcast"
_WAYS = ("distributed", "distributed+checksum", "tensor", "disk")
_NUM_SLOW_TURNS = 2
"""Of the tensor path, which takes seconds."""
_TIMEOUT = timedelta(seconds=120)
_MODEL = {"num_layers": 6, "hidden_size": 1024, "num_experts": 8, "expert_size": 768}
_NUM_SERVERS = 2
console = Console(width=110, highlight=False)


class PlainBroadcast:
    """Rank 0 of a gloo group with `num_receivers` processes.

    Receivers allocate a buffer for each part, as SGLang does; the whole in one part, into one they keep.
    """

    def __init__(self, num_receivers: int, num_bytes: int, part_bytes: int) -> None:
        self._parts = torch.ones(num_bytes, dtype=torch.uint8).split(part_bytes)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        ranks = [str(rank) for rank in range(1, num_receivers + 1)]
        arguments = [str(store.port), str(num_receivers + 1), str(num_bytes), str(part_bytes)]
        self._receivers = [
            subprocess.Popen([sys.executable, __file__, "--receive", rank, *arguments]) for rank in ranks
        ]
        self._group: Any = dist.ProcessGroupGloo(store, 0, num_receivers + 1, timeout=_TIMEOUT)

    def run(self) -> None:
        """Until the last receiver has all bytes."""
        for part in self._parts:
            _broadcast(self._group, part)
        self._group.barrier().wait()

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.kill()
            receiver.wait()


def receive(rank: int, port: int, world_size: int, num_bytes: int, part_bytes: int) -> None:
    """A receiver of `PlainBroadcast`; runs until it is killed."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
    group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout=timedelta(hours=1))
    whole = torch.zeros(num_bytes, dtype=torch.uint8)
    while True:
        if part_bytes >= num_bytes:
            _broadcast(group, whole)
        else:
            for start in range(0, num_bytes, part_bytes):
                part = torch.empty(min(part_bytes, num_bytes - start), dtype=torch.uint8)
                _broadcast(group, part)
        group.barrier().wait()


def _broadcast(group: Any, data: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([data], options).wait()


class Pushes:
    """One way to push, again and again."""

    def __init__(
        self, folder: Path, run_dir: Path, tensors: Tensors, endpoints: list[str], path: str, **settings: Any
    ) -> None:
        config = WeightSyncConfig(path=WeightSyncPath(path), **settings)
        self._pusher = WeightPusher(config, model_path=folder, run_dir=run_dir)
        self._tensors = tensors
        self._endpoints = endpoints
        self._version = int(time.time())

    def run(self) -> None:
        """One push of the whole model."""
        self._version += 1
        report = self._pusher.push(iter(self._tensors), self._version, self._endpoints)
        if report.failed:
            raise WeightSyncError("; ".join(report.failed.values()))

    def close(self) -> None:
        self._pusher.close()


def measure_peak(call: Callable[[], None]) -> int:
    """Bytes of resident memory that a call took beyond what was there before, at its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def bench(folder: Path, tensors: Tensors, endpoints: list[str], arguments: argparse.Namespace) -> Table:
    """The table of one set of servers."""
    num_bytes = sum(tensor.nbytes for _, tensor in tensors)
    bucket_bytes = arguments.bucket_mib * 2**20
    with tempfile.TemporaryDirectory(dir=arguments.run_dir) as run_dir:

        def make(path: str, *, verify_every: int = 0) -> Pushes:
            settings = {"bucket_bytes": bucket_bytes, "verify_every": verify_every}
            return Pushes(folder, Path(run_dir), tensors, endpoints, path, **settings)

        ways: dict[str, PlainBroadcast | Pushes] = {
            _PLAIN: PlainBroadcast(len(endpoints), num_bytes, num_bytes),
            "plain, in buckets": PlainBroadcast(len(endpoints), num_bytes, bucket_bytes),
        }
        for name in arguments.ways:
            path, _, checks = name.partition("+")
            ways[name] = make(path, verify_every=1 if checks else 0)
        peaks: dict[str, int] = {}
        for name, way in ways.items():
            say(f"{len(endpoints)} server(s): memory of {name}")
            peaks[name] = measure_peak(way.run)  # warms up as well
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.num_repeats):
            say(f"{len(endpoints)} server(s): turn {turn + 1} of {arguments.num_repeats}")
            for name, way in ways.items():
                if turn >= _NUM_SLOW_TURNS and name == "tensor":
                    continue
                start = time.perf_counter()
                way.run()
                seconds[name].append(time.perf_counter() - start)
        for way in ways.values():
            way.close()
    title = f"{len(endpoints)} server(s), {num_bytes / 1e6:.0f} MB, buckets of {arguments.bucket_mib} MiB"
    table = Table(title=title)
    for column in ("way", "seconds", "GB/s", "x plain", "peak extra, buckets"):
        table.add_column(column, justify="left" if column == "way" else "right")
    base = statistics.median(seconds[_PLAIN])
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{median:.2f} ({min(values):.2f} to {max(values):.2f})"
        peak = "" if name.startswith("plain") else f"{peaks[name] / bucket_bytes:.2f}"
        table.add_row(name, spread, f"{num_bytes / median / 1e9:.2f}", f"{base / median:.2f}", peak)
    return table


def say(text: str) -> None:
    """What happens, with the time."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", soft_wrap=True)


def start_servers(model: Path, folder: Path, stack: ExitStack) -> list[str]:
    """Their endpoints; they end with the stack.

    Raises:
        RolloutError: one does not start.
    """
    say(f"starting {_NUM_SERVERS} SGLang servers")
    config = load_config(
        [
            *("platform=cpu", f"policy.model_path={model}", "policy.dtype=fp32", "data.train_path=none"),
            *(f"run_dir={folder}", "rollout.engine=sglang", f"rollout.fleet.num_servers={_NUM_SERVERS}"),
            *("rollout.sglang.context_length=512", "rollout.sglang.max_total_tokens=4096"),
            *("rollout.startup_timeout_s=300", "rollout.fleet.health_interval_s=600"),  # not amid a push
        ]
    )
    return stack.enter_context(build_fleet(config)).endpoints


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="HF folder; default: a random model")
    parser.add_argument("endpoints", nargs="*", help="servers of it; default: two are started")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=_WAYS)
    parser.add_argument("--bucket-mib", type=int, default=62)
    parser.add_argument("--num-repeats", type=int, default=7)
    parser.add_argument(
        "--run-dir", type=Path, help="where the disk path writes; default: a temporary folder"
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Make what is not given, measure, and delete it."""
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = arguments.folder
        if model is None:
            model = temporary / "model"
            say(f"writing a random model to {model}")
            write_tiny_moe(model, **_MODEL)
        endpoints = arguments.endpoints or start_servers(model, temporary, stack)
        folder = HfFolder(model)
        tensors = [(name, folder.get(name).clone()) for name in folder]
        info = httpx.get(f"{endpoints[0]}/server_info", trust_env=False).json()
        console.print(
            f"torch {torch.__version__}, SGLang {info.get('version')}, Python {platform.python_version()}, "
            f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
        )
        for count in sorted({1, len(endpoints)}):
            console.print(bench(model, tensors, endpoints[:count], arguments))


def main() -> int:
    if sys.argv[1:2] == ["--receive"]:
        receive(*map(int, sys.argv[2:]))
    arguments = parse_arguments()
    torch.set_num_threads(1)
    return run_bench(lambda: run(arguments), console)


if __name__ == "__main__":
    sys.exit(main())
