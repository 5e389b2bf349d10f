"""Scoring responses in worker processes, each response within a time limit."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_drpo.config import OnRewardError, RewardConfig
from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import worker
from megatron_drpo.rewards.spawn import LightSpawnContext
from megatron_drpo.types import Rollout
from megatron_drpo.user_code import Failure


class RewardPool:
    """`reward.num_workers` processes that compute rewards.

    The workers start in the background at construction. They die with the thread that constructs the pool
    (and so with the process, even by SIGKILL): construct it in the main thread.

    A response that takes longer than `reward.timeout_s` has its worker killed and replaced. What happens
    next is `reward.on_error`, with one exception: a response that math-verify cannot decide in time is not
    verified and scores 0, because what a policy writes (9^{9^9}) must not be able to stop a run.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.num_errors = 0
        """Responses scored 0 since construction because the reward raised or returned no finite number."""
        self.num_timeouts = 0
        """Responses scored 0 since construction because the reward exceeded its time limit."""
        self._config = config
        self._pool = self._start_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, at once. May be called again."""
        self._pool.stop()
        self._pool.join()

    def score(self, rollouts: list[Rollout]) -> list[float]:
        """One finite reward per response, in order. The function does not see the top-k fields, which are
        larger than all the rest together.

        Raises:
            RewardError: a reward failed and `reward.on_error=error`, or no worker can run.
        """
        if not self._pool.active:  # every worker was killed from outside while idle
            self._pool = self._start_workers()
        futures: list[ProcessFuture[float | Failure]] = [
            self._pool.schedule(worker.score, (self._config.name, rollout), timeout=self._config.timeout_s)
            for rollout in (replace(rollout, topk_ids=None, topk_logprobs=None) for rollout in rollouts)
        ]
        try:
            return [self._reward(rollout, future) for rollout, future in zip(rollouts, futures, strict=True)]
        finally:
            for future in futures:
                future.cancel()  # after an error; done ones stay as they are

    def _start_workers(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._config.num_workers,
            initializer=worker.start,
            initargs=(self._config.name, os.getpid()),
            context=LightSpawnContext(),
        )
        pool.schedule(os.getpid)  # pebble starts the workers with the first task, whatever it is
        return pool

    def _reward(self, rollout: Rollout, future: ProcessFuture[float | Failure]) -> float:
        try:
            outcome = future.result()
        except TimeoutError:
            failure = Failure(f"no result within reward.timeout_s={self._config.timeout_s}")
            if self._config.name != "math_verify":
                self._tolerate(rollout, failure)
            self.num_timeouts += 1
            return 0.0
        except ProcessExpired as error:
            outcome = Failure(f"its worker process died with exit code {error.exitcode}")
        except BrokenProcessPool:
            raise RewardError(
                f"reward {self._config.name}: the worker processes die at once; see their messages above"
            ) from None
        if isinstance(outcome, Failure):
            self._tolerate(rollout, outcome)
            self.num_errors += 1
            return 0.0
        return outcome

    def _tolerate(self, rollout: Rollout, failure: Failure) -> None:
        """Return if a failure counts as 0.

        Raises:
            RewardError: it does not.
        """
        if self._config.on_error is OnRewardError.error:
            raise RewardError(
                f"reward {self._config.name}: prompt {rollout.prompt.id}, sample {rollout.sample_index}: "
                f"{failure.reason}. reward.on_error=zero would count it and score 0"
            )
