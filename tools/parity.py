"""Proof that the result does not depend on the layout: `python tools/parity.py`.

Three optimizer steps from the same HF weights in fp32, off-policy, with uncentred advantages, on every
layout, with and without recompute and with small and large micro-batches; each is compared with one rank
that has everything in one micro-batch. Ranks are processes on this machine that talk over gloo.

With --matrix: loss, gradients and metrics of one update, of every objective under every layout, compared with
a float64 model and objectives of our own (`parity_matrix.py`); --pairwise runs a quarter of its cases.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from megatron_drpo.config.schema import (
    Advantage,
    AlgorithmConfig,
    Config,
    DataConfig,
    Dtype,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    Recompute,
    TrainConfig,
)
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from megatron_drpo.types import TrainSequence
from tools import parity_matrix
from tools.parity_cases import LAYOUTS as MATRIX_LAYOUTS
from tools.parity_cases import ROWS

NUM_STEPS = 3
NUM_SEQUENCES = 16
LOSS_LIMIT = 1e-5
"""Of |difference of loss| / mean |per-token loss|."""
NORM_LIMIT = 1e-5
"""Of the gradient norm's relative difference, and of each exported weight's in relative norm."""
LOGITS_LIMIT = 1e-4
"""Of max |logits - transformers'|."""
TIME_LIMIT_S = 1200.0

LAYOUTS: dict[str, ParallelConfig] = {
    "single": ParallelConfig(),
    "TP2+SP": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "PP2": ParallelConfig(pipeline_parallel_size=2),
    "PP2xVPP2": ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
    "EP2": ParallelConfig(expert_parallel_size=2, data_parallel_size=2),
    "DP2": ParallelConfig(data_parallel_size=2),
    "CP2": ParallelConfig(context_parallel_size=2),
    "CP2xEP2": ParallelConfig(context_parallel_size=2, expert_parallel_size=2),
    "TP2xCP2xEP2": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, context_parallel_size=2, expert_parallel_size=2
    ),
    "PP2xVPP2xCP2": ParallelConfig(
        pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, context_parallel_size=2
    ),
    "TP2xEP2": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=2),
    "TP2xPP2xEP2": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=2, expert_parallel_size=2
    ),
}
MICRO_BATCH_TOKENS = (4096, 96)
"""Everything in one micro-batch, and many of unequal lengths."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    layout: str
    recompute: Recompute
    max_tokens: int


@dataclass
class Outcome:
    """What one case gives; on global rank 0."""

    losses: list[float]
    grad_norms: list[float]
    mean_token_losses: list[float]
    logits_error: float
    weights: dict[str, torch.Tensor]
    seconds: float


def all_cases() -> list[Case]:
    """Reference first, then every combination."""
    return [
        Case(layout, recompute, max_tokens)
        for layout in LAYOUTS
        for recompute in (Recompute.none, Recompute.full)
        for max_tokens in MICRO_BATCH_TOKENS
    ]


def build_config(case: Case, model_path: str) -> Config:
    """A run's configuration, of which only the policy is used here."""
    return Config(
        data=DataConfig(train_path="unused"),
        train=TrainConfig(num_steps=NUM_STEPS),
        algorithm=AlgorithmConfig(advantage=Advantage.uncentred),
        policy=PolicyConfig(
            model_path=model_path,
            dtype=Dtype.fp32,
            max_tokens_per_micro_batch=case.max_tokens,
            recompute=case.recompute,
            logprob_buffer_bytes=100 * 128 * 4,
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.01, clip_grad=0.5),
        parallel=replace(LAYOUTS[case.layout], timeout_s=300),
    )


# ----------------------------------------------------------------------------------------- one rank


def run_rank(rank: int, num_ranks: int, folder: str, cases: list[Case]) -> None:
    """One of the processes: takes part in every case whose layout has a place for it."""
    from megatron_drpo.platform.base import build_platform

    torch.set_num_threads(1)
    platform = build_platform(build_config(cases[0], folder).platform)
    device = platform.prepare(rank)
    outcomes: list[Outcome] = []
    for number, case in enumerate(cases):
        world_size = LAYOUTS[case.layout].world_size
        if rank < world_size:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
            store = dist.FileStore(f"{folder}/store_{number}", world_size)
            limit = timedelta(seconds=300)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
            outcomes.append(_run_case(case, folder, platform, device))
            dist.barrier()
            dist.destroy_process_group()
            if rank == 0:
                print(f"\r{number + 1}/{len(cases)} {case.layout:16s}", end="", file=sys.stderr, flush=True)
    if rank == 0:
        torch.save([vars(outcome) for outcome in outcomes], f"{folder}/outcomes.pt")


def _run_case(case: Case, folder: str, platform: Any, device: torch.device) -> Outcome:
    from megatron_drpo.metrics.timing import StepTimer
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy
    from megatron_drpo.step.global_batch import iter_global_batches

    start = time.perf_counter()
    config = build_config(case, folder)
    parallel = initialise_parallel(config.parallel, platform.backend, device)
    policy = Policy(config, platform, parallel)
    sequences = load_sequences(folder)[parallel.data_rank :: parallel.data_size]
    reference_logits = torch.load(f"{folder}/logits.pt", weights_only=True)
    [micro_batches] = iter_global_batches(config, policy, sequences)
    outcome = Outcome([], [], [], _logits_error(policy, micro_batches, reference_logits), {}, 0.0)
    for _ in range(NUM_STEPS):
        [micro_batches] = iter_global_batches(config, policy, sequences)
        if parallel.world_size == 1:
            outcome.mean_token_losses.append(_mean_token_loss(policy, micro_batches))
        result = policy.train_step(micro_batches, StepTimer())
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
    outcome.weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    outcome.seconds = time.perf_counter() - start
    return outcome


def _mean_token_loss(policy: Any, micro_batches: list[Any]) -> float:
    """mean |per-token loss| over loss tokens: the scale of the loss's tolerance."""
    values: list[torch.Tensor] = []

    class Observer:
        def begins(self, micro_batch: Any) -> None:
            pass

        def sees(self, micro_batch: Any, rows: Any, tokens: Any, entropy_N: torch.Tensor) -> None:
            values.append(policy.objective.value(tokens, entropy_N).abs().double())

    policy.forward_backward(micro_batches, Observer())
    return float(torch.cat(values).mean())


def _logits_error(policy: Any, micro_batches: list[Any], reference: dict[int, torch.Tensor]) -> float:
    """max |logits - transformers'| over this run's sequences; the same on every rank.

    Only this tool gathers logits; the product never does.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from megatron_drpo.batching.context_parallel import merge_context_parallel
    from megatron_drpo.policy.forward import run_model
    from megatron_drpo.policy.model import unwrap
    from megatron_drpo.policy.schedule import run_schedule

    parallel = policy.parallel
    worst = torch.zeros(1)

    def forward(batches: Any, module: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        micro_batch = next(batches)
        output = run_model(micro_batch, module)

        def compare(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            if policy.config.parallel.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            shard = hidden[:, 0] @ unwrap(module).output_weight().T
            shards = [torch.empty_like(shard) for _ in range(parallel.tensor_size)]
            dist.all_gather(shards, shard.contiguous(), group=parallel.tensor_group)
            pieces = parallel.gather_over_context(torch.cat(shards, dim=1))
            logits = merge_context_parallel(pieces, micro_batch.cu_seqlens)
            bounds = micro_batch.cu_seqlens.tolist()
            for id_, start in zip(micro_batch.sequence_ids, bounds, strict=False):
                expected = reference[id_]
                found = logits[start : start + len(expected), : expected.shape[1]]
                worst[0] = torch.maximum(worst[0], (found - expected).abs().max())
            return worst

        return output, compare

    with torch.no_grad():
        run_schedule(
            forward,
            policy.chunks,
            micro_batches,
            parallel.device,
            forward_only=True,
            collect_non_loss_data=True,
        )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


# ------------------------------------------------------------------------------------- the reference


def write_reference(folder: Path) -> None:
    """The model, the sequences, and transformers' logits of them; in a process of its own."""
    from tools.tiny_model import write_tiny_moe

    model = write_tiny_moe(folder)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    sequences: list[dict[str, Any]] = []
    logits: dict[int, torch.Tensor] = {}
    for number in range(NUM_SEQUENCES):
        prompt_length = int(torch.randint(1, 12, (), generator=generator))
        response_length = int(torch.randint(1, 40, (), generator=generator))
        token_ids = torch.randint(0, vocabulary, (prompt_length + response_length,), generator=generator)
        with torch.no_grad():
            logits[number] = model(token_ids[None]).logits[0]
        logprobs = torch.log_softmax(logits[number][prompt_length - 1 : -1], -1)
        sampled = logprobs.gather(1, token_ids[prompt_length:, None])[:, 0]
        noise = 0.3 * torch.randn(response_length, generator=generator)
        sequences.append(
            {
                "id": number,
                "token_ids": token_ids,
                "prompt_length": prompt_length,
                "advantages": torch.randn((), generator=generator).expand(response_length).clone(),
                "rollout_logprobs": (sampled + noise).clamp(max=-1e-3),
                "loss_mask": torch.rand(response_length, generator=generator) > 0.1,
            }
        )
    torch.save(sequences, folder / "sequences.pt")
    torch.save(logits, folder / "logits.pt")


def load_sequences(folder: str) -> list[TrainSequence]:
    """What `write_reference` wrote."""
    return [TrainSequence(**values) for values in torch.load(f"{folder}/sequences.pt", weights_only=True)]


# ------------------------------------------------------------------------------------------ the table


def compare(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """The four figures of a row, each the worst over steps or tensors."""
    losses = zip(outcome.losses, reference.losses, reference.mean_token_losses, strict=True)
    norms = zip(outcome.grad_norms, reference.grad_norms, strict=True)
    return {
        "loss": max(abs(ours - theirs) / scale for ours, theirs, scale in losses),
        "grad norm": max(abs(ours - theirs) / theirs for ours, theirs in norms),
        "weights": max(
            float((outcome.weights[name].double() - expected).norm() / expected.double().norm())
            for name, expected in reference.weights.items()
        ),
        "logits": outcome.logits_error,
    }


LIMITS = {"loss": LOSS_LIMIT, "grad norm": NORM_LIMIT, "weights": NORM_LIMIT, "logits": LOGITS_LIMIT}


def print_table(cases: list[Case], outcomes: list[Outcome]) -> bool:
    """One row per case; True if every figure is within its limit."""
    table = Table(title=f"{NUM_STEPS} steps in fp32, against one rank with one micro-batch")
    for heading in ("layout", "recompute", "tokens per micro-batch"):
        table.add_column(heading)
    for name, limit in LIMITS.items():
        table.add_column(f"{name}\n<= {limit:.0e}", justify="right")
    table.add_column("s", justify="right")
    table.add_column("")
    holds = True
    for case, outcome in zip(cases, outcomes, strict=True):
        figures = compare(outcome, outcomes[0])
        row_holds = all(figures[name] <= limit for name, limit in LIMITS.items())
        holds &= row_holds
        cells = [f"{figures[name]:.1e}" for name in LIMITS]
        verdict = "[green]ok[/]" if row_holds else "[red]FAILS[/]"
        table.add_row(
            case.layout, case.recompute, str(case.max_tokens), *cells, f"{outcome.seconds:.1f}", verdict
        )
    Console(width=max(100, Console().width)).print(table)
    return holds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="a rank hangs after that")
    parser.add_argument("--matrix", action="store_true")
    matrix = parser.add_argument_group("with --matrix")
    matrix.add_argument("--losses", nargs="+", metavar="NAME", help="rows of the matrix; default: all")
    matrix.add_argument("--pairwise", action="store_true", help="a quarter of them, all pairs of factors")
    matrix.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    arguments = parser.parse_args()
    known = {"layouts": list(MATRIX_LAYOUTS if arguments.matrix else LAYOUTS), "losses": list(ROWS)}
    for option, names in known.items():
        chosen = getattr(arguments, option)
        unknown = [name for name in chosen or [] if name not in names]
        if unknown:
            parser.error(f"--{option} {unknown[0]!r}: unknown; known are {', '.join(map(repr, names))}")
        setattr(arguments, option, chosen or names)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    ignore_expected_warnings()
    if arguments.matrix:
        return parity_matrix.main(arguments)
    chosen = {*arguments.layouts, "single"}
    cases = [case for case in all_cases() if case.layout in chosen]
    num_ranks = max(LAYOUTS[case.layout].world_size for case in cases)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=write_reference, args=(Path(folder),))
        writer.start()
        writer.join()
        ranks: Any = mp.spawn(run_rank, args=(num_ranks, folder, cases), nprocs=num_ranks, join=False)
        deadline = time.monotonic() + arguments.time_limit_s
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                print(f"no result within {arguments.time_limit_s:.0f} s: a rank hangs", file=sys.stderr)
                return 1
        print(file=sys.stderr)
        saved = torch.load(f"{folder}/outcomes.pt", weights_only=True)
    holds = print_table(cases, [Outcome(**values) for values in saved])
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
