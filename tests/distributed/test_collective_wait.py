"""Leaders wait at different times, and all ranks give weights to servers meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import pytest
import torch.distributed as dist

from tests import nccl_like

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]


class Publisher:
    """On rank 0 a server wants weights once, some exchanges from now."""

    def __init__(self) -> None:
        self.repairs: list[float] = []
        self._countdown = 2 if dist.get_rank() == 0 else 10**9

    def wants_repair(self) -> bool:
        self._countdown -= 1
        return self._countdown == 0

    def repair(self) -> None:
        dist.barrier()  # as the export of weights, a collective of all ranks
        self.repairs.append(time.monotonic())


def wait_together(delays_s: list[float]) -> dict[str, Any]:
    """Each rank's own condition comes true after its delay; those of 0 do not wait at all."""
    from megatron_drpo.step.leader_wait import CollectiveWait
    from megatron_drpo.step.publish import WeightPublisher

    publisher = Publisher()
    wait = CollectiveWait(cast(WeightPublisher, publisher))
    delay_s = delays_s[dist.get_rank()]
    dist.barrier()
    start = time.monotonic()
    if delay_s:
        wait.until(lambda timeout_s: sleep_until(start + delay_s, timeout_s))
    ready = time.monotonic()  # of one clock for all processes
    wait.for_others()
    went_on = time.monotonic()
    return {"own": ready - start, "ready": ready, "went_on": went_on, "repairs": len(publisher.repairs)}


def sleep_until(moment: float, timeout_s: float) -> bool:
    remaining = moment - time.monotonic()
    time.sleep(max(0.0, min(timeout_s, remaining)))
    return time.monotonic() >= moment


@pytest.mark.parametrize("backend", ["gloo", nccl_like.NAME])
def test_nobody_goes_on_before_the_slowest_and_all_repair(
    run_distributed: Callable[..., list[dict[str, Any]]], backend: str
) -> None:
    delays_s = [0.3, 4.0, 0.0]
    ranks = run_distributed(wait_together, 3, delays_s, backend=backend)
    for rank, delay_s in zip(ranks, delays_s, strict=True):
        assert rank["own"] >= delay_s
        assert rank["repairs"] == 1
    assert min(rank["went_on"] for rank in ranks) >= max(rank["ready"] for rank in ranks)
    assert ranks[0]["own"] < ranks[1]["own"], "a rank that is ready does not wait for others"


def agree_twice(delays_s: list[float]) -> dict[str, Any]:
    """Leaders agree at different times, while the last rank, which is none, waits for them."""
    from megatron_drpo.step.leader_wait import CollectiveWait
    from megatron_drpo.step.publish import WeightPublisher

    rank = dist.get_rank()
    num_leaders = dist.get_world_size() - 1
    publisher = Publisher()
    is_leader = rank < num_leaders
    wait = CollectiveWait(
        cast(WeightPublisher, publisher), num_replicas=num_leaders, replica=min(rank, num_leaders - 1)
    )
    agreed = []
    if is_leader:
        for delay_s, value in zip(delays_s, (7 - rank, 3 * rank), strict=True):
            start = time.monotonic()
            wait.until(lambda timeout_s, end=start + delay_s * rank: sleep_until(end, timeout_s))
            agreed.append(wait.agree(value))
    wait.for_others()
    return {"agreed": agreed, "repairs": len(publisher.repairs)}


def test_leaders_agree_on_the_largest_number(run_distributed: Callable[..., list[dict[str, Any]]]) -> None:
    """A server gets its weights meanwhile: nobody sits in a collective that only leaders take part in."""
    ranks = run_distributed(agree_twice, 4, [0.6, 0.0])
    assert [rank["agreed"] for rank in ranks] == [[7, 6]] * 3 + [[]]
    assert [rank["repairs"] for rank in ranks] == [1] * 4


def collectives_on_the_device() -> list[str]:
    """What the ranks' own backend is asked for while two leaders wait at different times and agree."""
    from megatron_drpo.step.leader_wait import CollectiveWait

    asked: list[str] = []
    start = nccl_like.NcclLike.start

    def record(self: Any, name: str, *arguments: Any) -> dist.Work:
        asked.append(name)
        return start(self, name, *arguments)

    rank = dist.get_rank()
    wait = CollectiveWait(None, num_replicas=2, replica=rank)
    with mock.patch.object(nccl_like.NcclLike, "start", record):
        end = time.monotonic() + 0.5 * rank
        wait.until(lambda timeout_s: sleep_until(end, timeout_s))
        wait.agree(rank)
        wait.for_others()
    return asked


def test_who_waits_does_so_on_the_host(run_distributed: Callable[..., list[list[str]]]) -> None:
    """A collective of NCCL spins on a GPU that servers may need, and is an error after its time limit."""
    assert run_distributed(collectives_on_the_device, 2, backend=nccl_like.NAME) == [[], []]
