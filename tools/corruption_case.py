"""One corruption: what it starts from, what must notice it, and what the message must name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tools.damage import Damage


class Kind(StrEnum):
    """What a case starts from."""

    plain_hf = "HF folder"
    """Of several files, without hashes."""
    hf = "converted HF folder"
    checkpoint = "checkpoint"
    """Converted: with hashes."""
    plain_checkpoint = "checkpoint without hashes"


class Action(StrEnum):
    """What must notice."""

    to_megatron = "to Megatron"
    to_hf = "to HF"
    verify = "verify"


Setting = Callable[[Path, Path], None]
"""Called in the process that converts, with source and target, before it does."""


@dataclass(frozen=True)
class Case:
    """One corruption, and what the message must name."""

    name: str
    kind: Kind
    action: Action
    names: str
    """Regular expression."""
    damage: Damage = lambda folder: None
    setting: Setting = lambda source, target: None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}".replace(" ", "_")
