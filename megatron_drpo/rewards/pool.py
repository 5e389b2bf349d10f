"""Scoring responses in worker processes, each response within a time limit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_drpo.config.schema import OnRewardError, RewardConfig
from megatron_drpo.config.user_code import Failure
from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import worker
from megatron_drpo.rewards.answers import read_ground_truth
from megatron_drpo.rewards.spawn import LightSpawnContext
from megatron_drpo.types import Rollout

MAX_CHECK_WORKERS = 16
"""Each takes 100 MB."""
_NUMBER = re.compile(r"[1-9]\d*")
"""Zero is another shape: it may be a denominator."""


class RewardPool:
    """`reward.num_workers` processes that compute rewards.

    The workers start in the background at construction. They die with the thread that constructs the pool
    (and so with the process, even by SIGKILL): construct it in the main thread.

    A response that takes longer than `reward.timeout_s` has its worker killed and replaced. What happens
    next is `reward.on_error`, with one exception: a response that math-verify cannot decide in time is not
    verified and scores 0, because what a policy writes (9^{9^9}) must not be able to stop a run.
    """

    def __init__(self, config: RewardConfig, log: Path | None = None) -> None:
        """
        Args:
            log: file to which the workers append what rewards print; None: where this process prints.
        """
        self._log = log
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
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

    @property
    def num_failures(self) -> int:
        """Responses scored 0 since construction, for either reason."""
        return self.num_errors + self.num_timeouts

    def close(self) -> None:
        """Stop the workers, at once. May be called again."""
        self._pool.stop()
        self._pool.join()

    def score(self, rollouts: list[Rollout]) -> list[float]:
        """One finite reward per response, in order. The function sees neither top-k fields nor routes: they
        are larger than all the rest together.

        Raises:
            RewardError: a reward failed and `reward.on_error=error`, or no worker can run.
        """
        if not self._pool.active:  # every worker was killed from outside while idle
            self._pool = self._start_workers()
        futures: list[ProcessFuture[float | Failure]] = [
            self._pool.schedule(worker.score, (self._config.name, rollout), timeout=self._config.timeout_s)
            for rollout in (
                replace(rollout, topk_ids=None, topk_logprobs=None, routes=None) for rollout in rollouts
            )
        ]
        try:
            return [self._reward(rollout, future) for rollout, future in zip(rollouts, futures, strict=True)]
        finally:
            for future in futures:
                future.cancel()  # after an error; done ones stay as they are

    def find_answer_problems(
        self, answers: Iterable[str], *, tolerates_timeouts: bool = False
    ) -> dict[str, str]:
        """Ground truths that no response could match, and why; only `math_verify` has such.

        Plain numbers are known to be good. A parse of anything else takes 20 ms, so of ground truths that
        differ in their numbers alone one is parsed, and the others only if it is not good.

        Args:
            tolerates_timeouts: say nothing of those that took too long or a worker's life: which do depends
                on the machine's load, and all replicas, and a run that is resumed, must find the same.

        Raises:
            RewardError: no worker can run.
        """
        shapes = group_by_shape(self._config, answers)
        problems = self._parse_answers([alike[0] for alike in shapes], tolerates_timeouts)
        others = [answer for alike in shapes if alike[0] in problems for answer in alike[1:]]
        return problems | self._parse_answers(others, tolerates_timeouts)

    def _parse_answers(self, answers: Iterable[str], tolerates_timeouts: bool) -> dict[str, str]:
        futures: dict[str, ProcessFuture[str | Failure | None]] = {
            answer: self._pool.schedule(worker.find_answer_problem, (answer,), timeout=self._config.timeout_s)
            for answer in answers
        }
        outcomes = {
            answer: self._answer_problem(future, tolerates_timeouts) for answer, future in futures.items()
        }
        return {answer: problem for answer, problem in outcomes.items() if problem is not None}

    def _answer_problem(
        self, future: ProcessFuture[str | Failure | None], tolerates_timeouts: bool
    ) -> str | None:
        expected = "expected an `answer` that math-verify can parse"
        try:
            outcome = future.result()
        except TimeoutError:
            limit = f"{expected} within reward.timeout_s={self._config.timeout_s}"
            return None if tolerates_timeouts else limit
        except ProcessExpired as error:
            return None if tolerates_timeouts else f"{expected}: it died with exit code {error.exitcode}"
        except BrokenProcessPool:
            raise self._broken() from None
        if isinstance(outcome, Failure):
            return f"{expected}: {outcome.reason}"
        return outcome

    def _start_workers(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._config.num_workers,
            initializer=worker.start,
            initargs=(self._config.name, os.getpid(), self._log and self._log.absolute()),
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
            raise self._broken() from None
        if isinstance(outcome, Failure):
            self._tolerate(rollout, outcome)
            self.num_errors += 1
            return 0.0
        return outcome

    def _broken(self) -> RewardError:
        told = "their messages above" if self._log is None else f"their messages in {self._log}"
        return RewardError(f"reward {self._config.name}: the worker processes die at once; see {told}")

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


def find_answer_problems(config: RewardConfig, answers: Sequence[str]) -> dict[str, str]:
    """As `RewardPool.find_answer_problems`, with a pool that lives as long as it is needed, if it is, on the
    cores of a machine on which nothing else runs yet."""
    if not group_by_shape(config, answers):
        return {}
    num_workers = min(max(config.num_workers, os.cpu_count() or 1), MAX_CHECK_WORKERS)
    with RewardPool(replace(config, num_workers=num_workers)) as pool:
        return pool.find_answer_problems(answers)


def group_by_shape(config: RewardConfig, answers: Iterable[str]) -> list[list[str]]:
    """The ground truths that only math-verify itself can tell anything about, each once; those together that
    differ in their numbers alone."""
    groups: dict[str, list[str]] = {}
    if config.name == "math_verify":
        for answer in dict.fromkeys(answers):
            truth = read_ground_truth(answer)
            if truth.number is None:
                groups.setdefault(_NUMBER.sub("7", truth.latex), []).append(answer)
    return list(groups.values())
