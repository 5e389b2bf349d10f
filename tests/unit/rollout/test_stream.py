"""How far sampling runs ahead, with groups that finish in any order."""

from __future__ import annotations

import random
from concurrent.futures import Future
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import PendingGroup
from megatron_drpo.rollout.stream import GroupStream
from megatron_drpo.types import Prompt, RolloutGroup

NUM_GROUPS = 4


class Servers:
    """Groups finish when they are told to."""

    def __init__(self) -> None:
        self.version = 0
        self.running: list[PendingGroup] = []
        self.steps: dict[int, int] = {}
        """Prompt -> step that it was drawn for."""
        self._ids = count()

    def draw(self, num_prompts: int) -> list[Prompt]:
        return [Prompt(id=next(self._ids), text="", token_ids=(1,)) for _ in range(num_prompts)]

    def submit(self, prompts: list[Prompt], step: int) -> list[PendingGroup]:
        groups = [PendingGroup(prompt=p, policy_version=self.version, future=Future()) for p in prompts]
        self.running += groups
        self.steps |= dict.fromkeys((prompt.id for prompt in prompts), step)
        return groups

    def finish(self, group: PendingGroup) -> None:
        self.running.remove(group)
        group.future.set_result(RolloutGroup(prompt=group.prompt, rollouts=[]))


@given(st.integers(0, 3), st.sampled_from([0.0, 0.5]), st.integers(0, 2**32))
def test_every_prompt_once_and_none_too_old(max_staleness: int, oversampling: float, seed: int) -> None:
    """In random finishing orders, until 12 steps are taken."""
    servers, chance = Servers(), random.Random(seed)
    stream = GroupStream(NUM_GROUPS, max_staleness, servers.draw, servers.submit, oversampling)
    taken: list[int] = []
    oldest = max_staleness + (oversampling > 0)
    versions: dict[int, int] = {}
    for step in range(12):
        servers.version = step
        stream.fill(step, ahead=False)
        versions |= {group.prompt.id: group.policy_version for group in servers.running}
        while not stream.is_ready(step, 0.0):
            servers.finish(chance.choice(servers.running))
        ids = [group.prompt.id for group in stream.take(step)]
        assert len(ids) == NUM_GROUPS
        assert ids == sorted(ids), "in the order of their prompts"
        assert all(step - versions[prompt_id] <= oldest for prompt_id in ids)
        assert not set(ids) & set(taken)
        taken += ids
        stream.fill(step + 1, ahead=True)
        versions |= {group.prompt.id: group.policy_version for group in servers.running}
        assert stream.num_pending <= (max_staleness + 1) * (NUM_GROUPS + 2)
    drawn = set(servers.steps)
    assert drawn == set(taken) | set(stream.pending_prompt_ids)


@pytest.mark.parametrize(("max_staleness", "expected"), [(0, 0), (1, 4), (2, 8)])
def test_what_is_in_flight_while_a_step_trains(max_staleness: int, expected: int) -> None:
    servers = Servers()
    stream = GroupStream(NUM_GROUPS, max_staleness, servers.draw, servers.submit)
    stream.fill(0, ahead=False)
    for group in list(servers.running):
        servers.finish(group)
    assert [group.prompt.id for group in stream.take(0)] == [0, 1, 2, 3]
    stream.fill(1, ahead=True)
    assert stream.num_pending == expected


def test_a_slow_group_holds_up_nobody_until_it_is_due() -> None:
    """With a staleness of 2, prompt 4 is due two versions after it was submitted."""
    servers = Servers()
    stream = GroupStream(NUM_GROUPS, 2, servers.draw, servers.submit)
    taken = []
    for step in range(4):
        servers.version = step
        stream.fill(step, ahead=False)
        for group in [group for group in servers.running if group.prompt.id != 4]:
            servers.finish(group)
        if not stream.is_ready(step, 0.0):
            break
        taken.append([group.prompt.id for group in stream.take(step)])
        stream.fill(step + 1, ahead=True)
    assert taken == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert step == 2


def test_a_failure_is_raised_and_closing_ends_what_runs() -> None:
    servers = Servers()
    stream = GroupStream(NUM_GROUPS, 0, servers.draw, servers.submit)
    stream.fill(0, ahead=False)
    servers.running[2].future.set_exception(RolloutError("no server"))
    with pytest.raises(RolloutError, match="no server"):
        stream.is_ready(0, 0.0)
    futures = [group.future for group in servers.running]
    stream.close()
    assert [future.cancelled() for future in futures] == [True, True, False, True]
