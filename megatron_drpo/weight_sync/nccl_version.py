"""The NCCL of an environment: imported here, and run as a script by the interpreter of another one.

As a script it prints one line of JSON: {"nccl": 22705, "cuda": "12.8"}, where 22705 is NCCL 2.27.5 and either
may be null.
"""

from __future__ import annotations

import ctypes
import json


def loaded_version() -> int | None:
    """Of the library that torch has loaded, as NCCL counts; None without one."""
    import torch

    if not torch.distributed.is_nccl_available():
        return None
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except OSError:  # a part of torch itself
        major, minor, patch = torch.cuda.nccl.version()[:3]
        return int(major * 10_000 + minor * 100 + patch)
    return number.value


def cuda_version() -> str | None:
    """That torch was built for."""
    import torch

    return torch.version.cuda


if __name__ == "__main__":
    print(json.dumps({"nccl": loaded_version(), "cuda": cuda_version()}))
