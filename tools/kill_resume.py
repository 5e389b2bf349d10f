"""Proof that a killed run loses nothing: `python tools/kill_resume.py`.

A run on two expert-parallel ranks (CPU, fp32, deterministic rollouts) is killed with SIGKILL, all its
processes at once, at random moments, one of them during a save, and started again with the same command each
time; once the supervisor alone is killed, and the others must follow it. The metrics, the rollouts and the
exported weights of that run must equal those of an undisturbed one, bit for bit. Then checkpoints are resumed
under other layouts, where the next step's loss must be that of the layout they were saved under.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.killable_run import Run, kill_all, marked_processes, wait_for_orphans
from tools.tiny_model import write_tiny_moe

NUM_STEPS = 14
SAVE_EVERY_STEPS = 2
RESHARD_STEP = 4
"""The checkpoint that other layouts continue from."""
LOSS_LIMIT = 1e-6
"""Of the loss's difference between layouts; per-token losses are of the order of 1."""
MAX_SAVE_ATTEMPTS = 5

EP2 = ("parallel.data_parallel_size=2", "parallel.expert_parallel_size=2")
_TENSOR2 = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
TP2 = (*_TENSOR2, "parallel.expert_tensor_parallel_size=2")
SINGLE: tuple[str, ...] = ()
TP2_PP2_EP2 = (*_TENSOR2, "parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2")


# -------------------------------------------------------------------------------------------- kills


@dataclass(frozen=True)
class Plan:
    """When to kill: after a delay from the moment that the run has finished `step` (from its start: None)."""

    step: int | None
    delay_s: float = 0.0
    during_save: bool = False
    supervisor_only: bool = False

    def __str__(self) -> str:
        if self.during_save:
            return f"during the save after step {self.step}"
        moment = "the start" if self.step is None else f"step {self.step}"
        return f"{self.delay_s:.2f} s after {moment}"


@dataclass(frozen=True)
class Kill:
    """What was hit."""

    plan: Plan
    last_step: int
    was_saving: bool
    latest: str
    num_processes: int
    orphans: int


def draw_plans(generator: random.Random, num_kills: int) -> list[Plan]:
    """One kill while starting, one during a save, the others anywhere in a step; spread over the run."""
    steps = sorted(generator.sample(range(1, NUM_STEPS - SAVE_EVERY_STEPS), num_kills))
    plans = [Plan(step, delay_s=generator.uniform(0.0, 0.6)) for step in steps]
    start = generator.randrange(1, num_kills)
    plans[start] = Plan(None, delay_s=generator.uniform(1.0, 10.0))
    save = generator.choice([i for i in range(num_kills) if i != start])
    plans[save] = Plan(-(-steps[save] // SAVE_EVERY_STEPS) * SAVE_EVERY_STEPS, during_save=True)
    plans.append(Plan(NUM_STEPS - 2, delay_s=generator.uniform(0.0, 0.3), supervisor_only=True))
    return plans


def kill_once(run: Run, plan: Plan) -> Kill:
    """Start the run, wait for the moment, kill, and see what is left."""
    run.start()
    if plan.step is not None:
        step = plan.step
        run.wait_for(lambda: run.last_step() >= step, f"step {step} was reported")
    assert run.process is not None
    victims = marked_processes(run.mark)
    if plan.during_save:
        run.wait_for(run.is_saving, "it saved a checkpoint")
    else:
        time.sleep(plan.delay_s)
        victims = marked_processes(run.mark)
    if plan.supervisor_only:
        os.kill(run.process.pid, signal.SIGKILL)
    else:
        kill_all(victims)
    run.process.wait()
    if not plan.supervisor_only:
        kill_all(marked_processes(run.mark))  # born while the list was made
    orphans = wait_for_orphans(run.mark)
    kill_all(orphans)
    return Kill(plan, run.last_step(), run.is_saving(), run.latest(), len(victims), len(orphans))


def kill_and_resume(run: Run, plans: list[Plan], report: Callable[[Kill], None]) -> list[Kill]:
    """All kills in turn, then the run to its end."""
    kills: list[Kill] = []
    queue = list(plans)
    while queue:
        plan = queue.pop(0)
        if kills and plan.step is not None:  # what the file holds of steps to be run again does not count
            step = max(plan.step, kills[-1].last_step + 1)
            if plan.during_save:
                step = -(-step // SAVE_EVERY_STEPS) * SAVE_EVERY_STEPS
            plan = Plan(step, plan.delay_s, plan.during_save, plan.supervisor_only)
        kill = kill_once(run, plan)
        kills.append(kill)
        report(kill)
        missed = plan.during_save and not kill.was_saving
        if missed and sum(k.plan.during_save for k in kills) < MAX_SAVE_ATTEMPTS:
            queue.insert(0, plan)
    run.start()
    run.finish()
    return kills


# --------------------------------------------------------------------------------------- comparison


def file_contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def compare(reference: Run, killed: Run) -> list[tuple[str, str, bool]]:
    """(what, verdict, ok) per row."""
    expected, found = reference.metrics(), killed.metrics()
    different = [a["step"] for a, b in zip(expected, found, strict=False) if a != b]
    rows = [
        (
            "metrics.jsonl",
            f"{len(found)} of {len(expected)} lines, different at steps {different or 'none'}",
            expected == found and reference.last_step() == NUM_STEPS,
        )
    ]
    for name, folder, pattern in (("exported weights", "hf", "*"), ("rollouts", "rollouts", "*.jsonl")):
        wanted = file_contents(reference.folder / folder, pattern)
        actual = file_contents(killed.folder / folder, pattern)
        bad = sorted(file for file in {*wanted, *actual} if wanted.get(file) != actual.get(file))
        rows.append((name, f"{len(actual)} files, different: {bad or 'none'}", not bad and bool(wanted)))
    return rows


def find_leftovers(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.rglob(".*") if path.name != ".metadata")


# -------------------------------------------------------------------------------------------- main


class Proof:
    """Runs everything in one folder and remembers whether all was well."""

    def __init__(self, folder: Path, console: Console, mark: str) -> None:
        self.folder = folder
        self.console = console
        self.mark = mark
        self.ok = True
        self.common = self._write_inputs()

    def _write_inputs(self) -> tuple[str, ...]:
        model = self.folder / "model"
        write_tiny_moe(model, num_layers=2)
        prompts = self.folder / "prompts.jsonl"
        pairs = [(a, b) for a in range(6) for b in range(6)]
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs]
        prompts.write_text("\n".join(lines) + "\n")
        return (
            "platform=cpu",
            f"data.train_path={prompts}",
            f"data.eval_path={prompts}",
            f"eval.every_steps={RESHARD_STEP}",
            f"policy.model_path={model}",
            "policy.dtype=fp32",
            "optimizer.lr=1e-3",
            "train.num_updates_per_step=2",  # the second update of a step is off-policy
            "algorithm.advantage=uncentred",
            "reward.name=tools.digit_reward:digit_share",
            "reward.num_workers=1",
            "rollout.deterministic=true",
            "rollout.num_prompts_per_step=8",
            "rollout.num_samples_per_prompt=4",
            "rollout.max_response_tokens=6",
        )

    def run(self, name: str, *overrides: str) -> Run:
        return Run(self.folder / name, (*self.common, *overrides), self.mark)

    def complete(self, name: str, *overrides: str) -> Run:
        run = self.run(name, *overrides)
        with self.console.status(f"run: {name}"):
            run.start()
            run.finish()
        self.console.print(f"{name}: {time.time() - run.started:.0f} s")
        return run

    def verdict(self, ok: bool) -> str:
        self.ok &= ok
        return "[green]ok[/]" if ok else "[red]WRONG[/]"

    def show_kills(self, reference: Run, plans: list[Plan]) -> None:
        steps = (f"train.num_steps={NUM_STEPS}", f"checkpoint.save_every_steps={SAVE_EVERY_STEPS}")
        killed = self.run("killed", *EP2, *steps, "checkpoint.keep_last=1")
        kills = kill_and_resume(killed, plans, lambda kill: self.console.print(f"killed {kill.plan}"))
        table = Table("killed", "steps reported", "saving", "in force", "processes", "orphans", "")
        for kill in kills:
            who = f"{kill.num_processes}" if not kill.plan.supervisor_only else "supervisor only"
            saving = "yes" if kill.was_saving else "no"
            verdict = self.verdict(kill.orphans == 0)
            table.add_row(
                str(kill.plan), str(kill.last_step), saving, kill.latest, who, str(kill.orphans), verdict
            )
        self.console.print(table)
        table = Table("compared with the undisturbed run", "", "")
        hit = any(kill.was_saving for kill in kills)
        table.add_row("a kill during a save", "yes" if hit else "none", self.verdict(hit))
        for what, text, ok in compare(reference, killed):
            table.add_row(what, text, self.verdict(ok))
        leftovers = find_leftovers(killed)
        table.add_row("temporary files left", str(leftovers or "none"), self.verdict(not leftovers))
        saved = sorted(path.name for path in killed.checkpoints.glob("step_*"))
        table.add_row("checkpoints kept", str(saved), self.verdict(saved == [f"step_{NUM_STEPS:06d}"]))
        self.console.print(table)

    def show_layouts(self, ep2: Run) -> None:
        step = RESHARD_STEP + 1
        until = f"train.num_steps={step}"
        single = self.complete("single", until, f"checkpoint.save_every_steps={RESHARD_STEP}")
        table = Table("checkpoint of", "resumed as", f"loss of step {step}", "resumed", "difference", "")
        for name, saved, saved_as, layout in (
            ("TP2", ep2, "EP2", TP2),
            ("single rank", ep2, "EP2", SINGLE),
            ("TP2xPP2xEP2", single, "single rank", TP2_PP2_EP2),
        ):
            path = saved.checkpoints / f"step_{RESHARD_STEP:06d}"
            resumed = self.complete(f"{saved_as} to {name}", *layout, until, f"checkpoint.load_path={path}")
            expected, found = saved.loss(step), resumed.loss(step)
            difference = abs(found - expected)
            ok = difference <= LOSS_LIMIT and abs(expected) > 100 * LOSS_LIMIT
            table.add_row(
                saved_as, name, f"{expected:.9f}", f"{found:.9f}", f"{difference:.1e}", self.verdict(ok)
            )
        self.console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="of the random moments; drawn and printed when not given")
    parser.add_argument(
        "--num-kills", type=int, default=5, help="kills of all processes (default 5, at least 3)"
    )
    parser.add_argument("--folder", type=Path, help="work here and keep everything")
    arguments = parser.parse_args()
    console = Console(width=140)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    console.print(f"seed {seed}")
    mark = uuid.uuid4().hex
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        proof = Proof(arguments.folder or Path(temporary), console, mark)
        try:
            reference = proof.complete(
                "undisturbed",
                *EP2,
                f"train.num_steps={NUM_STEPS}",
                f"checkpoint.save_every_steps={SAVE_EVERY_STEPS}",
                f"checkpoint.keep_last={NUM_STEPS}",
            )
            proof.show_kills(reference, draw_plans(random.Random(seed), arguments.num_kills))
            proof.show_layouts(reference)
        finally:
            kill_all(marked_processes(mark))
    console.print(f"{'all well' if proof.ok else 'FAILED'} after {time.monotonic() - start:.0f} s")
    return 0 if proof.ok else 1


if __name__ == "__main__":
    sys.exit(main())
