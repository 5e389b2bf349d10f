"""Loading into a live sharded model and exporting it again, on every kind of layout.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_drpo.config.schema import Config, DataConfig, Dtype, ParallelConfig, PlatformName, PolicyConfig
from megatron_drpo.errors import ModelError
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import build_platform
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.mapping import ParameterMapping

TP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)
DP2 = ParallelConfig(data_parallel_size=2)
EP2 = ParallelConfig(expert_parallel_size=2, data_parallel_size=2)
PP2 = ParallelConfig(pipeline_parallel_size=2)
PP2_VPP2 = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)
TP2_EP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=2)
TP2_ETP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)
TP2_PP2_EP2 = ParallelConfig(
    tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=2, expert_parallel_size=2
)
EP2_ETP2 = ParallelConfig(
    tensor_parallel_size=2,
    sequence_parallel=True,
    data_parallel_size=2,
    expert_parallel_size=2,
    expert_tensor_parallel_size=2,
)
PP2_VPP2_EP2 = ParallelConfig(
    pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, expert_parallel_size=2, data_parallel_size=2
)

TWO_RANKS = [
    ("dense", TP2),
    ("dense_tied", PP2_VPP2),
    ("qwen2", TP2),
    ("qwen2_tied", PP2_VPP2),
    ("llama", TP2),
    ("llama_tied", PP2),
    ("moe", DP2),
    ("moe", TP2),
    ("moe_bf16", EP2),
    ("moe", PP2),
    ("moe", TP2_EP2),
    ("moe", TP2_ETP2),
    ("moe_mixed", PP2_VPP2),
    ("moe_sparse_step_tied", EP2),
]
FOUR_RANKS = [
    ("moe", TP2_PP2_EP2),
    ("moe_mixed", TP2_PP2_EP2),
    ("moe", EP2_ETP2),
    ("moe_sparse_step_tied", PP2_VPP2_EP2),
]


@dataclass(frozen=True)
class Exported:
    tensors: list[tuple[str, torch.Tensor]]
    doubled: dict[str, torch.Tensor]
    """After all weights were doubled in place inside DDP's buffers."""
    others: dict[str, torch.Tensor]
    """Exported instead of the weights: four times each weight, in fp32."""
    share: float
    """Of all parameters, the part that this rank holds."""


def build_loaded(path: Path, parallel: ParallelConfig) -> tuple[list[Any], Any, ParameterMapping]:
    """This rank's bare chunks with the weights of a folder, Megatron's config, the mapping."""
    from megatron_drpo.policy.model import build_model_chunks, build_transformer_config
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.weights.load_hf import load_hf_weights

    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    folder = HfFolder(path)
    dtype = Dtype.bf16 if folder.dtype("model.norm.weight") is torch.bfloat16 else Dtype.fp32
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(path), dtype=dtype),
        parallel=parallel,
    )
    family = get_family(folder.config)
    architecture = family.architecture(folder.config)
    mapping = family.mapping(architecture)
    transformer_config = build_transformer_config(config, architecture, platform)
    chunks = build_model_chunks(transformer_config, architecture, platform, state.device)
    load_hf_weights(chunks, folder, mapping)
    return list(chunks), transformer_config, mapping


def export_on(path: Path, parallel: ParallelConfig) -> Exported:
    """One rank: load, export, wrap for training (which moves the data), change the weights, export again."""
    from megatron_drpo.policy.model import wrap_data_parallel
    from megatron_drpo.weights.export import HfExporter

    chunks, transformer_config, mapping = build_loaded(path, parallel)
    exporter = HfExporter(chunks, mapping, bucket_bytes=100_000)
    tensors = list(exporter.tensors())
    wrap_data_parallel(chunks, transformer_config)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    others = dict(exporter.tensors(lambda parameter: 2 * parameter.float(), dtype=torch.float32))
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    total = sum(torch.Size(shape).numel() for shape in mapping.hf_shapes.values())
    return Exported(tensors, dict(exporter.tensors()), others, held / total)


def export_on_all(jobs: list[tuple[Path, ParallelConfig]]) -> list[Exported]:
    return [export_on(path, parallel) for path, parallel in jobs]


def check_equal(folder: HfFolder, exported: Exported) -> None:
    family = get_family(folder.config)
    mapping = family.mapping(family.architecture(folder.config))
    assert [name for name, _ in exported.tensors] == list(mapping.hf_shapes)
    assert mapping.hf_shapes.keys() == set(folder.keys())
    for name, tensor in exported.tensors:
        assert tensor.dtype == folder.dtype(name)
        assert torch.equal(tensor, folder.get(name)), name
        assert torch.equal(exported.doubled[name], 2 * folder.get(name)), name
        assert torch.equal(exported.others[name], 4 * folder.get(name).float()), name


def check_layouts(
    jobs: list[tuple[str, ParallelConfig]], ranks: list[list[Exported]], hf_model: Callable[[str], Path]
) -> None:
    for index, (model, layout) in enumerate(jobs):
        check_equal(HfFolder(hf_model(model)), ranks[0][index])
        assert all(not rank[index].tensors for rank in ranks[1:])
        if layout.pipeline_parallel_size > 1:
            assert max(rank[index].share for rank in ranks) < 0.7


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_four_ranks(hf_model: Callable[[str], Path], run_distributed: Callable[..., list[Any]]) -> None:
    """What was loaded is exported bit-equal, complete, in order, on rank 0 alone; after an update too."""
    jobs = [(hf_model(model), layout) for model, layout in FOUR_RANKS]
    check_layouts(FOUR_RANKS, run_distributed(export_on_all, 4, jobs), hf_model)


def save_and_break(path: Path, out: Path) -> str:
    """One of two pipeline ranks: export to a folder; then plan an export of a model that lacks a layer."""
    from megatron_drpo.weights.export import HfExporter

    chunks, _, mapping = build_loaded(path, PP2)
    HfExporter(chunks, mapping).save(out, source=path)
    if dist.get_rank() == 1:
        del chunks[0].decoder.final_layernorm
    with pytest.raises(ModelError) as error:
        HfExporter(chunks, mapping)
    return str(error.value)


def export_and_save(
    jobs: list[tuple[Path, ParallelConfig]], path: Path, out: Path
) -> tuple[list[Exported], str]:
    return export_on_all(jobs), save_and_break(path, out)


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_two_ranks_and_saving(
    tmp_path: Path, hf_model: Callable[[str], Path], run_distributed: Callable[..., list[Any]]
) -> None:
    """The same; `save` writes the source again; a parameter that is missing fails on all ranks."""
    jobs = [(hf_model(model), layout) for model, layout in TWO_RANKS]
    path, out = hf_model("moe"), tmp_path / "out"
    ranks = run_distributed(export_and_save, 2, jobs, path, out)
    check_layouts(TWO_RANKS, [exported for exported, _ in ranks], hf_model)
    source, written = HfFolder(path), HfFolder(out)
    assert set(written.keys()) == set(source.keys())
    assert all(torch.equal(written.get(name), source.get(name)) for name in source)
    assert (out / "config.json").read_text() == (path / "config.json").read_text()
    missing = "HF tensor 'model.norm.weight': all ranks together hold 0 of 64 elements"
    assert [error for _, error in ranks] == [missing, missing]


class QueuedWork:
    """As NCCL's: `wait` holds up a stream and returns; whether the transfer is over, is asked."""

    def __init__(self, work: dist.Work, queued: list[QueuedWork]) -> None:
        self._thread = threading.Thread(target=work.wait, daemon=True)
        self._thread.start()
        queued.append(self)

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return not self._thread.is_alive()


def count_queued(path: Path) -> int:
    """Sends that were in flight at once on the second stage, while the first stage takes its time."""
    from megatron_drpo.weights.export import HfExporter

    chunks, _, mapping = build_loaded(path, PP2)
    exporter = HfExporter(chunks, mapping, bucket_bytes=20_000)
    start = dist.batch_isend_irecv
    works: list[QueuedWork] = []
    in_flight = [0]

    def queue(operations: list[dist.P2POp]) -> list[QueuedWork]:
        started = [QueuedWork(work, works) for work in start(operations)]
        in_flight.append(sum(not work.is_completed() for work in works))
        return started

    if dist.get_rank() == 1:
        dist.batch_isend_irecv = queue  # type: ignore[assignment]
    for _ in exporter.tensors():
        time.sleep(0.005)
    assert dist.get_rank() == 0 or len(works) > 10
    return max(in_flight)


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_one_bucket_at_a_time(
    hf_model: Callable[[str], Path], run_distributed: Callable[..., list[int]]
) -> None:
    assert run_distributed(count_queued, 2, hf_model("moe")) == [0, 1]
