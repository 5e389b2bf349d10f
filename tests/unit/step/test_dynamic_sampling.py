"""Rounds, rates and cuts, with groups whose rewards are scripted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.data.source import PromptShare, PromptSource
from megatron_drpo.errors import DataError
from megatron_drpo.step.dynamic_sampling import FilledShare, ScoredGroup, fill_share
from megatron_drpo.types import Prompt, RolloutGroup

T = TypeVar("T")
Draw = Callable[[int], list[Prompt]]


def make_prompt(number: int) -> Prompt:
    return Prompt(id=number, text="", token_ids=(1,))


class Replica:
    """Its prompts are 0, 1, 2, ...; those for which `is_constant` have equal rewards."""

    def __init__(self, is_constant: Callable[[int], bool]) -> None:
        self.rounds: list[list[int]] = []
        """Prompts sampled in each round."""
        self.drawn = 0
        self._ids = count()
        self._is_constant = is_constant

    def draw(self, num_prompts: int) -> list[Prompt]:
        self.drawn += num_prompts
        return [make_prompt(next(self._ids)) for _ in range(num_prompts)]

    def draw_and_sample(
        self, num_prompts: int, round_index: int, is_wanted: bool, draw: Draw | None = None
    ) -> list[ScoredGroup]:
        prompts = (draw or self.draw)(num_prompts)
        return self.sample(prompts, round_index) if is_wanted else []

    def sample(self, prompts: list[Prompt], round_index: int) -> list[ScoredGroup]:
        self.rounds += [[]] * (round_index - len(self.rounds)) + [[prompt.id for prompt in prompts]]
        return [
            ScoredGroup(
                RolloutGroup(prompt=prompt, rollouts=[]),
                [0.5, 0.5] if self._is_constant(prompt.id) else [0.0, 1.0],
            )
            for prompt in prompts
        ]

    def fill(
        self, num_groups: int, max_rounds: int, agree: Callable[[int], int] = lambda value: value
    ) -> FilledShare:
        return fill_share(num_groups, max_rounds, sample=self.draw_and_sample, agree=agree)


def kept(share: FilledShare) -> list[int]:
    return [item.group.prompt.id for item in share.groups]


def test_nothing_to_refill() -> None:
    replica = Replica(lambda id_: False)
    share = replica.fill(4, 10)
    assert kept(share) == [0, 1, 2, 3]
    assert (share.num_rounds, share.num_sampled, share.num_dropped) == (1, 4, 0)


def test_rounds_are_as_large_as_the_rate_asks() -> None:
    """6 of 8 kept: the 2 missing take ceil(2 * 8 / 6) = 3, all of which are kept."""
    replica = Replica(lambda id_: id_ in (1, 4))
    share = replica.fill(8, 10)
    assert replica.rounds == [list(range(8)), [8, 9, 10]]
    assert kept(share) == [0, 2, 3, 5, 6, 7, 8, 9], "10 is cut"
    assert (share.num_rounds, share.num_sampled, share.num_dropped) == (2, 11, 2)


def test_a_low_rate_takes_whole_shares() -> None:
    """Every 5th prompt is kept: 3 missing at a rate of 1/4 would take 12, more than the share."""
    replica = Replica(lambda id_: id_ % 5 != 0)
    share = replica.fill(4, 10)
    assert [len(prompts) for prompts in replica.rounds] == [4, 4, 4, 4]
    assert kept(share) == [0, 5, 10, 15]


def test_the_step_goes_on_with_what_there_is() -> None:
    share = Replica(lambda id_: id_ != 5).fill(4, 3)
    assert kept(share) == [5]
    assert (share.num_rounds, share.num_sampled, share.num_dropped) == (3, 12, 11)


def test_nothing_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"in 3 rounds .* there is nothing to learn from\. Check that"):
        Replica(lambda id_: True).fill(4, 3)
    assert Replica(lambda id_: True).fill(4, 3, agree=lambda value: max(value, 1)).groups == []


def test_a_full_replica_draws_for_the_others_but_samples_nothing() -> None:
    """Another replica lacks 3 groups in the second round and none in the third."""
    others = iter([4, 3, 0, 4])
    replica = Replica(lambda id_: False)
    share = replica.fill(4, 10, agree=lambda value: max(value, next(others)))
    assert replica.rounds == [[0, 1, 2, 3]]
    assert replica.drawn == 7
    assert kept(share) == [0, 1, 2, 3]
    assert (share.num_rounds, share.num_sampled) == (2, 4)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 6))
def test_the_first_varied_groups_are_kept(pattern: list[bool], num_groups: int, max_rounds: int) -> None:
    """Whatever the rounds: the kept groups are the first varied ones of all drawn; no round asks for more
    than a share, and another round follows only while groups are missing."""
    replica = Replica(lambda id_: pattern[id_ % len(pattern)])
    try:
        share = replica.fill(num_groups, max_rounds)
    except DataError:
        assert all(pattern[id_ % len(pattern)] for id_ in range(num_groups * max_rounds))
        return
    varied = [id_ for id_ in range(replica.drawn) if not pattern[id_ % len(pattern)]]
    assert kept(share) == varied[:num_groups]
    assert share.num_dropped == replica.drawn - len(varied)
    assert all(1 <= len(prompts) <= num_groups for prompts in replica.rounds)
    before_last = sum(len(prompts) for prompts in replica.rounds[:-1])
    assert len([id_ for id_ in varied if id_ < before_last]) < num_groups
    assert len(share.groups) == num_groups or share.num_rounds == max_rounds


# ---------------------------------------------------------------------------------------- two replicas


def make_share(rank: int) -> PromptShare:
    """Of 12 prompts, 4 a step, for two replicas."""
    source = PromptSource([make_prompt(number) for number in range(12)], shuffle=False, seed=0)
    return PromptShare(source, 4, rank, 2)


def run_replicas(run: Callable[[int, Callable[[int], int]], T]) -> list[T]:
    """`run(rank, agree)` in a thread for each of two replicas; agree waits for both, for the maximum."""
    barrier = threading.Barrier(2, timeout=10)
    values = [0, 0]

    def of_rank(rank: int) -> T:
        def agree(value: int) -> int:
            values[rank] = value
            barrier.wait()
            largest = max(values)
            barrier.wait()
            return largest

        return run(rank, agree)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of_rank, range(2)))


def test_two_replicas_draw_in_lockstep_and_resume_at_the_same_prompt() -> None:
    """Replica 0 has 0, 2, 4, 6 and loses 0 and 2; replica 1 has 1 and 3, and draws 5 and 7 for the other."""
    shares = [make_share(rank) for rank in range(2)]
    replicas = [Replica(lambda id_: id_ in (0, 2)) for _ in range(2)]

    def run(rank: int, agree: Callable[[int], int]) -> FilledShare:
        replica = replicas[rank]
        return fill_share(2, 5, sample=partial(replica.draw_and_sample, draw=shares[rank].next), agree=agree)

    first, second = run_replicas(run)
    assert (kept(first), kept(second)) == ([4, 6], [1, 3])
    assert [replica.rounds for replica in replicas] == [[[0, 2], [4, 6]], [[1, 3]]]
    assert first.num_rounds == second.num_rounds == 2
    assert (first.num_dropped, second.num_dropped) == (2, 0)
    for share in shares:
        share.mark_consumed()
        assert share.source.num_consumed == 8
    state = shares[0].source.state_dict()
    assert state == shares[1].source.state_dict()
    resumed = make_share(1)
    resumed.source.load_state_dict(state)
    assert [prompt.id for prompt in resumed.next()] == [prompt.id for prompt in shares[1].next()] == [9, 11]


def test_one_replica_may_end_with_fewer_groups_than_the_other() -> None:
    shares = [make_share(rank) for rank in range(2)]

    def run(rank: int, agree: Callable[[int], int]) -> FilledShare:
        replica = Replica(lambda id_: id_ % 2 == 0 and id_ != 4)
        return fill_share(2, 3, sample=partial(replica.draw_and_sample, draw=shares[rank].next), agree=agree)

    first, second = run_replicas(run)
    assert (kept(first), kept(second)) == ([4], [1, 3])
    assert first.num_rounds == second.num_rounds == 3


def test_no_group_on_any_replica_is_an_error_on_all() -> None:
    shares = [make_share(rank) for rank in range(2)]

    def run(rank: int, agree: Callable[[int], int]) -> str:
        replica = Replica(lambda id_: True)
        with pytest.raises(DataError) as caught:
            fill_share(2, 3, sample=partial(replica.draw_and_sample, draw=shares[rank].next), agree=agree)
        return str(caught.value)

    first, second = run_replicas(run)
    assert first == second
    assert "raise rollout.num_samples_per_prompt or algorithm.dynamic_sampling.max_rounds" in first
