"""The backend with NCCL's habits shows what tests over gloo do not, and computes the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from tests.nccl_like import NAME, NcclLike, Options

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]
Run = Callable[..., list[Any]]


def every_collective() -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.arange(4.0) + 10 * rank
    total = own.clone()
    dist.all_reduce(total)
    gathered = torch.empty(4 * size)
    dist.all_gather_into_tensor(gathered, own)
    part = torch.empty(4)
    dist.reduce_scatter_tensor(part, gathered)
    exchanged = torch.empty(4)
    dist.all_to_all_single(exchanged, own)
    root = own.clone()
    dist.broadcast(root, src=1)
    objects: list[Any] = [None] * size
    pair = cast(dist.ProcessGroup, dist.new_group([0, 1]))
    dist.all_gather_object(objects, {"rank": rank}, group=pair)
    message = torch.empty(4)
    peer = 1 - rank
    operations = [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, message, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    dist.barrier(group=pair)
    values = [total, gathered, part, exchanged, root, message]
    return {"values": [value.tolist() for value in values], "objects": objects}


def test_every_collective_gives_what_gloo_gives(run_distributed: Run) -> None:
    assert run_distributed(every_collective, 2, backend=NAME) == run_distributed(every_collective, 2)


def join_late(delay_s: float) -> tuple[float, float]:
    """How long starting the first and the second collective takes, which rank 1 joins late."""
    if dist.get_rank() == 1:
        time.sleep(delay_s)
    durations = []
    for _ in range(2):
        start = time.monotonic()
        work = dist.all_reduce(torch.ones(1), async_op=True)
        durations.append(time.monotonic() - start)
        assert work is not None
        work.wait()
        if dist.get_rank() == 1:
            time.sleep(delay_s)
    return durations[0], durations[1]


def test_the_first_collective_blocks_until_all_are_inside(run_distributed: Run) -> None:
    (first, second), _ = run_distributed(join_late, 2, 3.0, backend=NAME)
    assert first > 2.5
    assert second < 1.5
    (first, second), _ = run_distributed(join_late, 2, 3.0)
    assert max(first, second) < 1.5, "over gloo nobody notices"


def swap_two() -> str:
    """Rank 1 calls two collectives in the other order; then anybody calls one more."""
    a, b = torch.ones(3), torch.ones(3)
    calls = [lambda: dist.all_reduce(a, async_op=True), lambda: dist.broadcast(b, 0, async_op=True)]
    if dist.get_rank() == 1:
        calls.reverse()
    works = [call() for call in calls]
    told = []
    for work in works:
        assert work is not None
        try:
            work.wait()
        except dist.DistBackendError as error:
            told.append(str(error))
    assert len(told) == 2
    assert told[0] == told[1], "a group stays broken"
    with pytest.raises(dist.DistBackendError):
        dist.barrier()
    # For the barrier at the end of every distributed test.
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return told[0]


def test_collectives_in_another_order_are_found_out(run_distributed: Run) -> None:
    for told in run_distributed(swap_two, 2, backend=NAME):
        assert "Mismatched collective detected" in told
        assert "rank 0: collective 1, allreduce float32[3] SUM" in told
        assert "rank 1: collective 1, broadcast float32[3] root 0" in told


class Member:
    """One of two in this process, in a thread of its own."""

    def __init__(self, store: dist.Store, rank: int, **options: Any) -> None:
        options = {"device": str(rank), **options}
        self.error: Exception | None = None
        self.group = NcclLike(store, rank, 2, Options(**options))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.group.allreduce([torch.ones(1)]).wait()
        except dist.DistBackendError as error:
            self.error = error

    def join(self) -> str:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return str(self.error)


def test_members_refuse_another_version() -> None:
    store = dist.HashStore()
    members = [Member(store, rank, version=version) for rank, version in enumerate(["22105", "23003"])]
    assert "Mismatched NCCL version detected : rank 1 version 23003 rank 0 version 22105" in members[0].join()
    assert "rank 0 version 22105 rank 1 version 23003" in members[1].join()


def test_members_refuse_one_device() -> None:
    store = dist.HashStore()
    members = [Member(store, rank, device="1000") for rank in range(2)]
    for rank, member in enumerate(members):
        text = f"Duplicate GPU detected : rank {rank} and rank {1 - rank} both on CUDA device 1000"
        assert text in member.join()


def test_a_missing_member_is_an_error_of_torchs_after_the_time_limit() -> None:
    start = time.monotonic()
    alone = Member(dist.HashStore(), 0, _timeout=timedelta(seconds=0.5))
    assert r"ranks [1] of 2 did not call a collective of this group in time" in alone.join()
    assert 0.4 < time.monotonic() - start < 10


def test_a_collective_ages_while_others_are_before_it() -> None:
    """The time limit counts from the call."""
    store = dist.HashStore()
    limit = timedelta(seconds=4.0)
    members = [Member(store, rank, _timeout=limit) for rank in range(2)]
    assert [member.join() for member in members] == ["None", "None"]
    start = time.monotonic()
    works = [members[0].group.allreduce([torch.ones(1)]) for _ in range(3)]
    time.sleep(2.0)
    members[1].group.allreduce([torch.ones(1)]).wait()
    works[0].wait()
    for work in works[1:]:
        with pytest.raises(dist.DistBackendError):
            work.wait()
    assert time.monotonic() - start < 5.5, "not one time limit after the other"
