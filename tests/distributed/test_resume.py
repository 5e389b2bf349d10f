"""Training that continues from a checkpoint, under the layout that saved it and under others.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megatron_drpo.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    Dtype,
    Layers,
    OptimizerConfig,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
    TrainConfig,
)
from megatron_drpo.platform.base import build_platform
from megatron_drpo.types import TrainSequence

SINGLE = ParallelConfig()
EP2 = ParallelConfig(expert_parallel_size=2, data_parallel_size=2)
TP2 = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)
TP2_PP2_EP2 = ParallelConfig(
    tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=2, expert_parallel_size=2
)
CP2 = ParallelConfig(context_parallel_size=2)
PP2_DP2 = ParallelConfig(pipeline_parallel_size=2, data_parallel_size=2)
STEPS_BEFORE = 2
STEPS_AFTER = 2


@dataclass(frozen=True)
class Continued:
    """The updates after the checkpoint, as one rank saw them."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, str]
    """Digest of every HF tensor afterwards; on global rank 0."""


def build_policy(model: Path, parallel: ParallelConfig, layers: Layers = Layers.transformer_engine) -> Any:
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy

    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, platform.backend, platform.prepare(0))
    config = Config(
        data=DataConfig(train_path="unused"),
        train=TrainConfig(num_steps=STEPS_BEFORE + STEPS_AFTER),
        policy=PolicyConfig(
            model_path=str(model), dtype=Dtype.fp32, layers=layers, max_tokens_per_micro_batch=60
        ),
        # A large rate and second moments that still warm up: a wrong `step` of AdamW shows at once.
        optimizer=OptimizerConfig(lr=3e-3, num_warmup_updates=3, beta2=0.9),
        parallel=parallel,
    )
    return Policy(config, platform, state)


def make_sequences(step: int) -> list[TrainSequence]:
    """Eight sequences of 6 to 20 tokens, off-policy, with advantages of both signs."""
    generator = torch.Generator().manual_seed(step)
    sequences = []
    for number in range(8):
        length = 4 + 2 * number
        sequences.append(
            TrainSequence(
                id=number,
                token_ids=torch.randint(0, 101, (2 + length,), generator=generator),
                prompt_length=2,
                advantages=torch.full((length,), (-1.0, 0.5, 2.0)[number % 3]),
                rollout_logprobs=-3.0 * torch.rand(length, generator=generator) - 2.0,
                loss_mask=torch.ones(length, dtype=torch.bool),
            )
        )
    return sequences


def update(policy: Any, steps: range) -> Continued:
    from megatron_drpo.metrics.timing import StepTimer
    from megatron_drpo.step.global_batch import iter_global_batches

    parallel = policy.parallel
    results: list[Any] = []
    for step in steps:
        share = make_sequences(step)[parallel.data_rank :: parallel.data_size]
        [micro_batches] = iter_global_batches(policy.config, policy, share)
        results.append(policy.train_step(micro_batches, StepTimer()))
    weights = {name: hashlib.sha256(tensor.numpy()).hexdigest() for name, tensor in policy.hf_tensors()}
    return Continued([result.loss for result in results], [result.grad_norm for result in results], weights)


def train_save_continue(
    model: Path, parallel: ParallelConfig, run_dir: str, layers: Layers = Layers.transformer_engine
) -> Continued:
    """One rank: some updates, a checkpoint, and more updates, without interruption."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState

    policy = build_policy(model, parallel, layers)
    update(policy, range(STEPS_BEFORE))
    Checkpointer(run_dir, CheckpointConfig()).save(policy, RunState(step=STEPS_BEFORE))
    return update(policy, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))


def load_continue(
    model: Path, parallel: ParallelConfig, run_dir: str, layers: Layers = Layers.transformer_engine
) -> Continued:
    """One rank: a new policy, the checkpoint, and the same further updates."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer

    policy = build_policy(model, parallel, layers)
    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    path = checkpointer.find()
    assert path is not None
    state = checkpointer.load(path, policy)
    assert (state.step, policy.num_updates, policy.optimizer_step) == 3 * (STEPS_BEFORE,)
    return update(policy, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))


def two_ranks(model: Path, run_dir: str) -> list[Continued]:
    return [
        train_save_continue(model, EP2, run_dir),
        load_continue(model, EP2, run_dir),
        load_continue(model, TP2, run_dir),
        load_continue(model, CP2, run_dir),
    ]


def two_ranks_of_both_layers(model: Path, run_dir: str) -> list[Continued]:
    local_dir, te_dir = f"{run_dir}/local", f"{run_dir}/te"
    return [
        train_save_continue(model, EP2, te_dir),
        load_continue(model, TP2, te_dir, Layers.local),
        train_save_continue(model, TP2, local_dir, Layers.local),
        load_continue(model, EP2, local_dir),
    ]


def two_context_ranks(model: Path, run_dir: str) -> list[Continued]:
    return [
        train_save_continue(model, CP2, run_dir),
        load_continue(model, CP2, run_dir),
        load_continue(model, EP2, run_dir),
    ]


def one_rank_alone(model: Path, ep2_dir: str, run_dir: str) -> list[Continued]:
    return [
        load_continue(model, SINGLE, ep2_dir),
        train_save_continue(model, SINGLE, run_dir),
        load_continue(model, SINGLE, run_dir),
    ]


def check_close(found: Continued, expected: Continued) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=1e-6, rel=0)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_resume_under_the_same_and_other_layouts(
    run_distributed: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, ep2_dir, single_dir = hf_model("moe"), str(tmp_path / "ep2"), str(tmp_path / "single")
    undisturbed, same, tp2, cp2 = run_distributed(two_ranks, 2, model, ep2_dir)[0]
    assert min(abs(loss) for loss in undisturbed.losses) > 0.01
    assert same == undisturbed, "bit for bit"
    check_close(tp2, undisturbed)
    check_close(cp2, undisturbed)

    [[single, undisturbed_single, same_single]] = run_distributed(
        one_rank_alone, 1, model, ep2_dir, single_dir
    )
    check_close(single, undisturbed)
    assert same_single == undisturbed_single

    [four, *_] = run_distributed(load_continue, 4, model, TP2_PP2_EP2, single_dir)
    check_close(four, undisturbed_single)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_resume_of_context_ranks(
    run_distributed: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two ranks hold the same parameters: one copy is saved, both read it."""
    undisturbed, same, ep2 = run_distributed(two_context_ranks, 2, hf_model("moe"), str(tmp_path))[0]
    assert min(abs(loss) for loss in undisturbed.losses) > 0.01
    assert same == undisturbed, "bit for bit"
    check_close(ep2, undisturbed)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_resume_under_the_other_kind_of_layers(
    run_distributed: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Transformer Engine's layers have grouped experts and an optimizer that counts steps per group."""
    results = run_distributed(two_ranks_of_both_layers, 2, hf_model("moe_mixed"), str(tmp_path))[0]
    undisturbed, local, undisturbed_local, te = results
    assert min(abs(loss) for loss in undisturbed.losses) > 0.01
    check_close(local, undisturbed)
    check_close(te, undisturbed_local)


def four_ranks_tied(model: Path, run_dir: str) -> list[Continued]:
    return [train_save_continue(model, PP2_DP2, run_dir), load_continue(model, PP2_DP2, run_dir)]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_resume_of_tied_embeddings_on_two_stages(
    run_distributed: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """They have a bucket of their own. One stage saves them, both read them."""
    undisturbed, same = run_distributed(four_ranks_tied, 4, hf_model("dense_tied"), str(tmp_path))[0]
    assert same == undisturbed, "bit for bit"


# ------------------------------------------------------------------- checkpoints of earlier versions


def save_as_megatron(policy: Any, run_dir: str) -> None:
    """Megatron's own way: it gathers all parameters on every rank."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
    from megatron_drpo.policy.optimizer import distributed_optimizers

    def sharded_state(*, is_loading: bool) -> dict[str, Any]:
        model = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}
        optimizer = [
            part.sharded_param_state_fully_reshardable(model, is_loading, metadata={})
            for part in distributed_optimizers(policy.optimizer)
        ]
        return {**model, "optimizer": optimizer}

    own = policy.sharded_state
    policy.sharded_state = sharded_state
    Checkpointer(run_dir, CheckpointConfig()).save(policy, RunState(step=STEPS_BEFORE))
    policy.sharded_state = own


def two_ranks_that_gather(model: Path, run_dir: str) -> list[Continued]:
    policy = build_policy(model, EP2)
    update(policy, range(STEPS_BEFORE))
    save_as_megatron(policy, run_dir)
    return [
        update(policy, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)),
        load_continue(model, EP2, run_dir),
        load_continue(model, TP2, run_dir),
    ]


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_checkpoints_that_megatron_gathered_are_read(
    run_distributed: Callable[..., Any], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    undisturbed, same, tp2 = run_distributed(two_ranks_that_gather, 2, hf_model("moe"), str(tmp_path))[0]
    assert same == undisturbed, "bit for bit"
    check_close(tp2, undisturbed)


# ----------------------------------------------------------------------------- the servers' weights


def publish(_: Path) -> float:
    """One rank: when `_publish_weights` returned, or, on rank 0, when the servers had the weights."""
    from megatron_drpo.checkpoint.checkpointer import Checkpointer
    from megatron_drpo.step.leader_wait import CollectiveWait
    from megatron_drpo.step.publish import WeightPublisher
    from megatron_drpo.trainer import Trainer

    class NoWeights:
        def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(())

    pushed: list[float] = []

    class SlowControl:
        messages: ClassVar[list[str]] = []
        current: ClassVar[list[str]] = ["http://server"]

        def push(self, tensors: Iterator[tuple[str, torch.Tensor]], policy_version: int) -> None:
            time.sleep(0.5)
            pushed.append(time.monotonic())

    control: Any = SlowControl()
    rank = torch.distributed.get_rank()
    config = Config(data=DataConfig(train_path="unused"), policy=PolicyConfig(model_path="unused"))
    policy: Any = NoWeights()
    trainer = Trainer(
        config,
        policy,
        Checkpointer("unused", config.checkpoint),
        share=None,
        experience=None,
        evaluator=None,
        publisher=WeightPublisher(policy, control=control if rank == 0 else None, engine=None),
        wait=CollectiveWait(None),
        writer=None,
        progress=None,
    )
    trainer._publish_weights()
    return pushed[0] if rank == 0 else time.monotonic()


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_no_replica_samples_before_the_servers_have_the_weights(
    run_distributed: Callable[..., list[float]], tmp_path: Path
) -> None:
    """After a start the servers hold the HF folder's weights: a resumed run must not sample from them."""
    pushed, returned = run_distributed(publish, 2, tmp_path)
    assert returned >= pushed
