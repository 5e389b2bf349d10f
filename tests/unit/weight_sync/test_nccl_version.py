"""The script that another environment's interpreter runs."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from megatron_drpo.weight_sync import nccl_version


def test_as_a_script_it_says_what_the_module_says() -> None:
    """Without this package: another environment does not have it."""
    command = [sys.executable, "-P", nccl_version.__file__]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)
    assert told == {"nccl": nccl_version.loaded_version(), "cuda": torch.version.cuda}
    if not torch.distributed.is_nccl_available():
        assert told["nccl"] is None
