"""A checkpoint takes a rank's own share of the optimizer's state, not everybody's.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_drpo.config.schema import ParallelConfig
from tools.checkpoint_memory import Memory, measure

EP2_DP4 = ParallelConfig(expert_parallel_size=2, data_parallel_size=4)
"""Dense parameters are shared by four ranks, experts by two."""


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_save_takes_its_share_and_one_bucket(
    run_distributed: Callable[..., list[Memory]], hf_model: Callable[[str], Path], tmp_path: Path
) -> None:
    ranks = run_distributed(measure, 4, str(hf_model("moe_bf16")), EP2_DP4, str(tmp_path), timeout_s=100.0)
    for memory in ranks:
        assert memory.share + memory.bucket < memory.held / 1.5, "else the limit shows nothing"
        assert 0 < memory.save_peak <= memory.share + memory.bucket
        assert 0 < memory.load_peak <= memory.share + memory.bucket + memory.weights
