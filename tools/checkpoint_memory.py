"""Memory that a checkpoint takes on each rank, beside the model: `python tools/checkpoint_memory.py`.

A tiny random MoE on a few ranks of this machine; tensors made during a save and a load are counted (see
`memory_meter.py`) and compared with the rank's own share: its part of fp32 parameters and both moments, and
of the weights, as if all were spread evenly over its data-parallel ranks. A save may take that and one
bucket, a load the weights of the rank's part of the model as well. On a GPU the share is host memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from megatron_drpo.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    ParallelConfig,
    PolicyConfig,
)
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from tools.memory_meter import MemoryMeter

LAYOUTS: dict[str, ParallelConfig] = {
    "DP4": ParallelConfig(data_parallel_size=4),
    "EP2xDP4": ParallelConfig(expert_parallel_size=2, data_parallel_size=4),
    "TP2xEP2": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=2, data_parallel_size=2
    ),
    "PP2": ParallelConfig(pipeline_parallel_size=2, data_parallel_size=2),
}
STATE_BYTES = 12
"""Per parameter: the fp32 main parameter and both moments of AdamW."""
EXCHANGE_NUMEL = 2**14
"""The exchange's unit is made small as the model is."""
TIME_LIMIT_S = 300


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    held: int
    """Weights and optimizer state of all parameters of this rank's part of the model, over all replicas."""
    weights: int
    """All weights of this rank's part of the model."""
    share: int
    bucket: int
    """The largest single parameter or the exchange's unit, with its optimizer state and weights."""
    save_peak: int
    load_peak: int

    @property
    def holds(self) -> bool:
        """Neither takes more than it may."""
        limit = self.share + self.bucket
        return self.save_peak <= limit and self.load_peak <= limit + self.weights


def measure(model: str, parallel: ParallelConfig, run_dir: str) -> Memory:
    """Collective: save and load a checkpoint of a new policy."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
    from megatron_drpo.platform.base import build_platform
    from megatron_drpo.policy import optimizer_state
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy

    optimizer_state.EXCHANGE_NUMEL = EXCHANGE_NUMEL
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=model, dtype=Dtype.bf16),
        parallel=parallel,
    )
    platform = build_platform(config.platform)
    state = initialise_parallel(parallel, platform.backend, platform.prepare(dist.get_rank()))
    policy = Policy(config, platform, state)
    policy.sharded_state(is_loading=False)  # makes the moments
    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    with MemoryMeter() as saving:
        path = checkpointer.save(policy, RunState(step=1))
    with MemoryMeter() as loading:
        checkpointer.load(path, policy)
    return Memory(**_sizes(policy), save_peak=saving.peak_bytes, load_peak=loading.peak_bytes)


def _sizes(policy: Any) -> dict[str, int]:
    from megatron_drpo.policy.optimizer import distributed_optimizers

    held = weights = share = largest = 0
    for part in distributed_optimizers(policy.optimizer):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        weights += sum(parameter.nbytes for parameter in parameters)
        sizes = [parameter.numel() * STATE_BYTES + parameter.nbytes for parameter in parameters]
        held += sum(sizes)
        share += -(-sum(sizes) // part.data_parallel_group.size())
        largest = max(largest, *sizes)
    bucket = max(largest, EXCHANGE_NUMEL * (STATE_BYTES + 2))
    return {"held": held, "weights": weights, "share": share, "bucket": bucket}


# --------------------------------------------------------------------------------------------- ranks


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    for name, layout in LAYOUTS.items():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(f"{folder}/store_{name}", num_ranks)
        limit = timedelta(seconds=TIME_LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
        memory = measure(f"{folder}/model", layout, f"{folder}/{name}")
        gathered: list[Any] = [None] * num_ranks
        dist.all_gather_object(gathered, memory)
        if rank == 0:
            torch.save([vars(one) for one in gathered], f"{folder}/{name}.pt")
        dist.barrier()
        dist.destroy_process_group()


def write_model(folder: str) -> None:
    """In a process of its own: transformers and Megatron's CPU platform do not go together."""
    from tools.tiny_model import write_tiny_moe

    write_tiny_moe(Path(folder), num_layers=4, hidden_size=128, expert_size=64)


def print_table(measured: dict[str, list[Memory]]) -> bool:
    """One row per layout, of the rank that takes most; True if all are within share and bucket."""
    table = Table(title="MB per rank")
    for heading in ("layout", "whole state", "its weights", "share", "bucket", "save", "load", ""):
        table.add_column(heading, justify="right")
    holds = True
    for name, ranks in measured.items():
        worst = max(ranks, key=lambda rank: rank.save_peak - rank.share)
        row_holds = all(rank.holds for rank in ranks)
        holds &= row_holds
        figures = (worst.held, worst.weights, worst.share, worst.bucket, worst.save_peak, worst.load_peak)
        cells = [f"{figure / 1e6:.2f}" for figure in figures]
        table.add_row(name, *cells, "[green]ok[/]" if row_holds else "[red]FAILS[/]")
    Console(width=max(80, Console().width)).print(table)
    return holds


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    ignore_expected_warnings()
    context = mp.get_context("spawn")
    num_ranks = 4
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=write_model, args=(f"{folder}/model",))
        writer.start()
        writer.join()
        mp.spawn(run_rank, args=(num_ranks, folder), nprocs=num_ranks)
        measured = {
            name: [Memory(**values) for values in torch.load(f"{folder}/{name}.pt", weights_only=True)]
            for name in LAYOUTS
        }
    return 0 if print_table(measured) else 1


if __name__ == "__main__":
    sys.exit(main())
