"""Buckets survive the wire; nothing but tensors does."""

from __future__ import annotations

import base64
import inspect
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from megatron_drpo.errors import WeightSyncError
from megatron_drpo.weight_sync import wire
from megatron_drpo.weight_sync.bucket import Bucket, BucketPacker
from megatron_drpo.weight_sync.wire import (
    NamedTensors,
    decode_bucket,
    decode_named_tensors,
    encode_bucket,
    encode_cuda_handle,
    with_device_uuid,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]


CPU = torch.device("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def bucket_of(*tensors: tuple[str, torch.Tensor]) -> Bucket:
    """One that fills a part of the packer's buffer."""
    [bucket] = BucketPacker(2**16, CPU).pack(tensors)
    return bucket


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=8
    )
)
def test_round_trip_is_exact(specs: list[tuple[torch.dtype, list[int], bool]]) -> None:
    torch.manual_seed(0)
    tensors = []
    for i, (dtype, shape, transpose) in enumerate(specs):
        tensor = (torch.randn(shape) * 50).to(dtype)
        tensors.append((f"t{i}", tensor.T if transpose and tensor.dim() == 2 else tensor))
    decoded: NamedTensors = []
    for bucket in BucketPacker(2**16, CPU).pack(tensors):
        decoded += decode_bucket(encode_bucket(bucket).decode())
    assert [name for name, _ in decoded] == [name for name, _ in tensors]
    for (_, actual), (_, expected) in zip(decoded, tensors, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(bits(actual), bits(expected))


def test_the_payload_names_only_what_servers_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library has put another loader of storages into torch, as megatron-core 0.19 does."""
    monkeypatch.setattr(torch.storage, "_load_from_bytes", bits)
    payload = base64.b64decode(encode_bucket(bucket_of(("w", torch.ones(3)))))
    texts = [value for _, value, _ in pickletools.genops(payload) if isinstance(value, str)]
    packages = ("torch", "megatron_drpo", "sglang", __name__.split(".")[0])
    modules = {text.split()[0] for text in texts if text.split(".")[0].split()[0] in packages}
    assert modules == {"torch", "torch._utils", "torch.storage", "sglang.srt.weight_sync.tensor_bucket"}


@dataclass
class FlattenedTensorMetadata:
    """SGLang's, field by field."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def test_any_pickle_reads_what_sglang_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose unpickler allows the same globals."""
    names = ["sglang", "sglang.srt", "sglang.srt.weight_sync", "sglang.srt.weight_sync.tensor_bucket"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules[names[-1]], "FlattenedTensorMetadata", FlattenedTensorMetadata, raising=False
    )
    weight = torch.randn(3, 4, requires_grad=True)
    payload = encode_bucket(bucket_of(("w", weight), ("b", torch.ones(2, dtype=torch.bfloat16))))
    value = pickle.loads(base64.b64decode(payload))
    assert value.keys() == {"flattened_tensor", "metadata"}
    flat = value["flattened_tensor"]
    assert torch.equal(flat, torch.cat([bits(weight.detach()), bits(torch.ones(2, dtype=torch.bfloat16))]))
    assert flat.untyped_storage().nbytes() == 3 * 4 * 4 + 2 * 2, "not the packer's buffer"
    assert not flat.requires_grad
    assert value["metadata"] == [
        FlattenedTensorMetadata("w", torch.Size([3, 4]), torch.float32, 0, 48, 48),
        FlattenedTensorMetadata("b", torch.Size([2]), torch.bfloat16, 48, 52, 4),
    ]


def test_a_plain_pickle_of_tensors_is_read() -> None:
    tensors = [("a", torch.randn(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]
    decoded = decode_named_tensors(base64.b64encode(pickle.dumps(tensors)).decode())
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(decoded, tensors, strict=True))


def test_all_tensors_share_one_storage() -> None:
    """Small expert matrices must not cost a pickled storage each."""
    tensors = [(f"e{i}", torch.full((4, 4), float(i))) for i in range(100)]
    payload = encode_bucket(bucket_of(*tensors))
    assert len(payload) < len(base64.b64encode(pickle.dumps(tensors))) / 2
    decoded = decode_bucket(payload.decode())
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in decoded}) == 1


def test_a_bucket_on_a_gpu_is_one_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors it holds: torch hangs a deleter on the storage for each."""
    handles: list[torch.Tensor] = []

    def reduce_tensor(tensor: torch.Tensor) -> tuple[object, tuple[Any, ...]]:
        handles.append(tensor)
        return reductions.rebuild_cuda_tensor, (*"abcdef", 0, *"ghijklm")

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    properties = {0: SimpleNamespace(uuid=UUID(int=5))}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    bucket = bucket_of(*((f"e{i}", torch.ones(4)) for i in range(100)))
    payload = base64.b64decode(encode_cuda_handle(bucket))
    assert handles == [bucket.data]
    names = [value for op, value, _ in pickletools.genops(payload) if op.name == "GLOBAL"]
    assert names.count("torch.multiprocessing.reductions rebuild_cuda_tensor") == 1


class _Hostile:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # by torch.load, of the inner pickle
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    nested = pickle.dumps(_Hostile(os.mkdir, str(target)))
    attacks = {
        "posix.mkdir": _Hostile(os.mkdir, str(target)),
        "builtins.eval": _Hostile(eval, f"__import__('os').mkdir({str(target)!r})"),
        "torch.serialization.load": _Hostile(torch.load, str(target)),
        "cannot be read": _Hostile(torch.storage._load_from_bytes, nested),
    }
    for message, attack in attacks.items():
        payload = base64.b64encode(pickle.dumps([("w", attack)])).decode()
        for decode in (decode_bucket, decode_named_tensors):
            with pytest.raises(WeightSyncError, match=message):
                decode(payload)
    assert not target.exists()


@pytest.mark.parametrize(
    "value", [{"w": torch.ones(1)}, [torch.ones(1)], [("w", 1.0)], [(1, torch.ones(1))], [("w",)], "w"]
)
def test_other_values_are_refused(value: object) -> None:
    payload = base64.b64encode(pickle.dumps(value)).decode()
    with pytest.raises(WeightSyncError, match="not a list of"):
        decode_named_tensors(payload)
    with pytest.raises(WeightSyncError, match="not a flattened bucket"):
        decode_bucket(payload)


@pytest.mark.parametrize(
    ("shape", "start", "end"), [((3,), 0, 8), ((2,), 4, 16), ((2,), -4, 4), ((2,), 1, 9), (("x",), 0, 8)]
)
def test_a_tensor_outside_its_bucket_is_refused(shape: tuple[Any, ...], start: int, end: int) -> None:
    """The bucket holds 12 bytes."""
    bucket = bucket_of(("w", torch.ones(3)))
    fields = ("w", shape, torch.float32, start, end, end - start)
    metadata = wire._Call(wire._SGLANG_MODULE, wire._SGLANG_CLASS, fields)
    buffer = io.BytesIO()
    wire._CallPickler(buffer).dump({"flattened_tensor": bucket.data.clone(), "metadata": [metadata]})
    with pytest.raises(WeightSyncError, match="'w' does not fit"):
        decode_bucket(base64.b64encode(buffer.getvalue()).decode())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_payloads_are_errors_of_ours() -> None:
    """Cut or flipped anywhere, and never a crash."""
    data = bytearray(
        base64.b64decode(encode_bucket(bucket_of(("w", torch.randn(5, 5)), ("v", torch.ones(2)))))
    )
    generator = random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = data[: generator.randrange(len(data))] if generator.random() < 0.3 else bytearray(data)
        if damaged:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        try:
            decode_bucket(base64.b64encode(damaged).decode())
        except WeightSyncError:
            num_refused += 1
    assert num_refused > 100
    with pytest.raises(WeightSyncError, match="cannot be read"):
        decode_bucket("no base64!")


def test_handles_name_the_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the seventh argument of torch's rebuild_cuda_tensor; the others stay."""
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[6] == "storage_device"
    properties = SimpleNamespace(uuid=UUID(int=5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: properties}.__getitem__)
    assert with_device_uuid((*"abcdef", 3, "h", "i")) == (*"abcdef", str(UUID(int=5)), "h", "i")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_handle_maps_the_senders_memory() -> None:
    """Another process sees the values, without a copy: also those written after the handle was made."""
    weights = torch.arange(8, dtype=torch.float32, device="cuda")
    [bucket] = BucketPacker(64, weights.device).pack([("v", weights[:2]), ("w", weights[2:6].view(2, 2))])
    payload = encode_cuda_handle(bucket)
    for _, tensor in bucket.tensors():
        tensor.mul_(2)
    torch.cuda.synchronize()
    code = (
        "import base64, pickle, sys, torch\n"
        "from collections import namedtuple\n"
        "from types import SimpleNamespace\n"
        "from torch.multiprocessing import reductions\n"
        "original = reductions.rebuild_cuda_tensor\n"
        "def by_uuid(*arguments):\n"
        "    assert arguments[6] == str(torch.cuda.get_device_properties(0).uuid)\n"
        "    return original(*arguments[:6], 0, *arguments[7:])\n"
        "reductions.rebuild_cuda_tensor = by_uuid\n"
        "Metadata = namedtuple('Metadata', 'name shape dtype start end size')\n"
        "module = SimpleNamespace(FlattenedTensorMetadata=Metadata)\n"
        "for name in ('sglang', 'sglang.srt', 'sglang.srt.weight_sync'):\n"
        "    sys.modules[name] = SimpleNamespace(__path__=[])\n"
        "sys.modules['sglang.srt.weight_sync.tensor_bucket'] = module\n"
        "value = pickle.loads(base64.b64decode(sys.stdin.buffer.read()))\n"
        "flat = value['flattened_tensor']\n"
        "for meta in value['metadata']:\n"
        "    print(meta.name, flat[meta.start : meta.end].view(meta.dtype).view(meta.shape).tolist())\n"
        "del flat, value\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], input=payload, capture_output=True, check=True
    ).stdout
    assert output.decode().splitlines() == ["v [0.0, 2.0]", "w [[4.0, 6.0], [8.0, 10.0]]"]
