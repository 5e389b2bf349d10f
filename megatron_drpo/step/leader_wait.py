"""All ranks wait together for what the replicas' leaders are getting, and send weights to servers
meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_drpo.step.publish import WeightPublisher

POLL_S = 0.2
"""How long a leader waits for its groups before it takes part in the next exchange."""
_VALUE_BITS = 32


class CollectiveWait:
    """While a leader waits for rollouts the other ranks would sit in a barrier, and nobody could give weights
    to a server that has been started again. So every rank exchanges, again and again, who still waits and
    whether a server needs weights, which all ranks together then send.
    """

    def __init__(self, publisher: WeightPublisher | None, *, num_replicas: int = 1, replica: int = 0) -> None:
        """Collective.

        Args:
            publisher: repairs servers meanwhile, if there are any.
            num_replicas: whose leaders agree on numbers.
            replica: this rank's.
        """
        self._publisher = publisher
        # Of its own, on the CPU: a device that waits in a collective spins, while servers may need it, and
        # gives up after parallel.timeout_s.
        self._group = dist.new_group(backend="gloo")
        self._replica = replica
        self._num_agreed = 0
        self._own_word = 0
        self._words = [0] * num_replicas
        """What each leader said last: how often it agreed, and the number."""

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

    def agree(self, value: int) -> int:
        """On every leader, equally often: the maximum of their numbers, each from 0 to 2^32 - 1.

        No collective of its own, for they come to it at different times: every exchange tells what each
        leader said last. All of them see it complete in the same exchange, so that nobody says the next word
        before.
        """
        self._num_agreed += 1
        self._own_word = (self._num_agreed << _VALUE_BITS) + value
        while min(self._words) >> _VALUE_BITS < self._num_agreed:
            self._exchange(waits=True)
        return max(word % (1 << _VALUE_BITS) for word in self._words)

    def _exchange(self, *, waits: bool) -> bool:
        """Whether any rank still waits."""
        publisher = self._publisher
        wants_repair = publisher is not None and publisher.wants_repair()
        flags = torch.tensor([waits, wants_repair, *self._words], dtype=torch.int64)
        flags[2 + self._replica] = self._own_word
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        self._words = flags[2:].tolist()
        if publisher is not None and flags[1]:
            publisher.repair()
        return bool(flags[0])
