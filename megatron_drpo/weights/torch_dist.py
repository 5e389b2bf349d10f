"""A torch_dist checkpoint (Megatron's dist_checkpointing on torch's DCP): where it lies, what is in it.

No Megatron here.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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

_DCP_CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("_codecs", "encode"),
}


def is_torch_dist(path: Path) -> bool:
    """A complete checkpoint lies in this very folder."""
    return (path / METADATA_FILE).is_file() and (path / CONFIG_FILE).is_file()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means by this folder.

    It may be the checkpoint itself, Megatron-LM's folder of checkpoints, a run folder of the trainer, or that
    one's `checkpoints`.

    Raises:
        CheckpointError: there is none, it is not complete, or a pointer to it is damaged.
    """
    root = Path(path)
    candidate = root
    for pointer in (root / TRACKER_FILE, root / "latest", root / "checkpoints" / "latest"):
        if pointer.is_file():
            name = read_pointer(pointer)
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


def read_pointer(file: Path) -> str:
    """The name in a file that points to a checkpoint beside it.

    Raises:
        CheckpointError: it cannot be read, or holds anything but a name.
    """
    try:
        name = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} does not name a checkpoint: {error}") from error
    if re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) is None:
        raise CheckpointError(f"{file} does not name a checkpoint, such as step_000010: {name[:100]!r}")
    return name


def read_metadata(file: Path) -> Metadata:
    """DCP's table of a checkpoint.

    It is a pickle: only the classes of torch's distributed checkpoints are allowed in it, so that somebody
    else's checkpoint cannot run code.

    Raises:
        CheckpointError: it is damaged, or holds what no checkpoint has.
    """
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    # A damaged pickle raises whatever its opcodes happen to meet.
    except Exception as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{file}: damaged: no table of tensors")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_public_class = module in _DCP_CLASSES and name[0].isupper()
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_public_class or is_dtype or (module, name) in _ALLOWED_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")
