"""A run over real SGLang servers that are killed, stopped, cut off and made to fail, again and again.

    python tools/fault_run.py                      # 20 random faults, 2 servers: about 15 minutes on 2 cores
    python tools/fault_run.py --faults kill@generate stop@sync failure@sync

Faults strike while a server works on a request, of generation or of a weight update: kill -9, SIGSTOP, a TCP
reset, HTTP 500. Afterwards it must hold that the run completed; that every prompt was trained exactly once,
in order, with all its samples; that every token carries the policy version of its step, and that the
trainer's own logprobs of it say the same; and that no process is left. Needs `make sglang-env`. Exit status 1
if something does not hold.

The trainer replays the experts that the servers chose (policy.routing_replay=rollout). Where a router's
logits are equal within rounding, server and trainer may choose different experts under the same weights, and
the logprobs of that token and of those after it differ by up to 0.1, as with stale weights. With the experts
replayed only other weights are left as a reason. What the trainer's routers would have chosen otherwise is
counted and shown: of five such models of 4 layers, 15 of 2.9 million tokens decoded in a batch of 32 went to
other experts than in whole sequences, which is one tie in about seven runs of this tool.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_drpo.data.seeding import seeded_permutation
from tools.chaos_server import Fault, Plan, is_claimed, plan_fault, withdraw_fault, write_interpreter
from tools.killable_run import Run, kill_all, marked_processes, wait_for_orphans
from tools.tiny_model import write_tiny_moe

ROOT = Path(__file__).parents[1]
PATHS = {
    "generate": ("/generate",),
    "sync": ("/pause_generation", "/begin_weight_update", "/update_weights_from_", "/end_weight_update"),
}
PROMPTS = "examples/data/arithmetic_train.jsonl"
NUM_PROMPTS, NUM_SAMPLES = 8, 4
NUM_LAYERS = 4
"""Of the model, each with experts."""
MAX_MISMATCH = 1e-5
"""Mean |logprobs - rollout_logprobs| of a step in fp32: tokens of other weights differ by far more."""
MAX_TOKEN_MISMATCH = 1e-4
"""|logprob - rollout_logprob| of any token: one token of other weights is seen among hundreds."""
MIN_AGREEMENT = 0.999
"""Share of a step's experts that the trainer's routers would have chosen too: ties are far rarer than this,
other weights or another router are not."""
FAULT_TIMEOUT_S = 900.0
"""Two servers may have to start anew, each in 30 s on two idle cores and in minutes on busy ones."""
PAUSE_S = 0.5

console = Console(highlight=False)


@dataclass(slots=True)
class Outcome:
    """What happened, and what should not have."""

    faults: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_choices: int = 0
    """Of routers: tokens times layers."""
    num_ties: int = 0
    """Of them, where the trainer's router would have chosen other experts than the server's did."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", nargs="+", metavar="FAULT@WHEN", help="instead of random ones")
    parser.add_argument("--num-faults", type=int, default=20)
    parser.add_argument("--num-servers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "fault_run")
    arguments = parser.parse_args()
    faults = arguments.faults or random_faults(arguments.num_faults, arguments.seed)
    outcome = run(arguments.folder, faults, num_servers=arguments.num_servers, seed=arguments.seed)
    show(outcome)
    return 1 if outcome.problems else 0


def random_faults(count: int, seed: int) -> list[str]:
    """Names like kill@sync; every kind about equally often, half of them in a weight update."""
    generator = random.Random(seed)
    kinds = [f"{fault}@{when}" for fault in Fault for when in PATHS]
    names = [kinds[index % len(kinds)] for index in range(count)]
    generator.shuffle(names)
    return names


def run(folder: Path, faults: list[str], *, num_servers: int, seed: int) -> Outcome:
    """The run and its harm; `folder` gets the model, the run folder and logs."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    write_tiny_moe(model, num_layers=NUM_LAYERS, seed=seed)
    chaos = folder / f"chaos_{uuid.uuid4().hex[:6]}"
    chaos.mkdir()
    python = write_interpreter(chaos, ROOT / ".venv-sglang" / "bin" / "python")
    mark = uuid.uuid4().hex
    num_steps = 2 * len(faults) + 3
    job = Run(folder / f"run_{mark[:6]}", overrides(model, python, num_servers, num_steps, seed), mark)
    outcome, started = Outcome(num_steps=num_steps), time.monotonic()
    job.start()
    try:
        harm(job, chaos, faults, seed, outcome)
        job.finish()
    except RuntimeError as error:
        outcome.problems.append(str(error))
    finally:
        outcome.seconds = time.monotonic() - started
        if job.process is not None and job.process.poll() is None:
            kill_all(marked_processes(mark))
    if not outcome.problems:
        outcome.problems += find_problems(job, num_steps, seed)
        outcome.num_choices, outcome.num_ties = count_ties(job.metrics())
    orphans = wait_for_orphans(mark)
    outcome.problems += [f"process {orphan.pid} is left: {orphan.cmdline()}" for orphan in orphans]
    kill_all(orphans)
    return outcome


def overrides(model: Path, python: Path, num_servers: int, num_steps: int, seed: int) -> tuple[str, ...]:
    return (
        "platform=cpu",
        f"seed={seed}",
        f"data.train_path={PROMPTS}",
        f"policy.model_path={model}",
        "policy.dtype=fp32",
        "policy.routing_replay=rollout",
        "rollout.engine=sglang",
        f"rollout.sglang.python={python}",
        "rollout.sglang.context_length=128",
        "rollout.sglang.max_total_tokens=16384",
        f"rollout.fleet.num_servers={num_servers}",
        "rollout.fleet.health_interval_s=2",
        "rollout.fleet.health_timeout_s=20",
        "rollout.fleet.max_failures=100",
        "rollout.fleet.restart_backoff_s=0.1",
        "rollout.startup_timeout_s=600",
        f"rollout.num_prompts_per_step={NUM_PROMPTS}",
        f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
        "rollout.max_response_tokens=16",
        "rollout.num_retries=10",
        "weight_sync.timeout_s=15",
        f"train.num_steps={num_steps}",
        "reward.name=tools.digit_reward:digit_share",
        "reward.num_workers=1",
        "optimizer.lr=1e-3",
        "checkpoint.export_hf=false",
        "metrics.tensorboard=false",
        f"metrics.num_rollouts_dumped={NUM_PROMPTS * NUM_SAMPLES}",
    )


def harm(job: Run, chaos: Path, faults: list[str], seed: int, outcome: Outcome) -> None:
    """Plan one fault after the other, each at another step than the one before."""
    generator = random.Random(seed)
    job.wait_for(lambda: job.last_step() >= 1, "the first step")
    for number, name in enumerate(faults):
        kind, _, when = name.partition("@")
        plan = Plan(number, Fault(kind), generator.choice(PATHS[when]))
        step = job.last_step()
        plan_fault(chaos, plan)
        deadline = time.monotonic() + FAULT_TIMEOUT_S
        while not is_claimed(chaos, plan):
            assert job.process is not None
            if job.process.poll() is not None or time.monotonic() > deadline:
                withdraw_fault(chaos)
                raise RuntimeError(
                    f"fault {number} ({name}) found no request; the run's end:\n{job.log_tail()}"
                )
            time.sleep(0.05)
        outcome.faults.append(f"{name} {plan.path}")
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] step {step}: {name} {plan.path}")
        deadline = time.monotonic() + FAULT_TIMEOUT_S
        while job.last_step() <= step and job.process is not None and job.process.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no step within {FAULT_TIMEOUT_S:g} s after {name}:\n{job.log_tail()}")
            time.sleep(PAUSE_S)


def find_problems(job: Run, num_steps: int, seed: int) -> list[str]:
    """What does not hold of a run that has ended."""
    problems = []
    order = seeded_permutation(len((ROOT / PROMPTS).read_text().splitlines()), seed, 0)
    for step in range(1, num_steps + 1):
        path = job.folder / "rollouts" / f"step_{step:06}.jsonl"
        records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = order[(step - 1) * NUM_PROMPTS : step * NUM_PROMPTS]
        wanted = [(prompt, index) for prompt in prompts for index in range(NUM_SAMPLES)]
        found = [(record["prompt_id"], record["sample_index"]) for record in records]
        if found != wanted:
            problems.append(f"step {step} trained {found}, not {wanted}")
        versions = {version for record in records for version, _ in record["policy_versions"]}
        if versions != {step - 1}:
            problems.append(f"step {step} trained tokens of policy versions {sorted(versions)}")
    return problems + find_mismatches(job.metrics())


def find_mismatches(metrics: list[dict[str, Any]]) -> list[str]:
    """Steps with tokens that were not sampled by the weights that trained them."""
    problems = []
    for record in metrics:
        mean, largest = record["mismatch/logprob_abs_mean"], record["mismatch/logprob_abs_max"]
        if mean > MAX_MISMATCH or largest > MAX_TOKEN_MISMATCH:
            problems.append(
                f"step {record['step']}: |logprobs - rollout_logprobs| is {mean:.2g} on average and at most "
                f"{largest:.2g}, with the server's experts"
            )
        if record["routing/agreement"] < MIN_AGREEMENT:
            problems.append(
                f"step {record['step']}: {1 - record['routing/agreement']:.2%} of the routers' choices are "
                "not the server's: too many for ties"
            )
    return problems


def count_ties(metrics: list[dict[str, Any]]) -> tuple[int, int]:
    """Choices of the routers, of which a sequence's last token has none; those that are not the server's."""
    num_choices = num_ties = 0
    for record in metrics:
        choices = NUM_LAYERS * int(record["data/num_tokens"] - record["data/num_samples"])
        num_choices += choices
        num_ties += round((1 - record["routing/agreement"]) * choices)
    return num_choices, num_ties


def show(outcome: Outcome) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("faults", str(len(outcome.faults)))
    table.add_row("steps", str(outcome.num_steps))
    table.add_row("router ties", f"{outcome.num_ties} of {outcome.num_choices:,} choices fell differently")
    table.add_row("time", f"{outcome.seconds:.0f} s")
    console.print(table)
    for problem in outcome.problems:
        console.print(f"[red]problem[/] {problem}")
    if not outcome.problems:
        console.print(
            "[green]all well[/]: completed; every prompt once, every token of its step's version, no orphan"
        )


if __name__ == "__main__":
    sys.exit(main())
