"""From configuration to loss; the README's table and example."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megatron_drpo.losses
from megatron_drpo.config.schema import LossConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.cispo import CispoLoss
from megatron_drpo.losses.dppo import DppoBinaryKlLoss, DppoBinaryTvLoss, DppoTopkKlLoss, DppoTopkTvLoss
from megatron_drpo.losses.drpo import DrpoLoss, DrpoUnweightedLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.gspo import GspoLoss
from megatron_drpo.losses.mask_drpo import MaskDrpoLoss
from megatron_drpo.losses.registry import LOSSES, build_loss, check_loss
from megatron_drpo.losses.spo import SpoLoss, SpoUnweightedLoss
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens

README = (Path(megatron_drpo.losses.__file__).parent / "README.md").read_text()
KNOWN = (
    "drpo, drpo_unweighted, mask_drpo, spo, spo_unweighted, dppo_binary_tv, dppo_binary_kl, dppo_topk_tv, "
    "dppo_topk_kl, grpo, gspo, cispo, surrogate"
)

WriteModule = Callable[[str, str], None]


def test_each_name_builds_its_loss_from_its_own_keys() -> None:
    config = LossConfig(
        delta=0.07,
        epsilon=0.3,
        mask_high=0.12,
        mask_low=0.11,
        ratio_cap=5.0,
        num_topk=9,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=2.5,
    )
    expected: dict[str, Loss] = {
        "drpo": DrpoLoss(delta=0.07),
        "drpo_unweighted": DrpoUnweightedLoss(delta=0.07),
        "mask_drpo": MaskDrpoLoss(delta=0.07, mask_high=0.12, mask_low=0.11),
        "spo": SpoLoss(epsilon=0.3),
        "spo_unweighted": SpoUnweightedLoss(epsilon=0.3),
        "dppo_binary_tv": DppoBinaryTvLoss(mask_high=0.12, mask_low=0.11, ratio_cap=5.0),
        "dppo_binary_kl": DppoBinaryKlLoss(mask_high=0.12, mask_low=0.11, ratio_cap=5.0),
        "dppo_topk_tv": DppoTopkTvLoss(mask_high=0.12, mask_low=0.11, ratio_cap=5.0, num_ids=9),
        "dppo_topk_kl": DppoTopkKlLoss(mask_high=0.12, mask_low=0.11, ratio_cap=5.0, num_ids=9),
        "grpo": GrpoLoss(clip_low=0.1, clip_high=0.3, dual_clip=2.5),
        "gspo": GspoLoss(clip_low=0.1, clip_high=0.3),
        "cispo": CispoLoss(clip_low=0.1, clip_high=0.3),
        "surrogate": SurrogateLoss(),
    }
    assert list(LOSSES) == list(expected)
    for name, loss in expected.items():
        config.name = name
        assert check_loss(config) == []
        built = build_loss(config)
        assert built == loss
        assert type(built) is type(loss)


def test_mask_low_is_mask_high_when_not_given() -> None:
    for name in ("mask_drpo", "dppo_binary_tv", "dppo_topk_kl"):
        loss = build_loss(LossConfig(name=name, mask_high=0.12))
        assert isinstance(loss, MaskDrpoLoss | DppoBinaryTvLoss | DppoTopkKlLoss)
        assert loss.mask_low == 0.12


def test_an_unknown_name_lists_the_known_ones() -> None:
    config = LossConfig(name="drp0")
    (problem,) = check_loss(config)
    assert problem == f"algorithm.loss.name=drp0: unknown loss; known are {KNOWN}, or module:function"
    with pytest.raises(ConfigError, match="known are drpo, drpo_unweighted"):
        build_loss(config)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (":build", f"expected {KNOWN} or module:function"),
        ("loss_absent:build", "module loss_absent cannot be imported: ModuleNotFoundError"),
        ("loss_raises:build", "module loss_raises cannot be imported: ZeroDivisionError: division by zero"),
        ("loss_wrong:biuld", "module loss_wrong has no function biuld"),
        ("loss_wrong:DELTA", "module loss_wrong has no function DELTA"),
        (
            "loss_wrong:two",
            "expected a function of one argument, the LossConfig: missing a required argument",
        ),
        ("loss_wrong:fails", "it raised KeyError: 'delta' ("),
        ("loss_wrong:number", "it returned 0.1, expected an instance of megatron_drpo.losses.Loss"),
        ("loss_wrong:Abstract", "it raised TypeError: "),
    ],
)
def test_every_problem_of_a_users_loss_is_one_sentence(
    name: str, problem: str, write_module: WriteModule
) -> None:
    write_module("loss_raises", "\n1 / 0\n")
    write_module(
        "loss_wrong",
        "from megatron_drpo.losses import Loss\n"
        "DELTA = 3\n"
        "def two(config, other): ...\n"
        "def fails(config): return {}['delta']\n"
        "def number(config): return config.delta\n"
        "class Abstract(Loss):\n"
        "    def __init__(self, config): ...\n",
    )
    config = LossConfig(name=name)
    (sentence,) = check_loss(config)
    assert sentence.startswith(f"algorithm.loss.name={name}: {problem}")
    with pytest.raises(ConfigError) as caught:
        build_loss(config)
    assert caught.value.problems == (sentence,)


def test_a_users_loss_gets_the_configuration(write_module: WriteModule) -> None:
    write_module(
        "loss_steeper",
        "from dataclasses import replace\n"
        "from megatron_drpo.losses import build_loss\n"
        "def build(config): return build_loss(replace(config, name='drpo', delta=config.delta / 2))\n",
    )
    config = LossConfig(name="loss_steeper:build", delta=0.1)
    assert check_loss(config) == []
    assert build_loss(config) == DrpoLoss(delta=0.05)


def test_readme_has_one_row_for_each_loss() -> None:
    losses, _, _ = README.partition("algorithm.correction")
    rows = re.findall(r"^\| `(\w+)` \|", losses, re.MULTILINE)
    assert rows == list(LOSSES)


def test_readme_example_is_a_loss_with_the_gradient_it_states(
    write_module: WriteModule,
    loss_grid: LossTokens,
    assert_gradient: Callable[[Loss, LossTokens, float], None],
) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(source.splitlines()) <= 25
    (name,) = re.findall(r"algorithm\.loss\.name=(\w+:\w+)", README)
    write_module(name.split(":")[0], source)
    config = LossConfig(name=name, epsilon=0.3)
    assert check_loss(config) == []
    loss = build_loss(config)
    assert_gradient(loss, loss_grid, 1e-12)
    # The README's formula, in probabilities.
    ratio = loss_grid.logprobs_N.exp() / loss_grid.anchor_logprobs_N.exp()
    expected = torch.where((ratio - 1).abs() <= 0.3, 1.0, 0.0).double()
    torch.testing.assert_close(loss.weight(loss_grid), expected)
