"""integrity.json: Megatron's list of a checkpoint's files and their SHA-256.

megatron-core >= 0.19 compares all of them in `load(verify_integrity=True)`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_drpo.errors import CheckpointError

INTEGRITY_FILE = "integrity.json"
_DATA_SUFFIX = ".distcp"


def read_integrity(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256 in hexadecimal digits; None if the checkpoint has no such list.

    Raises:
        CheckpointError: it is damaged.
    """
    file = folder / INTEGRITY_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
        if values["algorithm"] != "sha256":
            raise ValueError(f"'algorithm' is {values['algorithm']!r}")
        return {str(name): str(digest) for name, digest in values["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error


def check_description(folder: Path) -> None:
    """Compare all but the tensors' files with integrity.json, if the checkpoint has one: a few megabytes.

    Raises:
        CheckpointError: names the files that are missing or differ.
    """
    listed = read_integrity(folder)
    if listed is None:
        return
    problems: list[str] = []
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing, but {INTEGRITY_FILE} names it")
        elif file.suffix != _DATA_SUFFIX and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            problems.append(f"{file}: damaged: its SHA-256 is not the one in {INTEGRITY_FILE}")
    if problems:
        raise CheckpointError("; ".join(problems[:20]))
