"""What the parity matrix runs: objectives x layouts x ways of splitting the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_drpo.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Anchor,
    Config,
    CorrectionConfig,
    DataConfig,
    Dtype,
    KlConfig,
    KlEstimator,
    Layers,
    LogprobBackend,
    LogprobMode,
    LossConfig,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    TokenCorrection,
)
from megatron_drpo.losses.registry import LOSSES

# ------------------------------------------------------------------------------------ rows: objectives

_LOSS = LossConfig(epsilon=1.0, mask_low=0.1, ratio_cap=5.0, num_topk=5, clip_high=0.28, dual_clip=3.0)
"""Every bound at a value of its own; delta 0.1, mask_high 0.15, clip_low 0.2 by default."""


def _row(loss: str, **algorithm: Any) -> AlgorithmConfig:
    config = replace(_LOSS, name=loss)
    if loss == "gspo":  # a mean over a sequence moves less far
        config = replace(config, clip_low=0.05, clip_high=0.07)
    return AlgorithmConfig(loss=config, horizon_tokens=32, **algorithm)


ROWS: dict[str, AlgorithmConfig] = {
    **{loss: _row(loss) for loss in LOSSES},
    "drpo, entropy, KL k3, sum / horizon": _row(
        "drpo",
        entropy_coef=0.01,
        kl=KlConfig(coef=0.1, estimator=KlEstimator.k3),
        aggregation=Aggregation.sequence_mean_token_sum,
    ),
    "surrogate, KL k2, mean of sequence means": _row(
        "surrogate",
        kl=KlConfig(coef=0.1, estimator=KlEstimator.k2),
        aggregation=Aggregation.sequence_mean_token_mean,
    ),
    "gspo, entropy, KL k1, sum / horizon": _row(
        "gspo",
        entropy_coef=0.01,
        kl=KlConfig(coef=0.1, estimator=KlEstimator.k1),
        aggregation=Aggregation.sequence_mean_token_sum,
    ),
    "grpo, recomputed anchor, TIS": _row(
        "grpo", anchor=Anchor.recomputed, correction=CorrectionConfig(token=TokenCorrection.tis)
    ),
    "drpo, recomputed anchor, IcePop": _row(
        "drpo", anchor=Anchor.recomputed, correction=CorrectionConfig(token=TokenCorrection.icepop)
    ),
    "cispo, MIS": _row("cispo", correction=CorrectionConfig(token=TokenCorrection.mis)),
    "mask_drpo, OPSM, sequence mask": _row(
        "mask_drpo", correction=CorrectionConfig(sequence_low=0.9, sequence_high=1.1, opsm_delta=0.03)
    ),
}

# ------------------------------------------------------------------------------------ columns: layouts


@dataclass(frozen=True)
class Layout:
    """A process mesh and the model it is for: `dense` (embeddings tied) or `moe` (with one dense layer)."""

    model: str
    parallel: ParallelConfig


_TP2_SP = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)

LAYOUTS: dict[str, Layout] = {
    "single": Layout("moe", ParallelConfig()),
    # Tensor parallelism without sequence parallelism is refused for a mixture of experts.
    "TP2": Layout("dense", ParallelConfig(tensor_parallel_size=2)),
    "TP4": Layout("dense", ParallelConfig(tensor_parallel_size=4)),
    "TP2+SP": Layout("dense", _TP2_SP),
    "CP2": Layout("moe", ParallelConfig(context_parallel_size=2)),
    "PP2": Layout("dense", ParallelConfig(pipeline_parallel_size=2)),
    "PP2xVPP2": Layout("moe", ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
    "EP2": Layout("moe", ParallelConfig(expert_parallel_size=2, data_parallel_size=2)),
    "ETP2": Layout("moe", replace(_TP2_SP, expert_tensor_parallel_size=2)),
    "DP2": Layout("dense", ParallelConfig(data_parallel_size=2)),
    "TP2xEP2": Layout("moe", replace(_TP2_SP, expert_parallel_size=2)),
    "TP2xCP2": Layout("moe", replace(_TP2_SP, context_parallel_size=2, expert_tensor_parallel_size=2)),
    "TP2xPP2xEP2": Layout("moe", replace(_TP2_SP, pipeline_parallel_size=2, expert_parallel_size=2)),
    "PP2xDP2": Layout("dense", ParallelConfig(pipeline_parallel_size=2, data_parallel_size=2)),
}

# ---------------------------------------------------------------------------------------------- cases

SPLITS = {"one": 4096, "many": 112}
"""Tokens per micro-batch: the whole global batch in one, or many of unequal lengths."""


@dataclass(frozen=True)
class Case:
    """One objective under one layout, kind of layers and split, in one mode of the logprob op."""

    row: str
    layout: str
    layers: Layers
    split: str
    mode: LogprobMode


def full_product(rows: Iterable[str], layouts: Iterable[str]) -> list[Case]:
    """Everything, layout after layout. Over the two splits each row sees both modes of the op, and over the
    rows so does each split; objectives of whole sequences have the recompute mode only."""
    return [
        Case(row, layout, layers, split, _mode(row, number))
        for layout in layouts
        for layers in Layers
        for row in rows
        for number, split in enumerate(SPLITS)
    ]


def pairwise(rows: Iterable[str], layouts: Iterable[str]) -> list[Case]:
    """A quarter of the full product that still has every pair of two factors, (row, mode) and (layout, mode)
    among them: split and layers alternate along rows and along layouts, layers half as often."""
    chosen = []
    for column, layout in enumerate(layouts):
        for row in rows:
            index = list(ROWS).index(row)
            number = (index + column) % 2
            layers = list(Layers)[(index // 2 + column) % 2]
            chosen.append(Case(row, layout, layers, list(SPLITS)[number], _mode(row, number)))
    return chosen


def _mode(row: str, split_number: int) -> LogprobMode:
    is_one_pass = (list(ROWS).index(row) // 2 + split_number) % 2 == 0
    return LogprobMode.one_pass if is_one_pass else LogprobMode.recompute


def build_config(case: Case, folder: Path) -> Config:
    """A run's configuration, of which only the policy is used.

    The logits' buffer holds 24 rows of an unsharded vocabulary: the op works in several chunks.
    """
    layout = LAYOUTS[case.layout]
    models = folder / layout.model
    algorithm = ROWS[case.row]
    kl = replace(algorithm.kl, reference_path=str(models / "reference"))
    return Config(
        data=DataConfig(train_path="unused"),
        algorithm=replace(algorithm, kl=kl),
        platform=PlatformName.cpu,
        policy=PolicyConfig(
            model_path=str(models / "policy"),
            dtype=Dtype.fp32,
            layers=case.layers,
            max_tokens_per_micro_batch=SPLITS[case.split],
            logprob_mode=case.mode,
            logprob_backend=LogprobBackend.torch,
            logprob_buffer_bytes=24 * 512 * 4,
        ),
        parallel=replace(layout.parallel, timeout_s=900),
    )
