"""What sampling ahead of training saves: synchronous and one-step-off beside each other.

    python tools/bench_overlap.py [--engine sglang] [--repeats 3]

The same steps over the same server, with prompts so long that sampling and training take about equally long:
then a synchronous step takes their sum, and with rollout.max_staleness=1 it should take little more than the
longer of the two. Medians over the steps of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from tools.tiny_model import write_tiny_moe

ROOT = Path(__file__).parents[1]
NUM_STEPS, NUM_WARM_UP = 12, 3
NUM_SAMPLES = 8
MAX_PROMPT_TOKENS = 440
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over the steps of one run, in seconds."""

    step: float
    rollout: float
    """Waited for; in a synchronous run all of the sampling."""

    @property
    def train(self) -> float:
        """All but the rollout: rewards, update, weight sync."""
        return self.step - self.rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=["embedded", "sglang"], default="sglang")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=16, help="per step")
    parser.add_argument("--prompt-tokens", type=int, help="found by trial if not given")
    parser.add_argument("--response-tokens", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_overlap")
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, arguments.engine, arguments.num_prompts, arguments.response_tokens)
    prompt_tokens = arguments.prompt_tokens or bench.equalise()
    runs: dict[int, list[StepTimes]] = {0: [], 1: []}
    for _ in range(arguments.repeats):
        for staleness in runs:
            runs[staleness].append(bench.run(prompt_tokens, staleness))
    show(f"{arguments.num_prompts} prompts of {prompt_tokens} tokens x {NUM_SAMPLES} samples", runs)


class Bench:
    """Runs of one model with one kind of server."""

    def __init__(self, folder: Path, engine: str, num_prompts: int, response_tokens: int) -> None:
        self.folder = folder
        self.engine = engine
        self.num_prompts = num_prompts
        self.response_tokens = response_tokens
        write_tiny_moe(folder / "model")

    def equalise(self) -> int:
        """The length of prompts for which sampling takes about as long as the rest: a server computes a
        prompt once, the trainer with each of its samples."""
        prompt_tokens = 100
        for _ in range(5):
            times = self.run(prompt_tokens, 0, num_steps=6)
            console.print(
                f"{prompt_tokens} prompt tokens: rollout {times.rollout:.2f} s, the rest {times.train:.2f} s",
                style="dim",
            )
            ratio = times.rollout / times.train
            if 0.9 < ratio < 1.11:
                break
            prompt_tokens = max(4, min(MAX_PROMPT_TOKENS, round(prompt_tokens * min(max(ratio, 0.5), 2.0))))
        return prompt_tokens

    def write_prompts(self, num_tokens: int) -> Path:
        """Distinct prompts of so many characters, which are tokens."""
        path = self.folder / "prompts.jsonl"
        chance = random.Random(0)
        texts = ("".join(chance.choices("0123456789", k=num_tokens - 1)) + "=" for _ in range(512))
        path.write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in texts))
        return path

    def run(self, prompt_tokens: int, staleness: int, num_steps: int = NUM_STEPS) -> StepTimes:
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "megatron_drpo.cli", "train", "platform=cpu", f"run_dir={run_dir}"),
            f"data.train_path={self.write_prompts(prompt_tokens)}",
            *(f"policy.model_path={self.folder / 'model'}", "policy.dtype=fp32"),
            *(f"rollout.engine={self.engine}", f"rollout.max_staleness={staleness}"),
            *("rollout.sglang.context_length=512", "rollout.sglang.max_total_tokens=65536"),
            *("rollout.startup_timeout_s=300", "rollout.embedded.num_threads=1"),
            *(
                f"rollout.num_prompts_per_step={self.num_prompts}",
                f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
            ),
            *(f"rollout.max_response_tokens={self.response_tokens}", f"train.num_steps={num_steps}"),
            *("rollout.max_concurrent_requests=1024", "rollout.embedded.num_slots=1024"),
            *("reward.name=tools.digit_reward:digit_share", "reward.num_workers=1", "optimizer.lr=1e-6"),
            *("checkpoint.export_hf=false", "metrics.tensorboard=false", "weight_sync.verify_every=0"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"the run failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines][min(NUM_WARM_UP, num_steps - 2) : -1]
        return StepTimes(
            median(step["time/step_s"] for step in steps), median(step["time/rollout_s"] for step in steps)
        )


def show(what: str, runs: dict[int, list[StepTimes]]) -> None:
    synchronous = StepTimes(median(t.step for t in runs[0]), median(t.rollout for t in runs[0]))
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
    main()
