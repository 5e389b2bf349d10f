"""Limits that grow with the model, unless they are given."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_drpo.config.schema import RolloutConfig, RolloutEngineName, WeightSyncConfig
from megatron_drpo.rollout.time_limits import reload_limit_s, startup_limit_s, weights_bytes

QWEN3_30B_BYTES = 61_064_245_248


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    """Of weights alone."""
    assert weights_bytes(tmp_path / "nowhere") == weights_bytes(tmp_path) == 0
    for name, size in {"model-1.safetensors": 40 * 10**9, "model-2.safetensors": 2, "old.bin": 7}.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)  # sparse: no byte is written
    assert weights_bytes(tmp_path) == 40 * 10**9 + 2


def test_starting() -> None:
    """Servers that exist already have nothing to compile."""
    own = RolloutConfig(engine=RolloutEngineName.sglang)
    others = RolloutConfig(engine=RolloutEngineName.sglang, endpoints=["http://there"])
    assert startup_limit_s(own, QWEN3_30B_BYTES) == 600 + 611
    assert (
        startup_limit_s(others, QWEN3_30B_BYTES) == startup_limit_s(RolloutConfig(), QWEN3_30B_BYTES) == 731
    )
    assert startup_limit_s(RolloutConfig()) == 120
    assert startup_limit_s(RolloutConfig(startup_timeout_s=7.5), QWEN3_30B_BYTES) == 7.5


def test_loading_from_a_disk() -> None:
    assert reload_limit_s(WeightSyncConfig(), QWEN3_30B_BYTES) == 120 + 611
    assert reload_limit_s(WeightSyncConfig(disk_timeout_s=7.5), QWEN3_30B_BYTES) == 7.5
