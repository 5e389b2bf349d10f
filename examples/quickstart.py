"""A tiny Qwen3-MoE learns to add, from random weights, on two CPU cores: `make quickstart`.

1. Random weights and a tokenizer with one token per character.
2. Warm start (`train.mode=sft`): it imitates demonstrations of which 30 % are right (see
   tools/make_arithmetic.py), so that is how often it is right afterwards.
3. DRPO: two trainer ranks (expert parallel) and one rollout server. Only the reward says what is right.
4. `transformers` loads the exported model in a process of its own and must reach the same accuracy.

`--shuffle-rewards` is the negative control: the same run with rewards permuted among the samples of a step.
`--engine sglang` has a real SGLang server sample; on a model this small it is slower than the embedded one.
Ends with exit status 1 and the reasons if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

ROOT = Path(__file__).parents[1]
HELD_OUT = "examples/data/arithmetic_held_out.jsonl"
NUM_EXPORT_SAMPLES = 4
"""Per held-out prompt, as in the trainer's evaluation."""

SGLANG_OVERRIDES = (
    "rollout.engine=sglang",
    "rollout.deterministic=false",  # on a CPU SGLang cannot be
    "rollout.sglang.context_length=64",
    "rollout.sglang.max_total_tokens=65536",
    "rollout.startup_timeout_s=300",
)

MAX_ACCURACY_BEFORE = 0.4
MIN_ACCURACY_AFTER = 0.9
MAX_CONTROL_RISE = 0.05
MAX_OVERHEAD = 0.05
MAX_MISMATCH = 1e-5
NOISE_SIGMAS = 4.0

console = Console(highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run reached. Accuracies: sampled at temperature 1, mean over the held-out prompts."""

    before: float
    after: float
    num_eval_samples: int
    overhead: float
    """Share of a step's time outside rollout, reward, forward/backward and optimizer; median over the steps,
    because on a busy machine a single step may wait seconds for other processes."""
    mismatch: float
    """Mean |logprobs - rollout_logprobs| before a step's first update; median over the steps, because in a
    single one a router whose logits are equal within rounding may choose other experts than the server's."""
    exported: float
    num_export_samples: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shuffle-rewards", action="store_true", help="the negative control")
    parser.add_argument(
        "--engine", choices=["embedded", "sglang"], default="embedded", help="sglang: after `make sglang-env`"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    arguments = parser.parse_args()
    started = time.monotonic()
    name = "quickstart" + ("_shuffled" if arguments.shuffle_rewards else "")
    folder = Path("runs") / (name if arguments.engine == "embedded" else f"{name}_{arguments.engine}")
    outcome = run(
        folder, seed=arguments.seed, shuffle_rewards=arguments.shuffle_rewards, engine=arguments.engine
    )
    problems = find_problems(outcome, is_control=arguments.shuffle_rewards)
    show(outcome, folder / "rl", problems, seconds=time.monotonic() - started)
    return 1 if problems else 0


def run(folder: Path, *, seed: int, shuffle_rewards: bool, engine: str) -> Outcome:
    """All four stages; `folder` is made anew."""
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    title(1, "random weights")
    python(
        "tools/tiny_model.py",
        f"{folder}/random",
        "--num-layers=3",
        "--hidden-size=128",
        "--num-experts=4",
        "--expert-size=64",
        f"--seed={seed}",
    )
    title(2, "warm start on demonstrations, 30 % of them right")
    train("warm_start", folder, seed, f"policy.model_path={folder}/random")
    title(3, "DRPO" + (" with shuffled rewards" if shuffle_rewards else ""))
    train(
        "rl",
        folder,
        seed,
        f"policy.model_path={folder}/warm_start/hf",
        f"reward.shuffle={str(shuffle_rewards).lower()}",
        *(SGLANG_OVERRIDES if engine == "sglang" else ()),
    )
    title(4, "the export, loaded by transformers")
    report = python(
        "examples/quickstart/hf_accuracy.py",
        f"{folder}/rl/hf",
        HELD_OUT,
        str(NUM_EXPORT_SAMPLES),
        capture=True,
    )
    exported: dict[str, Any] = json.loads(report)
    steps = [json.loads(line) for line in (ROOT / folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [step for step in steps if "eval/accuracy" in step]
    return Outcome(
        before=evaluations[0]["eval/accuracy"],
        after=evaluations[-1]["eval/accuracy"],
        num_eval_samples=int(evaluations[-1]["eval/num_samples"]),
        overhead=median(step["time/overhead_share"] for step in steps if "time/overhead_share" in step),
        mismatch=median(
            step["mismatch/first_update_logprob_abs_mean"]
            for step in steps
            if "mismatch/first_update_logprob_abs_mean" in step
        ),
        exported=exported["accuracy"],
        num_export_samples=exported["num_samples"],
    )


def title(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}/4[/] [bold]{text}[/]")


def train(stage: str, folder: Path, seed: int, *overrides: str) -> None:
    """`megatron-drpo train` with examples/quickstart/<stage>.yaml."""
    python(
        "-m",
        "megatron_drpo.cli",
        "train",
        f"config=examples/quickstart/{stage}.yaml",
        f"run_dir={folder}/{stage}",
        f"seed={seed}",
        *overrides,
    )


def python(*arguments: str, capture: bool = False) -> str:
    """Run it in the repository's root; what it printed if `capture`. A failure ends the quickstart."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode != 0:
        sys.exit(f"quickstart: this command failed, see above: python {' '.join(arguments)}")
    return done.stdout or ""


def find_problems(outcome: Outcome, *, is_control: bool) -> list[str]:
    """The targets missed, in words."""
    problems = []
    if outcome.before > MAX_ACCURACY_BEFORE:
        problems.append(f"accuracy before RL is {outcome.before:.1%}, above {MAX_ACCURACY_BEFORE:.0%}")
    if is_control and outcome.after > outcome.before + MAX_CONTROL_RISE:
        problems.append(f"accuracy rose to {outcome.after:.1%} although the rewards were shuffled")
    if not is_control and outcome.after < MIN_ACCURACY_AFTER:
        problems.append(f"accuracy after RL is {outcome.after:.1%}, below {MIN_ACCURACY_AFTER:.0%}")
    if outcome.overhead > MAX_OVERHEAD:
        problems.append(
            f"the trainer's overhead is {outcome.overhead:.1%} of the step, above {MAX_OVERHEAD:.0%}"
        )
    if outcome.mismatch > MAX_MISMATCH:
        problems.append(
            f"trainer and server disagree by {outcome.mismatch:.1e} per logprob, more than {MAX_MISMATCH:.0e}"
        )
    variance = outcome.after * (1 - outcome.after)
    noise = math.sqrt(variance / outcome.num_eval_samples + variance / outcome.num_export_samples)
    if abs(outcome.exported - outcome.after) > NOISE_SIGMAS * noise:
        problems.append(
            f"the exported model's accuracy, {outcome.exported:.1%}, is not the trainer's, "
            f"{outcome.after:.1%}: sampling explains {NOISE_SIGMAS * noise:.1%}"
        )
    return problems


def show(outcome: Outcome, run_dir: Path, problems: list[str], *, seconds: float) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("[dim]held-out accuracy[/]", f"[bold]{outcome.before:.1%} → {outcome.after:.1%}[/]")
    table.add_row("[dim]the export, with transformers[/]", f"{outcome.exported:.1%}")
    table.add_row(
        "[dim]train/rollout mismatch[/]",
        f"{outcome.mismatch:.1e} per logprob (median of the steps)",
    )
    table.add_row("[dim]trainer overhead[/]", f"{outcome.overhead:.1%} of a step's time (median)")
    table.add_row("[dim]time[/]", f"{int(seconds) // 60} min {int(seconds) % 60} s")
    table.add_row()
    table.add_row("[dim]curves and gradient weights[/]", f"{run_dir}/report.png")
    table.add_row("[dim]rollouts to read[/]", f"{run_dir}/rollouts/index.html")
    table.add_row("[dim]all curves[/]", f".venv/bin/tensorboard --logdir {run_dir}")
    table.add_row("[dim]the model[/]", f"{run_dir}/hf")
    verdict, colour = ("quickstart failed", "red") if problems else ("quickstart done", "green")
    console.print()
    console.print(Panel.fit(table, title=f"[bold]{verdict}[/]", border_style=colour, padding=(1, 2)))
    for problem in problems:
        console.print(f"[red]missed:[/] {problem}")


if __name__ == "__main__":
    sys.exit(main())
