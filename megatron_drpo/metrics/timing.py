"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CORE_PHASES = ("rollout", "reward", "forward_backward", "optimizer")
"""The work a step exists for; all else in a step is overhead."""

BESIDE_THE_STEP = ("eval", "checkpoint")
"""Done every so many steps only: reported, but no part of the step's time."""


class StepTimer:
    """Splits the wall-clock time of one step among named phases.

    Every moment belongs to exactly one phase: the innermost one open, or `other`.

    Args:
        clock: seconds from an arbitrary origin; replaced in tests.
        wait: called where a phase begins or ends. On a GPU it waits for the kernels still queued, for which
            the next phase would pay.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, wait: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._wait = wait
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Credit the time inside the `with` block to `name`; several blocks of one name add up."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def finish(self) -> dict[str, float]:
        """The step's times in seconds, and start the next step.

        Returns:
            `time/<phase>_s` per phase entered, `time/other_s` (outside all phases), `time/step_s` (all but
            eval and checkpoint) and `time/overhead_share`, the share of the step outside its core phases.
        """
        self._credit()
        seconds = {"other": 0.0} | self._seconds
        self._seconds = {}
        step_s = sum(value for name, value in seconds.items() if name not in BESIDE_THE_STEP)
        core_s = sum(seconds.get(name, 0.0) for name in CORE_PHASES)
        metrics = {f"time/{name}_s": value for name, value in seconds.items()}
        metrics["time/step_s"] = step_s
        metrics["time/overhead_share"] = (step_s - core_s) / step_s if step_s > 0 else 0.0
        return metrics

    def _credit(self) -> None:
        if self._wait is not None:
            self._wait()
        now = self._clock()
        name = self._open[-1] if self._open else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
