"""Ways to damage model folders and checkpoints, for tests of what reads them."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.weights.hf_folder import INDEX_FILE

Damage = Callable[[Path], None]
"""Damages a folder."""


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    """Of the byte at `position`; negative ones count from the end."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def flip(name: str, text: str, *, at: int = 0, bit: int = 0) -> Damage:
    """Flip a bit of the byte `at` bytes after the beginning of the first `text` in a file.

    Args:
        name: of the file in the folder; a glob pattern means the first that has `text`.
        text: as Latin-1, so that it can be any bytes.
    """

    def damage(folder: Path) -> None:
        pattern = text.encode("latin-1")
        for file in sorted(folder.glob(name)):
            position = file.read_bytes().find(pattern)
            if position >= 0:
                flip_bit(file, position + at, bit)
                return
        raise LookupError(f"{folder}: no {text!r} in {name}")

    return damage


def flip_at(name: str, position: int, bit: int = 0) -> Damage:
    return lambda folder: flip_bit(_file(folder, name), position, bit)


def truncate(name: str, num_bytes: int) -> Damage:
    """Cut `num_bytes` off the end, or leave nothing if there are not so many."""

    def damage(folder: Path) -> None:
        file = _file(folder, name)
        os.truncate(file, max(0, file.stat().st_size - num_bytes))

    return damage


def append(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        with _file(folder, name).open("ab") as stream:
            stream.write(content)

    return damage


def overwrite(name: str, content: bytes) -> Damage:
    return lambda folder: _discard(_file(folder, name).write_bytes(content))


def create(name: str) -> Damage:
    """An empty file."""
    return lambda folder: (folder / name).touch()


def remove(name: str) -> Damage:
    return lambda folder: _file(folder, name).unlink()


def swap(first: str, second: str) -> Damage:
    """Two files exchange their names."""

    def damage(folder: Path) -> None:
        one, other = _file(folder, first), _file(folder, second)
        one.rename(folder / "swapped")
        other.rename(one)
        (folder / "swapped").rename(other)

    return damage


def edit_json(name: str, edit: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def set_config(name: str = "config.json", **values: object) -> Damage:
    return edit_json(name, lambda config: config.update(values))


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object], having: str) -> Damage:
    """Rewrite the safetensors file that has the tensor `having`, and the index with it."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        weight_map = index["weight_map"]
        file = weight_map[having]
        tensors = load_file(folder / file)
        before = set(tensors)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        for name in before - set(tensors):
            del weight_map[name]
        weight_map.update(dict.fromkeys(set(tensors) - before, file))
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return damage


def set_header_size(name: str, change: int) -> Damage:
    """Of a safetensors file, by `change` bytes."""

    def damage(folder: Path) -> None:
        content = bytearray(_file(folder, name).read_bytes())
        content[:8] = struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + change)
        _file(folder, name).write_bytes(content)

    return damage


def several(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


# ---------------------------------------------------------------------------- of the running process


def limit_file_size(num_bytes: int) -> None:
    """What a full disk does to a write, for this process and its children, without privileges."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def obey_permissions() -> None:
    """Have files' permissions hold for this process even if it is root's: it gives up its capabilities.

    https://man7.org/linux/man-pages/man2/capset.2.html
    """
    header = _CapabilityHeader(0x20080522, 0)  # version 3; this process
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _file(folder: Path, name: str) -> Path:
    """A file, or the last one that matches a pattern."""
    files = sorted(folder.glob(name))
    if not files:
        raise FileNotFoundError(folder / name)
    return files[-1]


def _discard(_: object) -> None:
    return None


def without(*names: str) -> Callable[[Mapping[str, object]], None]:
    """Edit: remove keys."""

    def edit(values: Any) -> None:
        for name in names:
            del values[name]

    return edit
