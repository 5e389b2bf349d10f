"""What a rank's environment gets, by how weights leave it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Mode,
    PolicyConfig,
    TrainConfig,
    WeightSyncConfig,
    WeightSyncPath,
)
from megatron_drpo.weight_sync.rank_environment import build_rank_environment, find_expandable_segments

EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def make_config(path: WeightSyncPath, mode: Mode = Mode.rl) -> Config:
    return Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path="unused"),
        train=TrainConfig(mode=mode),
        weight_sync=WeightSyncConfig(path=path),
    )


@pytest.mark.parametrize(
    ("path", "mode", "expected"),
    [
        (WeightSyncPath.tensor, Mode.rl, {}),
        (WeightSyncPath.tensor, Mode.sft, EXPANDABLE),
        (WeightSyncPath.disk, Mode.rl, EXPANDABLE),
        (WeightSyncPath.distributed, Mode.rl, EXPANDABLE | NCCL),
        (WeightSyncPath.distributed, Mode.sft, EXPANDABLE),
    ],
)
def test_what_is_added(path: WeightSyncPath, mode: Mode, expected: dict[str, str]) -> None:
    """Memory that servers open must not come in expandable segments; all other memory does."""
    assert build_rank_environment(make_config(path, mode), {}) == expected


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_says_of_the_allocator_stays(name: str) -> None:
    environ = {name: "max_split_size_mb:512"}
    assert build_rank_environment(make_config(WeightSyncPath.disk), environ) == {}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512, expandable_segments: true"},
            "PYTORCH_ALLOC_CONF=max_split_size_mb:512, expandable_segments: true",
        ),
        (
            EXPANDABLE | {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None),
    ],
)
def test_expandable_segments_are_found(environ: dict[str, str], expected: str | None) -> None:
    assert find_expandable_segments(environ) == expected


def test_torch_reads_the_environment_after_it_is_imported() -> None:
    """A rank adds the setting when it knows its configuration, and has imported torch by then."""
    code = (
        "import os, torch; os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'expandable_segments:True'; "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "expandable_segments:True"
