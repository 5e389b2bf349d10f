"""What NCCL and torch's allocator must find in a trainer rank's environment, by the path of weight sync."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_drpo.config.schema import Config, Mode, WeightSyncPath
from megatron_drpo.fleet.nccl_environment import build_nccl_environment

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch reads the first of them that is set."""
_EXPANDABLE = "expandable_segments:True"


def build_rank_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """What to add before CUDA is used on a rank with a GPU.

    Args:
        config: resolved.
        environ: of the rank. What it says of the allocator stays.
    """
    sends_weights = config.train.mode is Mode.rl
    path = config.weight_sync.path
    added: dict[str, str] = {}
    if sends_weights and path is WeightSyncPath.distributed:
        added |= build_nccl_environment(config.rollout.sglang.arguments, environ)
    # Packed micro-batches differ in size; expandable segments keep what one leaves free usable for the next.
    shares_memory = sends_weights and path is WeightSyncPath.tensor
    if not shares_memory and not any(name in environ for name in ALLOCATOR_VARIABLES):
        added[ALLOCATOR_VARIABLES[0]] = _EXPANDABLE
    return added


def find_expandable_segments(environ: Mapping[str, str]) -> str | None:
    """The setting by which torch's memory comes in expandable segments, or None.

    In most containers another process may not open such memory (`pidfd_getfd: Operation not permitted`,
    https://github.com/pytorch/pytorch/issues/165685).
    """
    setting = next((f"{name}={environ[name]}" for name in ALLOCATOR_VARIABLES if name in environ), "")
    return setting if _EXPANDABLE.lower() in setting.lower().replace(" ", "") else None
