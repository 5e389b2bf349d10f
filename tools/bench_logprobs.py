"""Time, memory and error of the logprob op beside other libraries': `python tools/bench_logprobs.py`.

All rows of a table come from one run: on CPUs from ranks of one thread each that talk over gloo, on CUDA
from one GPU. The implementations take turns, so that a busy moment of the machine meets all of them; a
time is the median over turns of the slowest rank. Every implementation ends with the gradient of the hidden
states summed over ranks and that of the weight added to an fp32 main_grad. Errors are against float64.

`--memory` instead measures the peak of all memory beside the weight, main_grad, the hidden states and their
gradient, at the vocabulary of Qwen3.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from tools.logprob_peers import (
    BASELINE,
    IMPLEMENTATIONS,
    NATIVE,
    ONE_PASS,
    RECOMPUTE,
    Implementation,
    Problem,
)
from tools.memory_meter import MemoryMeter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOT_MEASURED = "not measured"
MEMORY_CASES = [
    (NATIVE, 4096),
    (RECOMPUTE, 4096),
    (ONE_PASS, 4096),
    (RECOMPUTE, 8192),
    (ONE_PASS, 8192),
]


@dataclass(frozen=True)
class Sizes:
    """One benchmark."""

    num_tokens: int
    vocab_size: int
    hidden_size: int
    tensor_size: int
    dtype: str
    buffer_bytes: int
    repeats: int
    num_threads: int
    cases: tuple[tuple[str, int], ...] = ()
    """(implementation, tokens) of the memory mode."""


@dataclass
class Row:
    """What was measured of one implementation; None where it was not."""

    name: str
    num_tokens: int
    version: str
    note: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    logprob_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None


# ------------------------------------------------------------------------------------------- one rank


def run_rank(rank: int, sizes: Sizes, folder: str) -> None:
    """One of the processes; rank 0 leaves the rows in the folder."""
    from megatron_drpo.config.schema import ParallelConfig, PlatformName
    from megatron_drpo.platform.base import build_platform
    from megatron_drpo.policy.parallel import initialise_parallel

    ignore_expected_warnings()
    torch.set_num_threads(sizes.num_threads)
    platform = build_platform(PlatformName.auto)
    device = platform.prepare(rank)
    # The CPU platform turns torch.compile off; Megatron-Core's fused loss is meant to be compiled.
    torch.compiler.set_stance("default")
    # Megatron-Core warns without the last one, which its overlap on GPUs needs.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(sizes.tensor_size), CUDA_DEVICE_MAX_CONNECTIONS="1")
    store = dist.FileStore(f"{folder}/store", sizes.tensor_size)
    dist.init_process_group(platform.backend, store=store, rank=rank, world_size=sizes.tensor_size)
    parallel = initialise_parallel(
        ParallelConfig(tensor_parallel_size=sizes.tensor_size), platform.backend, device
    )
    measure = measure_memory if sizes.cases else measure_all
    rows = measure(sizes, device, parallel.tensor_group)
    if rank == 0:
        device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        machine = f"{device_name}, torch {torch.__version__}"
        torch.save({"rows": [vars(row) for row in rows], "machine": machine}, f"{folder}/rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def build_problem(sizes: Sizes, device: torch.device, group: Any) -> Problem:
    """The same hidden states and labels on every rank, and this rank's shard; logits have a spread of 2."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    dtype = DTYPES[sizes.dtype]
    shared = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(sizes.num_tokens, sizes.hidden_size, generator=shared)
    labels_T = torch.randint(0, sizes.vocab_size, (sizes.num_tokens,), generator=shared)
    if sizes.vocab_size % ranks:
        raise SystemExit(f"a vocabulary of {sizes.vocab_size} does not divide by {ranks} ranks")
    own = torch.Generator().manual_seed(1 + rank)
    shape = (sizes.vocab_size // ranks, sizes.hidden_size)
    weight_VH = torch.empty(shape, dtype=dtype).normal_(0, 2 / sizes.hidden_size**0.5, generator=own)
    weight: Any = torch.nn.Parameter(weight_VH.to(device))
    weight.main_grad = torch.zeros(shape, dtype=torch.float32, device=device)
    weight.grad_added_to_main_grad = False  # DDP sets this
    return Problem(
        hidden_TH=hidden_TH.to(device, dtype).requires_grad_(),
        weight_VH=weight,
        labels_T=labels_T.to(device),
        vocab_size=sizes.vocab_size,
        buffer_bytes=sizes.buffer_bytes,
        group=group,
    )


def run_once(implementation: Implementation, problem: Problem) -> tuple[Tensor | None, float]:
    """(logprobs, seconds of the slowest rank); gradients are in hidden_TH.grad and main_grad."""
    problem.hidden_TH.grad = None
    problem.weight_VH.main_grad.zero_()
    problem.weight_VH.grad_added_to_main_grad = False
    _synchronise(problem)
    start = time.perf_counter()
    logprobs_T = implementation.run(problem)
    problem.weight_VH.grad = None  # as DDP's hook does
    if problem.hidden_TH.is_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=problem.hidden_TH.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=problem.group)
    return logprobs_T, float(seconds)


def _synchronise(problem: Problem) -> None:
    if problem.hidden_TH.is_cuda:
        torch.cuda.synchronize()
    dist.barrier(group=problem.group)


def peak_of(implementation: Implementation, problem: Problem) -> int:
    """Bytes at the peak beside what the problem holds, less the gradient of the hidden states."""
    returned = problem.hidden_TH.numel() * problem.hidden_TH.itemsize
    if problem.hidden_TH.is_cuda:
        problem.hidden_TH.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(implementation, problem)
        return torch.cuda.max_memory_allocated() - before - returned
    with MemoryMeter() as meter:
        run_once(implementation, problem)
    return meter.peak_bytes - returned


def reference(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (logprobs, gradient of hidden, gradient of this rank's shard); each rank takes a share of the
    tokens through the whole vocabulary."""
    rank, ranks = dist.get_rank(problem.group), problem.tensor_size
    shard_VH = problem.weight_VH.detach()
    shards = [torch.empty_like(shard_VH) for _ in range(ranks)]
    dist.all_gather(shards, shard_VH, group=problem.group)
    weight_VH = torch.cat(shards).double()
    hidden_TH = problem.hidden_TH.detach().double()
    logprobs_T = torch.zeros(len(hidden_TH), dtype=torch.float64, device=hidden_TH.device)
    grad_hidden_TH, grad_weight_VH = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)
    for rows_C in torch.arange(rank, len(hidden_TH), ranks, device=hidden_TH.device).split(256):
        log_probs_CV = (hidden_TH[rows_C] @ weight_VH.t()).log_softmax(1)
        labels_C1 = problem.labels_T[rows_C, None]
        logprobs_T[rows_C] = log_probs_CV.gather(1, labels_C1)[:, 0]
        grad_CV = log_probs_CV.exp_()
        grad_CV.scatter_add_(1, labels_C1, -torch.ones_like(labels_C1, dtype=torch.float64))
        grad_hidden_TH[rows_C] = grad_CV @ weight_VH
        grad_weight_VH.addmm_(grad_CV.t(), hidden_TH[rows_C])
    for tensor in (logprobs_T, grad_hidden_TH, grad_weight_VH):
        dist.all_reduce(tensor, group=problem.group)
    return logprobs_T, grad_hidden_TH, grad_weight_VH.chunk(ranks)[rank].clone()


def measure_all(sizes: Sizes, device: torch.device, group: Any) -> list[Row]:
    """Every implementation: memory and errors in a first turn, then times in turns."""
    problem = build_problem(sizes, device, group)
    expected = reference(problem)
    rows = [
        Row(x.name, sizes.num_tokens, x.version(), note=x.why_not(device, sizes.tensor_size))
        for x in IMPLEMENTATIONS
    ]
    runnable = [(x, row) for x, row in zip(IMPLEMENTATIONS, rows, strict=True) if row.note is None]
    for implementation, row in runnable:
        _progress(f"errors and memory: {row.name}")
        logprobs_T, _ = run_once(implementation, problem)
        _write_errors(row, problem, logprobs_T, expected)
        row.peak_bytes = peak_of(implementation, problem)
    del expected
    times: dict[str, list[float]] = {row.name: [] for _, row in runnable}
    for turn in range(sizes.repeats):
        _progress(f"turn {turn + 1} of {sizes.repeats}")
        for implementation, row in runnable:
            times[row.name].append(run_once(implementation, problem)[1])
    for _, row in runnable:
        row.seconds = statistics.median(times[row.name])
    return rows


def _write_errors(
    row: Row, problem: Problem, logprobs_T: Tensor | None, expected: tuple[Tensor, Tensor, Tensor]
) -> None:
    if logprobs_T is not None:
        row.logprob_error = float((logprobs_T.double() - expected[0]).abs().max())
    grad = problem.hidden_TH.grad
    assert grad is not None
    row.hidden_error = float((grad.double() - expected[1]).norm() / expected[1].norm())
    row.weight_error = float((problem.weight_VH.main_grad - expected[2]).norm() / expected[2].norm())


def measure_memory(sizes: Sizes, device: torch.device, group: Any) -> list[Row]:
    """Peaks of `sizes.cases`, one after the other."""
    by_name = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    rows = []
    for name, num_tokens in sizes.cases:
        _progress(f"memory: {name}, {num_tokens} tokens")
        problem = build_problem(replace(sizes, num_tokens=num_tokens), device, group)
        row = Row(name, num_tokens, by_name[name].version())
        start = time.perf_counter()
        row.peak_bytes = peak_of(by_name[name], problem)
        row.seconds = time.perf_counter() - start
        rows.append(row)
    return rows


def _progress(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"{text} ...", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ the table


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else f"{value / base:.2f}x"


def time_table(rows: list[Row], machine: str) -> tuple[list[str], list[list[str]]]:
    """(headings, cells)."""
    on_cpu = machine.startswith("CPU")
    headings = ["implementation", "version", "CPU, fwd + bwd", "GPU, fwd + bwd", "ratio to the first"]
    headings += ["peak allocated", "max error of logprobs", "error of dH", "error of dW"]
    base = next(row.seconds for row in rows if row.name == BASELINE)
    cells = []
    for row in rows:
        if row.note is not None:
            cells.append([row.name, row.version, row.note, row.note, *["-"] * 5])
            continue
        spent = "-" if row.seconds is None else f"{1000 * row.seconds:.0f} ms"
        times = [spent, NOT_MEASURED] if on_cpu else [NOT_MEASURED, spent]
        errors = [row.logprob_error, row.hidden_error, row.weight_error]
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        shown = ["-" if error is None else f"{error:.1e}" for error in errors]
        cells.append([row.name, row.version, *times, _ratio(row.seconds, base), peak, *shown])
    return headings, cells


def memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells); ratios to Megatron-Core's native loss at its number of tokens."""
    native = next(row.peak_bytes for row in rows if row.name == NATIVE)
    assert native is not None
    headings = ["implementation", "version", "tokens", "peak extra", "times below native at 4096 tokens"]
    cells = []
    for row in rows:
        assert row.peak_bytes is not None
        times = f"{native / row.peak_bytes:.1f}x"
        peak = f"{row.peak_bytes / 1e9:.3f} GB"
        cells.append([row.name, row.version, str(row.num_tokens), peak, times])
    return headings, cells


def show(title: str, headings: list[str], cells: list[list[str]], markdown: Path | None) -> None:
    """On the terminal, and as a Markdown file if asked for."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=max(150, Console().width)).print(table)
    if markdown is not None:
        lines = [headings, ["---"] * len(headings), *cells]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        markdown.write_text(f"{title}\n\n{text}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--tensor-size", type=int, help="ranks; 2 on CPUs, 1 on a GPU and with --memory")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--buffer-mib", type=int, default=256, help="policy.logprob_buffer_bytes, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    on_cuda = torch.cuda.is_available()
    memory = options.memory
    tensor_size = options.tensor_size or (1 if memory or on_cuda else 2)
    sizes = Sizes(
        num_tokens=options.num_tokens,
        vocab_size=options.vocab_size or (151936 if memory else 32000),
        hidden_size=options.hidden_size or (2048 if memory else 1024),
        tensor_size=tensor_size,
        dtype=options.dtype or ("bf16" if memory or on_cuda else "fp32"),
        buffer_bytes=options.buffer_mib * 2**20,
        repeats=options.repeats,
        num_threads=max(1, (os.cpu_count() or 1) // tensor_size) if memory else 1,
        cases=tuple(MEMORY_CASES) if memory else (),
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(sizes, folder), nprocs=tensor_size)
        saved = torch.load(f"{folder}/rows.pt", weights_only=True)
    rows = [Row(**values) for values in saved["rows"]]
    headings, cells = memory_table(rows) if memory else time_table(rows, saved["machine"])
    title = f"V = {sizes.vocab_size}, H = {sizes.hidden_size}, {sizes.dtype}, tensor parallel {tensor_size}, "
    title += f"logits buffer {options.buffer_mib} MiB; {saved['machine']}"
    title = title if memory else f"N = {sizes.num_tokens}, {title}, median of {sizes.repeats} turns"
    show(title, headings, cells, options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
