"""Where a torch_dist checkpoint lies (Megatron's dist_checkpointing on torch's DCP); no Megatron here."""

from __future__ import annotations

from pathlib import Path

from megatron_drpo.errors import CheckpointError

METADATA_FILE = ".metadata"
"""DCP's table of all tensors; written last, so a folder that has it is complete."""
CONFIG_FILE = "metadata.json"
"""Which format Megatron wrote."""
COMMON_FILE = "common.pt"
"""What is not sharded; megatron-core >= 0.19 keeps it beside the tensors instead."""
TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""In the folder above the checkpoints: `release`, or the number of the newest iteration."""

HF_FOLDER = "hf"
"""In a converted checkpoint: config.json and tokenizer of the model."""


def is_torch_dist(path: Path) -> bool:
    """A complete checkpoint lies in this very folder."""
    return (path / METADATA_FILE).is_file() and (path / CONFIG_FILE).is_file()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means by this folder.

    It may be the checkpoint itself, Megatron-LM's folder of checkpoints, a run folder of the trainer, or that
    one's `checkpoints`.

    Raises:
        CheckpointError: there is none, or it is not complete.
    """
    root = Path(path)
    candidate = root
    for pointer in (root / TRACKER_FILE, root / "latest", root / "checkpoints" / "latest"):
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8").strip()
            candidate = pointer.parent / (f"iter_{int(name):07d}" if name.isdecimal() else name)
            break
    if is_torch_dist(candidate):
        return candidate
    if not candidate.is_dir():
        raise CheckpointError(f"{candidate}: no such folder; give a torch_dist checkpoint")
    missing = [name for name in (METADATA_FILE, CONFIG_FILE) if not (candidate / name).is_file()]
    raise CheckpointError(
        f"{candidate}: not a complete torch_dist checkpoint: {' and '.join(missing)} missing"
    )
