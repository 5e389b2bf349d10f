"""What follows from other settings is concrete once the configuration is resolved, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.config import (
    Config,
    DataConfig,
    Mode,
    PlatformName,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.config_io import load_config, to_yaml
from megatron_drpo.resolve import resolve_config


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


def test_what_is_given_stays() -> None:
    config = make_config(weight_sync=WeightSyncConfig(path=WeightSyncPath.disk))
    resolve_config(config)
    assert config == make_config(weight_sync=WeightSyncConfig(path=WeightSyncPath.disk))


def test_supervised_training_has_no_servers() -> None:
    config = make_config(train=TrainConfig(mode=Mode.sft))
    resolve_config(config)
    assert config.weight_sync.path is WeightSyncPath.auto
