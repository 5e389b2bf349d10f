"""Leaders wait at different times, and all ranks give weights to servers meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

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
    from megatron_drpo.collective_wait import CollectiveWait
    from megatron_drpo.publish import WeightPublisher

    publisher = Publisher()
    wait = CollectiveWait(cast(WeightPublisher, publisher))
    delay_s = delays_s[dist.get_rank()]
    dist.barrier()
    start = time.monotonic()
    if delay_s:
        wait.until(lambda timeout_s: sleep_until(start + delay_s, timeout_s))
    own = time.monotonic() - start
    wait.for_others()
    return {"own": own, "all": time.monotonic() - start, "repairs": len(publisher.repairs)}


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
        assert rank["all"] >= 4.0
        assert rank["repairs"] == 1
    assert ranks[0]["own"] < ranks[1]["own"], "a rank that is ready does not wait for others"


def finish_late(delay_s: float) -> list[bool]:
    """A collective that rank 1 joins late, polled by rank 0."""
    import torch

    from megatron_drpo.collective_wait import completes

    dist.barrier()  # a rank that is slow to start is not what makes the other wait
    if dist.get_rank() == 1:
        time.sleep(delay_s)
    value = torch.ones(1)
    work = dist.all_reduce(value, async_op=True)
    assert work is not None
    seen = [completes(work, 0.1)]
    while not seen[-1]:
        seen.append(completes(work, 0.1))
    assert float(value) == 2.0
    return seen


def test_a_collective_that_others_join_late(run_distributed: Callable[..., list[list[bool]]]) -> None:
    early, _ = run_distributed(finish_late, 2, 0.5)
    assert early[-1]
    assert not any(early[:-1])
    assert len(early) >= 3
