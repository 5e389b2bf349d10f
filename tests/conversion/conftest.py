"""Fixtures of the conversion tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conversion.run import run_conversion
from conversion.to_megatron import ToMegatron, ToMegatronOptions


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, hf_model: Callable[[str], Path]
) -> Callable[[str], Path]:
    """`checkpoint(name)`: one of the `hf_model`s, converted; not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            conversion = ToMegatron(hf_model(name), ToMegatronOptions())
            run_conversion(conversion, root / name, num_workers=1)
        return root / name

    return folder
