"""The parity matrix: every objective under every layout, its loss, gradients and metrics against float64.

`python tools/parity.py --matrix`. The gradients of one update in fp32, on ranks that are processes on this
machine and talk over gloo, against a model and objectives of our own in float64 on one process
(`reference_model.py`, `reference_objective.py`, `reference_metrics.py`). Ranks and process groups are started
once, a layout's policy is built once, and the objective is exchanged from case to case; weights stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as host
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from rich.console import Console
from rich.table import Table

from megatron_drpo.config.schema import Anchor
from tools.parity_cases import LAYOUTS, ROWS, Case, build_config, full_product, pairwise
from tools.parity_data import load_sequences, write_reference

LIMITS = {"loss": 1e-6, "gradient": 1e-5, "norm": 1e-5, "metric": 1e-5}
"""loss: |difference| / mean |term|, the mean aggregated like the loss. gradient: relative difference in norm,
the worst HF tensor. norm: relative difference of the global gradient norm that is clipped by. metric:
|difference| / max(1, |value|), the worst metric, lists entry by entry."""
COLLECTIVE_LIMIT_S = 600


@dataclass(frozen=True)
class Outcome:
    """The figures of a case and what the worst ones are of."""

    case: Case
    figures: dict[str, float]
    worst_tensor: str
    worst_metric: str
    seconds: float

    @property
    def share_of_limit(self) -> float:
        """The worst figure in units of its limit; above 1, or not finite: failed."""
        shares = [self.figures[name] / limit for name, limit in LIMITS.items()]
        return max(shares) if all(map(math.isfinite, shares)) else math.inf


# ----------------------------------------------------------------------------------------- one rank


def run_rank(rank: int, folder: str, cases: list[Case]) -> None:
    """One of the processes: takes part in every layout that has a place for it."""
    from megatron_drpo.platform.base import build_platform

    torch.set_num_threads(1)
    path = Path(folder)
    platform = build_platform(build_config(cases[0], path).platform)
    device = platform.prepare(rank)
    outcomes: list[Outcome] = []
    done = 0
    for layout, layers in dict.fromkeys((case.layout, case.layers) for case in cases):
        of_layout = [case for case in cases if (case.layout, case.layers) == (layout, layers)]
        done += len(of_layout)
        world_size = LAYOUTS[layout].parallel.world_size
        if rank >= world_size:
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        store = dist.FileStore(f"{folder}/store_{layout}_{layers}", world_size)
        limit = timedelta(seconds=COLLECTIVE_LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        report = _progress(f"{layout}, {layers}", done - len(of_layout), len(cases)) if rank == 0 else None
        outcomes += _run_layout(of_layout, path, platform, device, report)
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        (path / "outcomes.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def _progress(policy: str, done: int, total: int) -> Callable[[int], None]:
    def report(number: int) -> None:
        end = "\n" if done + number == total else ""
        print(f"\r{done + number}/{total} {policy:32s}", end=end, file=sys.stderr, flush=True)

    return report


def _run_layout(
    cases: list[Case], folder: Path, platform: Any, device: torch.device, report: Callable[[int], None] | None
) -> list[Outcome]:
    """Outcomes on global rank 0; empty elsewhere."""
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy

    config = build_config(cases[0], folder)
    parallel = initialise_parallel(config.parallel, platform.backend, device)
    # A coefficient, so that the reference policy is there for the rows that need it.
    with_reference = replace(config.algorithm, kl=replace(config.algorithm.kl, coef=1.0))
    policy = Policy(replace(config, algorithm=with_reference), platform, parallel)
    models = folder / LAYOUTS[cases[0].layout].model
    sequences = load_sequences(models)[parallel.data_rank :: parallel.data_size]
    results = torch.load(models / "results.pt", weights_only=True) if parallel.is_main else {}
    outcomes = []
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        found = _run_case(policy, case, folder, sequences)
        if parallel.is_main:
            outcomes.append(compare(case, found, results[case.row], time.perf_counter() - start))
        if report is not None:
            report(number)
    return outcomes


def _run_case(policy: Any, case: Case, folder: Path, sequences: list[Any]) -> dict[str, Any]:
    """Loss, gradients, their norm and metrics of one update that is not taken."""
    from megatron_drpo.losses.objective import build_objective
    from megatron_drpo.metrics.diagnostics import summarise
    from megatron_drpo.policy.optimizer import compute_gradient_norm
    from megatron_drpo.step.global_batch import iter_global_batches
    from tools.gradients import gather_gradients

    policy.config = build_config(case, folder)
    algorithm = policy.config.algorithm
    policy.objective = build_objective(algorithm)
    batches = list(iter_global_batches(policy.config, policy, sequences))
    if algorithm.kl.coef or algorithm.anchor is Anchor.recomputed:
        batches = policy.add_logprobs(batches)
    [micro_batches] = batches
    if algorithm.anchor is Anchor.recomputed:
        # The policy has not been updated, so its own logprobs would make every ratio 1.
        micro_batches = [replace(m, old_logprobs_T=m.ref_logprobs_T) for m in micro_batches]
    loss, diagnostics, _ = policy.reduce(policy.forward_backward(micro_batches))
    return {
        "loss": loss,
        "norm": compute_gradient_norm(policy.optimizer),
        "gradients": gather_gradients(policy),
        "metrics": summarise(diagnostics),
    }


def compare(case: Case, found: dict[str, Any], expected: dict[str, Any], seconds: float) -> Outcome:
    """Hold what one rank gathered against the reference."""
    assert found["gradients"].keys() == expected["gradients"].keys()
    missing = found["metrics"].keys() ^ expected["metrics"].keys()
    assert not missing, f"{case}: metrics on one side only: {sorted(missing)}"
    tensors = {
        name: float((found["gradients"][name].double() - gradient).norm() / gradient.norm())
        for name, gradient in expected["gradients"].items()
    }
    metrics = {
        name: _metric_error(found["metrics"][name], value) for name, value in expected["metrics"].items()
    }
    norm = math.hypot(*(float(gradient.norm()) for gradient in expected["gradients"].values()))
    worst_tensor, worst_metric = max(tensors, key=_of(tensors)), max(metrics, key=_of(metrics))
    return Outcome(
        case=case,
        figures={
            "loss": abs(found["loss"] - expected["loss"]) / expected["scale"],
            "gradient": tensors[worst_tensor],
            "norm": abs(found["norm"] - norm) / norm,
            "metric": metrics[worst_metric],
        },
        worst_tensor=worst_tensor,
        worst_metric=worst_metric,
        seconds=seconds,
    )


def _of(errors: dict[str, float]) -> Callable[[str], float]:
    """A key for `max` by which NaN is the worst."""
    return lambda name: math.inf if math.isnan(errors[name]) else errors[name]


def _metric_error(found: Any, expected: Any) -> float:
    if not isinstance(expected, list):
        found, expected = [found], [expected]
    if len(found) != len(expected):
        return math.inf
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------- all ranks


def run_matrix(cases: list[Case], time_limit_s: float) -> list[Outcome]:
    """Start the reference and the ranks, wait for them.

    Raises:
        TimeoutError: they have not finished in time, a rank hangs; all are killed.
    """
    deadline = time.monotonic() + time_limit_s
    rows = list(dict.fromkeys(case.row for case in cases))
    models = list(dict.fromkeys(LAYOUTS[case.layout].model for case in cases))
    num_ranks = max(LAYOUTS[case.layout].parallel.world_size for case in cases)
    with tempfile.TemporaryDirectory() as folder:
        print("float64 reference ...", file=sys.stderr, flush=True)
        _join(mp.spawn(_write_references, (models, folder, rows), len(models), join=False), deadline)
        _join(mp.spawn(run_rank, (folder, cases), num_ranks, join=False), deadline)
        saved = json.loads(Path(folder, "outcomes.json").read_text())
    return [_outcome(values) for values in saved]


def _outcome(values: dict[str, Any]) -> Outcome:
    return Outcome(**(values | {"case": Case(**values["case"])}))


def _write_references(number: int, models: list[str], folder: str, rows: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    write_reference(models[number], Path(folder), rows)


def _join(processes: Any, deadline: float) -> None:
    """Until all have ended; an error in one is raised here and ends the others."""
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError("no result in time: a rank hangs")


# ----------------------------------------------------------------------------------------- the tables


def worst_outcomes(outcomes: list[Outcome]) -> dict[tuple[str, str], Outcome]:
    """(row, layout) -> the worst of its cases."""
    worst: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.case.row, outcome.case.layout)
        if key not in worst or outcome.share_of_limit > worst[key].share_of_limit:
            worst[key] = outcome
    return worst


def _worst(outcomes: list[Outcome], figure: str) -> Outcome:
    return max(outcomes, key=lambda outcome: outcome.figures[figure])


def summary_lines(outcomes: list[Outcome], command: str) -> list[str]:
    """What was run, with what, and the worst of each figure."""
    cases = [outcome.case for outcome in outcomes]
    lines = [
        "Each cell: the worst figure of its cases in units of its limit (1 = at the limit).",
        f"Limits: loss {LIMITS['loss']:.0e} of mean |term|; each gradient tensor {LIMITS['gradient']:.0e} in "
        f"relative norm; the global norm {LIMITS['norm']:.0e}; each metric {LIMITS['metric']:.0e} of "
        f"max(1, |value|).",
        f"{len(cases)} cases: {len({c.row for c in cases})} objectives, {len({c.layout for c in cases})} "
        f"layouts, {len({c.layers for c in cases})} kinds of layers, "
        f"{len({c.split for c in cases})} splits into micro-batches, "
        f"{len({c.mode for c in cases})} modes of the logprob op; fp32 against float64.",
    ]
    for name in LIMITS:
        worst = _worst(outcomes, name)
        what = {"gradient": f", {worst.worst_tensor}", "metric": f", {worst.worst_metric}"}.get(name, "")
        lines.append(
            f"Worst {name}: {worst.figures[name]:.1e} ({worst.case.row}; {worst.case.layout}{what})."
        )
    versions = [f"{package} {version(package)}" for package in ("megatron-core", "torch")]
    lines.append(f"{', '.join(versions)}, Python {host.python_version()}, gloo. `{command}`")
    return lines


def _headings(worst: dict[tuple[str, str], Outcome]) -> tuple[list[str], list[str]]:
    """Rows and columns that there are, in the order of their definition."""
    rows, layouts = (set(names) for names in zip(*worst, strict=True))
    return [row for row in ROWS if row in rows], [layout for layout in LAYOUTS if layout in layouts]


def markdown(outcomes: list[Outcome], command: str) -> str:
    """The table for a README."""
    worst = worst_outcomes(outcomes)
    rows, layouts = _headings(worst)
    lines = [f"| objective | {' | '.join(layouts)} |", f"|---{'|---' * len(layouts)}|"]
    for row in rows:
        cells = [_cell(worst.get((row, layout))) for layout in layouts]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in summary_lines(outcomes, command)), ""])


def print_table(outcomes: list[Outcome], command: str) -> None:
    """The same on a terminal, failures in red and explained."""
    worst = worst_outcomes(outcomes)
    rows, layouts = _headings(worst)
    table = Table(title="Parity matrix")
    table.add_column("objective")
    for layout in layouts:
        table.add_column(layout, justify="right")
    for row in rows:
        cells = []
        for layout in layouts:
            outcome = worst.get((row, layout))
            has_failed = outcome is not None and outcome.share_of_limit > 1
            cells.append(f"[red]{_cell(outcome)}[/]" if has_failed else _cell(outcome))
        table.add_row(row, *cells)
    console = Console(width=max(150, Console().width))
    console.print(table)
    for line in summary_lines(outcomes, command):
        console.print(line, highlight=False)
    for outcome in failures(outcomes):
        console.print(f"[red]FAILS[/] {describe(outcome)}", highlight=False)


def _cell(outcome: Outcome | None) -> str:
    return "" if outcome is None else f"{outcome.share_of_limit:.2f}"


def failures(outcomes: list[Outcome]) -> list[Outcome]:
    """Cases with a figure beyond its limit."""
    return [outcome for outcome in outcomes if not outcome.share_of_limit <= 1]


def describe(outcome: Outcome) -> str:
    """One line: the case and its figures."""
    case = outcome.case
    figures = ", ".join(f"{name} {value:.1e}" for name, value in outcome.figures.items())
    return (
        f"{case.row}; {case.layout}; {case.layers}; {case.split} micro-batch(es); {case.mode}: {figures} "
        f"({outcome.worst_tensor}; {outcome.worst_metric})"
    )


def main(arguments: argparse.Namespace) -> int:
    """Exit status: 1 if a figure exceeds its limit or the time limit has passed."""
    select = pairwise if arguments.pairwise else full_product
    cases = select(arguments.losses, arguments.layouts)
    command = " ".join(["python", *sys.argv])
    try:
        outcomes = run_matrix(cases, arguments.time_limit_s)
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(outcomes, command)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(outcomes, command), encoding="utf-8")
    return 1 if failures(outcomes) else 0
