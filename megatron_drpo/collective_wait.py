"""All ranks wait together for what the replicas' leaders are getting, and send weights to servers
meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_drpo.publish import WeightPublisher

POLL_S = 0.2
"""How long a leader waits for its groups before it takes part in the next exchange."""
_POLL_WORK_S = 0.001


class CollectiveWait:
    """While a leader waits for rollouts the other ranks would sit in a barrier, and nobody could give weights
    to a server that has been started again. So every rank exchanges, again and again, who still waits and
    whether a server needs weights, which all ranks together then send.
    """

    def __init__(self, publisher: WeightPublisher | None) -> None:
        """Collective.

        Args:
            publisher: repairs servers meanwhile, if there are any.
        """
        self._publisher = publisher
        # Of its own, on the CPU: leaders have collectives of the other groups in flight meanwhile.
        self._group = dist.new_group(backend="gloo")

    def until(self, is_ready: Callable[[float], bool]) -> None:
        """On a leader: wait, in turns with the exchanges.

        Args:
            is_ready: waits for so many seconds at most and says whether all is there.
        """
        while not is_ready(POLL_S):
            self._exchange(waits=True)

    def for_others(self) -> None:
        """On every rank, when its own waiting is over: return when no rank waits any more."""
        while self._exchange(waits=False):
            pass

    def _exchange(self, *, waits: bool) -> bool:
        """Whether any rank still waits."""
        publisher = self._publisher
        wants_repair = publisher is not None and publisher.wants_repair()
        flags = torch.tensor([waits, wants_repair], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        if publisher is not None and flags[1]:
            publisher.repair()
        return bool(flags[0])


def completes(work: dist.Work, timeout_s: float) -> bool:
    """Whether a collective that was started is done; waits so long at most."""
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_WORK_S)
    return True
