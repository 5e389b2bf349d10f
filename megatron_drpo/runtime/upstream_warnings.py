"""Warnings and log messages of others that every run would print, and that tell its user nothing new.

Of what Megatron-Core says, the start-up banner says the same in one line.
"""

from __future__ import annotations

import logging
import os
import warnings

EXPECTED = (
    "Apex is not installed",
    "Transformer Engine and Apex are not",
    "full scope is deprecated",
    "If you are using transformer_engine as the transformer implementation",
    "The .grad attribute of a Tensor that is not a leaf",
    "`sequence_parallel` is set to",
    "When using sequence parallelism it is recommended to set",
    "When using async grad allreduce it is recommended to set",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`load_state_dict` is deprecated and will be removed",
    "Please use DTensor instead",
    # megatron-core 0.19: of a model that is merely imported, and of loading without collectives
    "MimoModelConfig is experimental",
    "torch.distributed is disabled",
    "The argument order of load has been changed",
    # Python: of the semaphores of a rank that was ended, which it says while it removes them
    "resource_tracker",
)
"""How each begins; no commas, which PYTHONWARNINGS would split at."""
LOGGED = {
    # a machine with a CUDA toolkit and no GPU
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # megatron-core 0.19: of what the project calls as both of its versions have it
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""A logger -> how the message begins that it leaves out."""


def ignore_expected_warnings() -> None:
    """Warnings in this process and those it starts, log messages in this process alone. Call it before
    megatron.core is imported: most come from there."""
    for start in EXPECTED:
        warnings.filterwarnings("ignore", message=start)
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_news)
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in EXPECTED))


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED[record.name])
