"""Which positions of an endless stream of epochs have been consumed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count


class Cursor:
    """The set of consumed positions 0, 1, 2, ..., as a low-water mark and the exceptions above it.

    Position p stands for the (p mod N)-th prompt of epoch p // N; so the set says nothing about how prompts
    are spread over ranks, and one set spans the end of an epoch.
    """

    def __init__(self, low_water: int = 0, exceptions: set[int] | None = None) -> None:
        self.low_water = low_water
        """Every position below is consumed."""
        self.exceptions = exceptions if exceptions is not None else set()
        """Consumed positions at or above the low-water mark."""

    def __contains__(self, position: int) -> bool:
        return position < self.low_water or position in self.exceptions

    def consume(self, position: int) -> None:
        """Add one position; adding it again changes nothing."""
        if position in self:
            return
        self.exceptions.add(position)
        while self.low_water in self.exceptions:
            self.exceptions.remove(self.low_water)
            self.low_water += 1

    def remaining(self) -> Iterator[int]:
        """Positions not consumed at the time of the call, lowest first, without end."""
        first, exceptions = self.low_water, frozenset(self.exceptions)
        return (position for position in count(first) if position not in exceptions)
