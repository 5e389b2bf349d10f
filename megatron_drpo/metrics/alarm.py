"""What the trust region says over many steps: a bound that no token reaches does nothing, and one that most
tokens are beyond is no bound."""

from __future__ import annotations

_KEYS = "algorithm.loss: delta, epsilon, mask_high and mask_low, or clip_low and clip_high"


class TrustRegionAlarm:
    """Watches the loss tokens outside the trust region, in windows of steps that do not overlap.

    For losses that have a trust region (`Loss.has_trust_region`). A resumed run begins a new window.

    Args:
        window_steps: a single step, or a warmup with small updates, is no reason for an alarm.
    """

    def __init__(self, window_steps: int = 50) -> None:
        self._window_steps = window_steps
        self._num_steps = 0
        self._num_tokens = 0
        self._num_outside = 0

    def update(self, num_tokens: int, num_outside: int) -> str | None:
        """Take one step's loss tokens and how many of them were outside.

        Returns:
            What is wrong and what to do, at the end of a window in which no token, or more than half of
            them, were outside; else None. A window without loss tokens says nothing.
        """
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._num_outside += num_outside
        if self._num_steps < self._window_steps:
            return None
        message = self._message()
        self._num_steps = self._num_tokens = self._num_outside = 0
        return message

    def _message(self) -> str | None:
        if self._num_tokens and not self._num_outside:
            return (
                f"0 of {_short(self._num_tokens)} loss tokens outside the trust region in {self._num_steps} "
                "steps: the trust region does not bind, nothing was masked or turned back. That is fine if "
                "every step is one update on fresh rollouts (train.num_updates_per_step=1); otherwise set "
                f"a tighter bound ({_KEYS})"
            )
        if 2 * self._num_outside > self._num_tokens:
            share = self._num_outside / self._num_tokens
            return (
                f"{share:.1%} of {_short(self._num_tokens)} loss tokens outside the trust region in "
                f"{self._num_steps} steps: the policy is further from the anchor than the loss allows for. "
                "Lower optimizer.lr or train.num_updates_per_step, or set a wider bound "
                f"({_KEYS}); if mismatch/logprob_abs_mean is as large with a single update, the rollout "
                "engine computes other probabilities than the trainer"
            )
        return None


def _short(count: int) -> str:
    """1234567 -> 1.2M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
