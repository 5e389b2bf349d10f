"""Two variables of NCCL that the ranks of one communicator must have alike, or they cannot map each other's
memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CUMEM, NVLS = "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"
SYMMETRIC_FLAG, NVLS_FLAG = "--enable-symm-mem", "--enable-nccl-nvls"


def build_nccl_environment(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The two as SGLang sets them: if nobody else has, and always for arguments that need them
    (https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/entrypoints/engine.py,
    `_set_envs_and_config`).

    Args:
        arguments: of the server.
        environ: of the process that starts it.
    """
    symmetric, nvls = SYMMETRIC_FLAG in arguments, NVLS_FLAG in arguments
    return {
        CUMEM: "1" if symmetric else environ.get(CUMEM, "0"),
        NVLS: "1" if symmetric or nvls else environ.get(NVLS, "0"),
    }
