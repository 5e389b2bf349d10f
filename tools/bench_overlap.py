"""What sampling ahead of training saves: synchronous and one-step-off beside each other.

    python tools/bench_overlap.py                      # ends within 6 minutes; needs `make sglang-env`
    python tools/bench_overlap.py --minutes 20 --repeats 5

The same steps over the same server, with prompts so long that sampling and training take about equally long:
a first run, whose prompts grow from step to step, finds that length. Then a synchronous step takes the sum of
both, and with rollout.max_staleness=1 it should take little more than the longer of the two. Runs take turns;
medians over their steps. On a machine so busy that the time is over first, the last run is cut short.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from rich.console import Console
from rich.table import Table

from megatron_drpo.config.io import load_config
from megatron_drpo.fleet.build import build_fleet
from tools.bench_end import run_bench
from tools.tiny_model import write_tiny_moe

ROOT = Path(__file__).parents[1]
NUM_STEPS, NUM_WARM_UP = 11, 3
MIN_STEPS = 2
"""Measured ones that a run cut short must have."""
NUM_SAMPLES = 8
MAX_PROMPT_TOKENS = 440
TRIAL_LENGTHS = (40, 40, 80, 160, 240, 320, MAX_PROMPT_TOKENS)
"""Of the prompts of each step; the first warms up."""
END_S = 25.0
"""Kept free for ending the processes."""
NAMES = {0: "synchronous", 1: "one-step-off"}
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of one step, or medians over those of a run, in seconds."""

    step: float
    rollout: float
    """Waited for; in a synchronous run all of the sampling."""

    @property
    def train(self) -> float:
        """All but the rollout: rewards, update, weight sync."""
        return self.step - self.rollout

    @classmethod
    def median(cls, times: Sequence[StepTimes]) -> StepTimes:
        return cls(median(t.step for t in times), median(t.rollout for t in times))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["embedded", "sglang"], default="sglang")
    parser.add_argument("--minutes", type=float, default=6.0, help="in all; default: %(default)g")
    parser.add_argument(
        "--repeats", type=int, default=2, help="of each kind, if time allows; default: %(default)s"
    )
    parser.add_argument("--num-prompts", type=int, default=16, help="per step; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, help="found by trial if not given")
    parser.add_argument("--response-tokens", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_overlap")
    arguments = parser.parse_args()
    return run_bench(Bench(arguments).measure, console, kept=f"its logs are in {arguments.folder}")


def crossing(lengths: Sequence[int], times: Sequence[StepTimes]) -> int:
    """The length at which sampling takes as long as the rest, between those tried; else the nearest to it.

    A server computes a prompt once, the trainer with each of its samples: the rest grows faster.
    """
    excess = [t.rollout - t.train for t in times]
    for (short, above), (long, below) in pairwise(zip(lengths, excess, strict=True)):
        if above >= 0.0 > below:
            return round(short + (long - short) * above / (above - below))
    return lengths[0] if excess[0] < 0.0 else lengths[-1]


class Bench:
    """Runs of one model over one server, before a deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.deadline = psutil.Process().create_time() + 60.0 * options.minutes - END_S
        self.num_runs = 0

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.time()

    def measure(self) -> None:
        """All of it, with a table.

        Raises:
            DrpoError: the server does not start.
        """
        options = self.options
        write_tiny_moe(self.folder / "model")
        say(f"starting a server ({options.engine}); its log and those of the runs are in {self.folder}")
        config = load_config([*self.arguments(), f"run_dir={self.folder / 'server'}", "data.train_path=none"])
        with build_fleet(config) as fleet:
            endpoint = f"rollout.fleet_file={fleet.path}"
            length = options.prompt_tokens or self.find_length(endpoint)
            runs: dict[int, list[StepTimes]] = {0: [], 1: []}
            for turn in range(options.repeats):
                started = time.monotonic()
                for staleness, name in NAMES.items():
                    what = f"{name}, run {turn + 1} of {options.repeats}"
                    times = self.run(what, [length] * NUM_STEPS, staleness, endpoint)
                    measured = times[NUM_WARM_UP : NUM_STEPS - 1]
                    if len(measured) < MIN_STEPS:
                        sys.exit(
                            f"{what}: only {len(times)} steps, of which {NUM_WARM_UP} warm up; the machine "
                            f"is too busy for --minutes {options.minutes:g}"
                        )
                    runs[staleness].append(StepTimes.median(measured))
                if turn + 1 < options.repeats and self.remaining_s < time.monotonic() - started:
                    say(f"no time for run {turn + 2} of {options.repeats}: --minutes {options.minutes:g}")
                    break
        show(f"{options.num_prompts} prompts of {length} tokens x {NUM_SAMPLES} samples", runs)

    def find_length(self, endpoint: str) -> int:
        """By a run whose prompts grow."""
        times = self.run("looking for the length of prompts", TRIAL_LENGTHS, 0, endpoint)
        if len(times) < len(TRIAL_LENGTHS):
            sys.exit(f"the machine is too busy for --minutes {self.options.minutes:g}")
        return crossing(TRIAL_LENGTHS[1:], times[1:])

    def run(self, what: str, lengths: Sequence[int], staleness: int, endpoint: str) -> list[StepTimes]:
        """Of each step that ended before the deadline; one with prompts of each length."""
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        say(f"{what}: starting a trainer")
        command = [
            *(sys.executable, "-m", "megatron_drpo.cli", "train", *self.arguments(), endpoint),
            *(f"run_dir={run_dir}", f"data.train_path={self.write_prompts(lengths)}", "data.shuffle=false"),
            *(f"rollout.max_staleness={staleness}", f"train.num_steps={len(lengths)}"),
            *("checkpoint.export_hf=false", "metrics.tensorboard=false", "weight_sync.verify_every=0"),
            *("reward.name=tools.digit_reward:digit_share", "reward.num_workers=1", "optimizer.lr=1e-6"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = self.folder / "run.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        times: list[StepTimes] = []
        try:
            while process.poll() is None and self.remaining_s > 0:
                self.follow(run_dir, what, lengths, times)
                time.sleep(0.1)
            self.follow(run_dir, what, lengths, times)
            if process.poll() not in (0, None):
                sys.exit(f"{what}: the run failed:\n{log.read_text()[-4000:]}")
        finally:
            process.terminate()
            process.wait()
        return times

    def follow(self, run_dir: Path, what: str, lengths: Sequence[int], times: list[StepTimes]) -> None:
        """Take over, and say, what the run has written since."""
        path = run_dir / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        for line in lines[len(times) :]:
            if not line.endswith("\n"):
                break
            record: dict[str, Any] = json.loads(line)
            times.append(StepTimes(record["time/step_s"], record["time/rollout_s"]))
            say(
                f"{what}: step {len(times)} of {len(lengths)}, prompts of {lengths[len(times) - 1]} tokens: "
                f"rollout {times[-1].rollout:.2f} s, the rest {times[-1].train:.2f} s"
            )

    def arguments(self) -> list[str]:
        """What the server and all runs share."""
        options = self.options
        return [
            *("platform=cpu", f"policy.model_path={self.folder / 'model'}", "policy.dtype=fp32"),
            *(f"rollout.engine={options.engine}", "rollout.embedded.num_threads=1"),
            *("rollout.sglang.context_length=512", "rollout.sglang.max_total_tokens=65536"),
            f"rollout.startup_timeout_s={max(self.remaining_s, 1.0):.0f}",
            *(f"rollout.num_prompts_per_step={options.num_prompts}",),
            f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
            f"rollout.max_response_tokens={options.response_tokens}",
            *("rollout.max_concurrent_requests=1024", "rollout.embedded.num_slots=1024"),
        ]

    def write_prompts(self, lengths: Sequence[int]) -> Path:
        """Distinct prompts of so many characters, which are tokens, for each step; others for every run, so
        that none finds its prefixes computed."""
        path = self.folder / "prompts.jsonl"
        self.num_runs += 1
        chance = random.Random(self.num_runs)
        count = self.options.num_prompts
        texts = ("".join(chance.choices("0123456789", k=n - 1)) + "=" for n in lengths for _ in range(count))
        path.write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in texts))
        return path


def say(text: str) -> None:
    """What happens, with the time."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", soft_wrap=True)


def show(what: str, runs: dict[int, list[StepTimes]]) -> None:
    synchronous = StepTimes.median(runs[0])
    ahead = median(t.step for t in runs[1])
    table = Table(title=f"{what} per step, {os.cpu_count()} cores")
    for column in ("", "step, s", "of max(rollout, train)"):
        table.add_column(column, justify="left" if not column else "right")
    longest = max(synchronous.rollout, synchronous.train)
    table.add_row("rollout", f"{synchronous.rollout:.2f}", "")
    table.add_row("train: all the rest", f"{synchronous.train:.2f}", "")
    table.add_row("synchronous step", f"{synchronous.step:.2f}", f"{synchronous.step / longest:.2f}x")
    table.add_row("one-step-off step", f"{ahead:.2f}", f"{ahead / longest:.2f}x")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
