"""Every error this project raises on purpose.

Each class also inherits the builtin it refines, so callers may catch either. A message says what was
wrong, where (key, file, line, rank, server) and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class DrpoError(Exception):
    """Base of all errors raised on purpose by megatron-drpo."""


class ConfigError(DrpoError, ValueError):
    """One or more configuration problems, reported together.

    Args:
        problems: one sentence per problem, each naming the key, its value and the rule.
        warnings: sentences about settings that are allowed but hardly meant, told after the problems.
    """

    def __init__(self, *problems: str, warnings: Sequence[str] = ()) -> None:
        self.problems = problems
        if len(problems) == 1:
            message = problems[0]
        else:
            lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, 1))
            message = f"{len(problems)} problems in the configuration:\n{lines}"
        super().__init__("\n".join([message, *(f"warning: {text}" for text in warnings)]))


class DataError(DrpoError, ValueError):
    """A broken prompt line or data file; names the file and the line."""


class ModelError(DrpoError, ValueError):
    """An HF folder that cannot be used: unknown family, missing, truncated or misshapen tensors."""


class CheckpointError(DrpoError, RuntimeError):
    """A run checkpoint that cannot be written, or belongs to another model or run."""


class ConversionError(DrpoError, RuntimeError):
    """A checkpoint conversion that cannot start or go on; says what is done and how to go on."""


class RewardError(DrpoError, RuntimeError):
    """A reward function that raised, hung or returned something that is not a finite number."""


class RolloutError(DrpoError, RuntimeError):
    """A rollout server that is absent, died, timed out or answered with an error; names the server."""


class WeightSyncError(RolloutError):
    """A server whose weights could not be updated or verified."""


class PlatformError(DrpoError, RuntimeError):
    """The machine or an installed package lies outside the range this project supports."""


class NumericsError(DrpoError, ArithmeticError):
    """A non-finite loss, gradient or logprob; names the rank and the place."""


class DeadlineError(DrpoError, TimeoutError):
    """A phase of a run took longer than its deadline; names the ranks and servers that are waited for."""


class RankError(DrpoError, RuntimeError):
    """A training process stopped; it has already said why."""
