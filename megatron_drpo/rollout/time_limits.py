"""How long a server may take over what is known of it: it starts, or it loads weights from a disk.

Both take the longer the larger the model is. Limits are generous: they end what never would end.
"""

from __future__ import annotations

from pathlib import Path

from megatron_drpo.config.schema import RolloutConfig, RolloutEngineName, WeightSyncConfig

READ_BYTES_PER_S = 100e6
"""From a file system that several servers read at once; a local disk is ten to fifty times as fast."""
_START_S = 120.0
"""Imports, the model's tokenizer, the first token."""
_START_SGLANG_S = 600.0
"""Besides, kernels that are compiled and CUDA graphs that are captured for every batch size."""
_RELOAD_S = 120.0


def weights_bytes(model_path: str | Path) -> int:
    """Bytes of the weights in an HF folder; 0 where there is none."""
    try:
        return sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors"))
    except OSError:  # told by who reads the model
        return 0


def startup_limit_s(config: RolloutConfig, num_bytes: int = 0) -> float:
    """`rollout.startup_timeout_s`, or what follows from the bytes of the model's weights."""
    if config.startup_timeout_s is not None:
        return config.startup_timeout_s
    starts_sglang = config.engine is RolloutEngineName.sglang and not config.endpoints
    return round((_START_SGLANG_S if starts_sglang else _START_S) + num_bytes / READ_BYTES_PER_S)


def reload_limit_s(config: WeightSyncConfig, num_bytes: int = 0) -> float:
    """`weight_sync.disk_timeout_s`, or what follows from the bytes of the model's weights."""
    if config.disk_timeout_s is not None:
        return config.disk_timeout_s
    return round(_RELOAD_S + num_bytes / READ_BYTES_PER_S)
