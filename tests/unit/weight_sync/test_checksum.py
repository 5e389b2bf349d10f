"""The checksum sees every change and no order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest
import torch

from megatron_drpo.weight_sync.checksum import WeightsChecksum, compute_checksum, tensor_digest

TENSORS = [
    ("a.weight", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("b.weight", torch.tensor([0.5, -2.0], dtype=torch.bfloat16)),
    ("c.scale", torch.tensor(3.0)),
]


def test_digest_by_hand() -> None:
    data = b"a.weight|torch.float32|(2, 3)|" + struct.pack("<6f", *range(6))
    expected = hashlib.blake2b(data, digest_size=8).hexdigest()
    assert f"{tensor_digest(*TENSORS[0]):016x}" == expected
    assert WeightsChecksum().add(*TENSORS[0]) == expected
    assert compute_checksum(TENSORS[:1]) == expected


def test_order_does_not_matter_and_the_sum_wraps() -> None:
    total = sum(tensor_digest(name, tensor) for name, tensor in TENSORS) % 2**64
    assert compute_checksum(TENSORS) == compute_checksum(reversed(TENSORS)) == f"{total:016x}"
    assert compute_checksum([]) == "0" * 16


def test_strides_do_not_matter_but_values_do() -> None:
    name, tensor = TENSORS[0]
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    assert tensor_digest(name, strided) == tensor_digest(name, tensor)


CHANGES: dict[str, Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]] = {
    "name": lambda name, tensor: ("a.weighT", tensor),
    "shape": lambda name, tensor: (name, tensor.reshape(3, 2)),
    "dtype": lambda name, tensor: (name, tensor.view(torch.int32)),
    "one bit": lambda name, tensor: (name, tensor.nextafter(torch.tensor(9.0))),
    "order of rows": lambda name, tensor: (name, tensor.flip(0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_is_seen(kind: str) -> None:
    assert tensor_digest(*CHANGES[kind](*TENSORS[0])) != tensor_digest(*TENSORS[0])
