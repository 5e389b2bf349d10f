"""Warnings of others that every run would print, and that tell its user nothing new.

Of what Megatron-Core says, the start-up banner says the same in one line.
"""

from __future__ import annotations

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


def ignore_expected_warnings() -> None:
    """In this process and those it starts. Call it before megatron.core is imported: most come from there."""
    for start in EXPECTED:
        warnings.filterwarnings("ignore", message=start)
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in EXPECTED))
