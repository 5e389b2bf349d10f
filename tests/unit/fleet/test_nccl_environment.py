"""The variables of NCCL, against what SGLang's own rule gives in each case."""

from __future__ import annotations

import pytest

from megatron_drpo.fleet.nccl_environment import build_nccl_environment


@pytest.mark.parametrize(
    ("arguments", "environ", "cumem", "nvls"),
    [
        ([], {}, "0", "0"),
        ([], {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "2"}, "1", "2"),
        (["--enable-nccl-nvls"], {"NCCL_NVLS_ENABLE": "0"}, "0", "1"),
        (["--enable-symm-mem"], {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}, "1", "1"),
    ],
)
def test_the_users_choice_holds_unless_an_argument_needs_another(
    arguments: list[str], environ: dict[str, str], cumem: str, nvls: str
) -> None:
    expected = {"NCCL_CUMEM_ENABLE": cumem, "NCCL_NVLS_ENABLE": nvls}
    assert build_nccl_environment(["--port", "1", *arguments], environ) == expected
