"""What rewards say over many steps: where they prefer no response to another, a run learns nothing for hours,
and says so nowhere else."""

from __future__ import annotations

from megatron_drpo.config.schema import Advantage, Config
from megatron_drpo.metrics.sample_statistics import SampleStatistics, add_up

_WITHIN_GROUPS = (Advantage.group_mean, Advantage.group_mean_std, Advantage.leave_one_out)
"""Advantages that are 0 where all rewards of a group are equal."""


class RewardAlarm:
    """Watches the rewards of all sampled responses, in windows of steps that do not overlap. A resumed run
    begins a new window.

    Args:
        config: what the likely reason is looked for in.
        window_steps: a single step without signal is no reason for an alarm.
    """

    def __init__(self, config: Config, window_steps: int = 10) -> None:
        self._config = config
        self._window_steps = window_steps
        self._steps: list[SampleStatistics] = []

    def update(self, step: SampleStatistics) -> str | None:
        """Take one step's statistics of all replicas.

        Returns:
            What is wrong and the likely reason, at the end of a window in which all rewards were equal, or
            no group had rewards that differ although advantages compare within groups; else None.
        """
        self._steps.append(step)
        if len(self._steps) < self._window_steps:
            return None
        total = add_up(self._steps)
        self._steps = []
        return self._message(total)

    def _message(self, total: SampleStatistics) -> str | None:
        if not total.num_samples:
            return None
        is_constant = total.reward_max == -total.reward_negated_max
        if is_constant:
            what = (
                f"all {total.num_samples:.0f} rewards of {self._window_steps} steps are {total.reward_max:g}"
            )
        elif self._config.algorithm.advantage in _WITHIN_GROUPS and not total.num_groups_varied:
            what = (
                f"in none of the {total.num_groups_scored:.0f} groups of {self._window_steps} steps do the "
                f"rewards differ, so that every advantage is 0 "
                f"(algorithm.advantage={self._config.algorithm.advantage})"
            )
        else:
            return None
        return (
            f"{what}: they prefer no response to another, and nothing is learned. Likely reason: "
            f"{self._likely_reason(total, is_constant=is_constant)}. The responses are in "
            f"{self._config.run_dir}/rollouts, what the reward printed in {self._config.run_dir}/logs"
        )

    def _likely_reason(self, total: SampleStatistics, *, is_constant: bool) -> str:
        """The first that explains most of the responses."""
        rollout, reward = self._config.rollout, self._config.reward
        if 2 * total.num_reward_failures >= total.num_samples:
            return (
                f"{total.num_reward_failures / total.num_samples:.0%} of the responses score 0 because "
                f"reward {reward.name} fails on them or takes longer than "
                f"reward.timeout_s={reward.timeout_s:g}"
            )
        if 2 * total.num_truncated >= total.num_samples:
            return (
                f"{total.num_truncated / total.num_samples:.0%} of the responses are cut off, at "
                f"rollout.max_response_tokens={rollout.max_response_tokens} or before their end; raise it"
            )
        if 2 * total.num_groups_identical >= total.num_groups_scored > 0:
            return (
                f"in {total.num_groups_identical / total.num_groups_scored:.0%} of the groups all samples "
                f"are the same; rollout.temperature={rollout.temperature:g}, top_p={rollout.top_p:g} and "
                f"top_k={rollout.top_k} leave the policy no choice"
            )
        if is_constant:
            return self._reason_of_a_constant(total.reward_max)
        if rollout.num_samples_per_prompt == 1:
            return "rollout.num_samples_per_prompt=1, and there is nothing to compare a single response with"
        return (
            f"every prompt is too easy or too hard for this model, its samples all right or all wrong (mean "
            f"reward {total.reward_sum / total.num_samples:.3g}); choose prompts in between, or raise "
            f"rollout.num_samples_per_prompt={rollout.num_samples_per_prompt}"
        )

    def _reason_of_a_constant(self, value: float) -> str:
        name = self._config.reward.name
        if value > 0:
            return f"the prompts are too easy for this model, or reward {name} is the same for any response"
        if ":" in name:
            return (
                f"reward {name} finds no answer in the responses, or is the same for any, or the prompts are "
                "too hard for this model"
            )
        return (
            f"no response matches its prompt's `answer`: reward {name} cannot read the answers of "
            f"{self._config.data.train_path}, the model does not write its own in the form that is looked "
            "for, or the prompts are too hard for it"
        )
