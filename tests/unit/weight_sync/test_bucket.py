"""What the packer yields, against the tensors it was given."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_drpo.weight_sync.bucket import BucketPacker

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]
CPU = torch.device("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=2)), min_size=1, max_size=12
    ),
    bucket_bytes=st.integers(1, 200),
)
def test_every_tensor_arrives_once_in_order(
    specs: list[tuple[torch.dtype, list[int]]], bucket_bytes: int
) -> None:
    """Buckets are full but not too full, aligned for every receiver, and the last one says so."""
    torch.manual_seed(0)
    tensors = [(f"t{i}", (torch.randn(shape) * 50).to(dtype)) for i, (dtype, shape) in enumerate(specs)]
    unpacked: list[tuple[str, torch.Tensor]] = []
    lasts: list[bool] = []
    for bucket in BucketPacker(bucket_bytes, CPU).pack(tensors):
        parts = list(bucket.tensors())
        assert bucket.data.nbytes == sum(part.nbytes for _, part in parts)
        assert bucket.data.nbytes <= bucket_bytes or len([part for _, part in parts if part.numel()]) == 1
        start = 0
        for _, part in parts:
            assert start % part.itemsize == 0
            start += part.nbytes
        unpacked += [(name, part.clone()) for name, part in parts]
        lasts.append(bucket.is_last)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    assert [name for name, _ in unpacked] == [name for name, _ in tensors]
    for (_, actual), (_, expected) in zip(unpacked, tensors, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(bits(actual), bits(expected))


def test_the_smallest_tensor_of_a_bucket() -> None:
    """One that holds anything, if any does; it shares the bucket's memory."""
    tensors = [("empty", torch.ones(0)), ("large", torch.ones(9)), ("small", torch.tensor([2.0, 3.0]))]
    [bucket] = BucketPacker(1000, CPU).pack(tensors)
    [(name, tensor)] = bucket.smallest().tensors()
    assert (name, tensor.tolist()) == ("small", [2.0, 3.0])
    assert tensor.untyped_storage().data_ptr() == bucket.data.untyped_storage().data_ptr()
    assert not bucket.smallest().is_last
    [bucket] = BucketPacker(1000, CPU).pack(tensors[:1])
    assert [name for name, _ in bucket.smallest().tensors()] == ["empty"]


def test_a_bucket_is_intact_until_the_next_but_one() -> None:
    """And two buffers are all there ever are."""
    tensors = [(f"t{i}", torch.full((4,), float(i))) for i in range(6)]
    packer = BucketPacker(16, CPU)
    for _ in range(2):
        previous = None
        places = set()
        for i, bucket in enumerate(packer.pack(tensors)):
            if previous is not None:
                assert previous.tolist() == [i - 1.0] * 4
            previous = bucket.data.view(torch.float32)
            places.add(bucket.data.data_ptr())
        assert len(places) == 2


def test_a_tensor_larger_than_a_buffer_is_not_copied() -> None:
    large = torch.randn(100)
    small = torch.randn(2)
    buckets = list(BucketPacker(16, CPU).pack([("a", small), ("b", large), ("c", small)]))
    assert [bucket.names for bucket in buckets] == [["a"], ["b"], ["c"]]
    assert buckets[1].data.data_ptr() == large.data_ptr()
    [(_, strided)] = next(iter(BucketPacker(16, CPU).pack([("d", large.view(10, 10).T)]))).tensors()
    assert torch.equal(strided, large.view(10, 10).T)


def test_once_nobody_wants_more_the_stream_is_only_consumed() -> None:
    answers = iter([True, True, False, False])
    stream = iter([(f"t{i}", torch.ones(4)) for i in range(4)])
    buckets = list(BucketPacker(16, CPU).pack(stream, wanted=lambda: next(answers, False)))
    assert [bucket.names for bucket in buckets] == [["t0"]]
    assert next(stream, None) is None
