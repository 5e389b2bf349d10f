"""Learning rate, AdamW and its state against hand computation and torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import distrib_optimizer

from megatron_drpo.config.schema import Config, Dtype, OptimizerConfig, Schedule
from megatron_drpo.policy.optimizer import (
    compute_learning_rate,
    distributed_optimizers,
    optimizer_step_count,
    set_learning_rate,
)
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.types import TrainSequence

BuildPolicy = Callable[[Config], Policy]
Update = Callable[[Policy, Sequence[TrainSequence]], UpdateResult]


# ------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.constant, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.linear, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (Schedule.cosine, [0.25, 0.5, 0.75, 1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2]),
    ],
)
def test_schedule_by_hand(schedule: Schedule, expected: list[float]) -> None:
    """Four updates of warm-up, then four of decay from 1 to 0.2; the rate at the end is min_lr."""
    config = OptimizerConfig(lr=1.0, min_lr=0.2, schedule=schedule, num_warmup_updates=4)
    num_updates = 8
    if schedule is Schedule.cosine:
        found = [compute_learning_rate(config, update, num_updates) for update in (0, 1, 2, 3, 4, 5, 6, 8)]
    else:
        found = [compute_learning_rate(config, update, num_updates) for update in range(9)]
    assert found == pytest.approx(expected, abs=1e-15)


def test_schedule_beyond_its_end_and_without_decay() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule=Schedule.linear, num_warmup_updates=10)
    assert compute_learning_rate(config, 99, 20) == pytest.approx(1e-4)
    assert compute_learning_rate(config, 4, 5) == pytest.approx(5e-4)  # all of it is warm-up


def test_every_parameter_group_gets_the_rate(
    build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> None:
    optimizer = build_policy(policy_config("moe")).optimizer
    set_learning_rate(optimizer, 0.125)
    groups = [group for part in distributed_optimizers(optimizer) for group in part.optimizer.param_groups]
    assert len(groups) >= 2
    assert {group["lr"] for group in groups} == {0.125}


# ----------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("clip_grad", [None, 1.0, 1e6])
@pytest.mark.parametrize("model", ["dense_tied", "moe"])
def test_two_steps_are_torchs_adamw(
    build_policy: BuildPolicy, policy_config: Callable[..., Config], model: str, clip_grad: float | None
) -> None:
    """Weight decay spares vectors; clipping is by the norm over all parameters, shared ones counted once."""
    settings = OptimizerConfig(
        lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, clip_grad=clip_grad
    )
    policy = build_policy(policy_config(model, settings))
    parameters = list(policy.chunks[0].parameters())
    references = [parameter.detach().double().clone() for parameter in parameters]
    reference_optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in references if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in references if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    set_learning_rate(policy.optimizer, 0.01)
    for step in range(2):
        torch.manual_seed(step)
        gradients = [torch.randn_like(parameter) * 0.1 for parameter in parameters]
        for parameter, reference, gradient in zip(parameters, references, gradients, strict=True):
            vars(parameter)["main_grad"].copy_(gradient)
            reference.grad = gradient.double()
        norm = torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()
        if clip_grad is not None:
            assert (norm > clip_grad) is (clip_grad == 1.0)
            torch.nn.utils.clip_grad_norm_(references, clip_grad)
        reference_optimizer.step()
        success, found_norm, _ = cast(tuple[bool, float, object], policy.optimizer.step())
        assert success
        assert found_norm == pytest.approx(norm, rel=1e-6)
        assert optimizer_step_count(policy.optimizer) == step + 1
    for parameter, reference in zip(parameters, references, strict=True):
        torch.testing.assert_close(parameter.double(), reference, rtol=1e-5, atol=1e-6)


def test_bf16_steps_on_fp32_main_parameters(
    build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> None:
    """Updates far below bf16's resolution (2^-10 at 0.2) add up: 100 steps of 1e-5."""
    policy = build_policy(policy_config("moe_bf16", OptimizerConfig(weight_decay=0.0), dtype=Dtype.bf16))
    (weight, *_) = [p for p in policy.chunks[0].parameters() if p.dim() == 2 and p.dtype is torch.bfloat16]
    before = weight.detach().double()
    set_learning_rate(policy.optimizer, 1e-5)
    for _ in range(100):
        for parameter in policy.chunks[0].parameters():
            vars(parameter)["main_grad"].fill_(1.0)
        policy.optimizer.step()
    expected = (before - 100 * 1e-5).bfloat16()
    assert (weight == expected).double().mean() > 0.99
    assert (before.bfloat16() == expected).double().mean() < 0.5


# ----------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("has_transformer_engine", [True, False])
def test_a_restored_optimizer_continues_bit_identically(
    monkeypatch: pytest.MonkeyPatch,
    has_transformer_engine: bool,
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    make_sequences: Callable[..., list[TrainSequence]],
    update: Update,
    tmp_path: Path,
) -> None:
    """Transformer Engine's optimizer counts steps per group. torch's counts them per parameter, and there
    upstream's loader leaves one `step` tensor that all parameters share and count up together."""
    if not has_transformer_engine:
        monkeypatch.setattr(megatron_optimizer, "Adam", torch.optim.AdamW)
        monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
        monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", False)
    config = policy_config("moe")
    policy = build_policy(config)
    batches = [make_sequences([7, 12, 5 + number]) for number in range(4)]
    for batch in batches[:2]:
        update(policy, batch)
    dist_checkpointing.save(policy.sharded_state(is_loading=False), str(tmp_path))

    restored = build_policy(config)
    state: Any = dist_checkpointing.load(restored.sharded_state(is_loading=True), str(tmp_path))
    restored.load_state(state, optimizer_step=2, num_updates=2)
    assert restored.optimizer_step == 2
    parts = [part.optimizer for part in distributed_optimizers(restored.optimizer)]
    states = [state for part in parts for state in part.state.values()]
    assert len(states) == len(list(restored.chunks[0].parameters()))
    if has_transformer_engine:
        assert {group["step"] for part in parts for group in part.param_groups} == {2}
        assert not any("step" in state for state in states)
    else:
        steps = [state["step"] for state in states]
        assert len({step.data_ptr() for step in steps}) == len(steps)
        assert {step.item() for step in steps} == {2.0}

    for batch in batches[2:]:
        expected, found = update(policy, batch), update(restored, batch)
        assert (found.loss, found.grad_norm, found.lr) == (expected.loss, expected.grad_norm, expected.lr)
    assert restored.optimizer_step == policy.optimizer_step == 4
    pairs = zip(policy.hf_tensors(), restored.hf_tensors(), strict=True)
    for (name, tensor), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(tensor, other), name


def test_a_new_optimizer_has_made_no_step(
    build_policy: BuildPolicy, policy_config: Callable[..., Config]
) -> None:
    assert build_policy(policy_config("dense")).optimizer_step == 0


def test_saving_before_the_first_step_changes_nothing(
    build_policy: BuildPolicy,
    policy_config: Callable[..., Config],
    update: Update,
    make_sequences: Callable[[list[int]], list[TrainSequence]],
) -> None:
    """Megatron makes a step to have a state to save; it must neither decay weights nor count."""
    config = policy_config("dense", OptimizerConfig(lr=1e-2, weight_decay=0.5))
    saved, other = build_policy(config), build_policy(config)
    saved.sharded_state(is_loading=False)
    assert saved.optimizer_step == 0
    for policy in (saved, other):
        update(policy, make_sequences([5, 17]))
    assert saved.optimizer_step == 1
    expected = {name: tensor.clone() for name, tensor in other.hf_tensors()}
    for name, tensor in saved.hf_tensors():
        assert torch.equal(tensor, expected[name]), name
