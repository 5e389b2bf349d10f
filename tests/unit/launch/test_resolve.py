"""What follows from other settings is concrete once the configuration is resolved, and only then."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config.io import load_config, to_yaml
from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Mode,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    RolloutEngineName,
    TrainConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.launch.resolve import resolve_config


def make_config(**sections: Any) -> Config:
    return Config(
        data=DataConfig(train_path="train.jsonl"), policy=PolicyConfig(model_path="model"), **sections
    )


@pytest.mark.parametrize(
    ("platform", "expected"), [(PlatformName.cpu, "tensor"), (PlatformName.cuda, "distributed")]
)
def test_the_path_of_weights(platform: PlatformName, expected: str, tmp_path: Path) -> None:
    """It is settled for every reader of the resolved file."""
    config = make_config(platform=platform, rollout=RolloutConfig(endpoints=["http://there:30000"]))
    resolve_config(config)
    assert config.weight_sync.path == expected
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([f"config={tmp_path / 'config.yaml'}"]) == config


def test_limits_that_follow_from_the_size_of_the_model(tmp_path: Path) -> None:
    """The weights of Qwen3-30B-A3B: a server is not given up while it still reads them."""
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 61 * 10**9)  # sparse: no byte is written
    config = make_config(rollout=RolloutConfig(engine=RolloutEngineName.sglang))
    config.policy.model_path = str(tmp_path)
    resolve_config(config)
    assert config.rollout.startup_timeout_s == 600 + 610
    assert config.weight_sync.disk_timeout_s == 120 + 610
    assert list(config.problems()) == []


def test_what_is_given_stays() -> None:
    sync = WeightSyncConfig(path=WeightSyncPath.disk, disk_timeout_s=7.0)
    config = make_config(rollout=RolloutConfig(startup_timeout_s=5.0), weight_sync=sync)
    expected = copy.deepcopy(config)
    resolve_config(config)
    assert config == expected


def test_supervised_training_has_no_servers() -> None:
    config = make_config(train=TrainConfig(mode=Mode.sft))
    resolve_config(config)
    assert config.weight_sync.path is WeightSyncPath.auto
    assert config.rollout.startup_timeout_s is None
