from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.rewards.control import shuffle_rewards


@given(st.lists(st.floats(0, 1)), st.integers(0, 9), st.integers(0, 9))
def test_same_rewards_in_the_same_other_order(rewards: list[float], seed: int, step: int) -> None:
    shuffled = shuffle_rewards(rewards, seed=seed, step=step)
    assert sorted(shuffled) == sorted(rewards)
    assert shuffled == shuffle_rewards(rewards, seed=seed, step=step)


def test_rewards_say_nothing_about_their_samples() -> None:
    """Over 400 steps, every sample gets each of the four rewards a quarter of the time (+- 4 sigma)."""
    rewards = [0.0, 1.0, 2.0, 3.0]
    steps = [shuffle_rewards(rewards, seed=5, step=step) for step in range(400)]
    for sample in range(4):
        for reward in rewards:
            assert 65 < sum(shuffled[sample] == reward for shuffled in steps) < 135
