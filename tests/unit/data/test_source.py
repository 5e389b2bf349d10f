from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.data.source import PromptShare, PromptSource
from megatron_drpo.errors import CheckpointError
from megatron_drpo.types import Prompt


def make_prompts(count: int) -> list[Prompt]:
    """Ids with gaps, as after dropping lines."""
    return [Prompt(id=3 * i, text=f"prompt {i}", token_ids=(i,), answer=str(i)) for i in range(count)]


def resume(source: PromptSource, num_prompts: int, seed: int) -> PromptSource:
    state = json.loads(json.dumps(source.state_dict()))
    resumed = PromptSource(make_prompts(num_prompts), shuffle=True, seed=seed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == source.state_dict()
    return resumed


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=8), st.integers(0, 3))
def test_batches_run_over_epoch_ends(num_prompts: int, batch_sizes: list[int], seed: int) -> None:
    """Batches are slices of one stream in which every epoch is a permutation of the prompts."""
    source = PromptSource(make_prompts(num_prompts), shuffle=True, seed=seed)
    stream = [prompt.id for size in batch_sizes for prompt in source.next_batch(size)]
    for start in range(0, len(stream), num_prompts):
        epoch = stream[start : start + num_prompts]
        assert len(set(epoch)) == len(epoch)
    other = PromptSource(make_prompts(num_prompts), shuffle=True, seed=seed)
    assert [prompt.id for prompt in other.next_batch(len(stream))] == stream


@given(st.data())
def test_nothing_is_lost_or_repeated_over_resumes(data: st.DataObject) -> None:
    """Random batches, of which random parts are consumed, with resumes in between; at the end the epoch is
    completed, and then every prompt must have been consumed equally often."""
    num_prompts, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    source = PromptSource(make_prompts(num_prompts), shuffle=True, seed=seed)
    consumed: Counter[int] = Counter()
    outstanding: list[int] = []
    for _ in range(data.draw(st.integers(0, 10))):
        outstanding += [prompt.id for prompt in source.next_batch(data.draw(st.integers(0, 12)))]
        outstanding = data.draw(st.permutations(outstanding))
        done = [outstanding.pop() for _ in range(data.draw(st.integers(0, len(outstanding))))]
        source.mark_consumed(done)
        consumed.update(done)
        assert source.num_consumed == consumed.total()
        if data.draw(st.booleans()):
            source = resume(source, num_prompts, seed)
            outstanding = []
    source = resume(source, num_prompts, seed)
    state = source.state_dict()
    highest = max([state["low_water"] - 1, *state["exceptions"]])
    num_epochs = highest // num_prompts + 1
    consumed.update(p.id for p in source.next_batch(num_epochs * num_prompts - consumed.total()))
    assert consumed == Counter(
        {prompt.id: num_epochs for prompt in make_prompts(num_prompts)} if num_epochs else {}
    )


def test_unconsumed_prompts_come_first_after_a_resume() -> None:
    source = PromptSource(make_prompts(10), shuffle=True, seed=1)
    first, second = source.next_batch(4), source.next_batch(4)
    source.mark_consumed(prompt.id for prompt in [*second, first[2]])
    resumed = resume(source, 10, 1)
    assert resumed.next_batch(5) == [first[0], first[1], first[3], *source.next_batch(2)]


def test_unshuffled_epochs_keep_the_order_of_the_file() -> None:
    prompts = make_prompts(3)
    assert PromptSource(prompts, shuffle=False, seed=7).next_batch(7) == [*prompts, *prompts, prompts[0]]


def test_epochs_and_seeds_have_their_own_orders() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        stream = iter(PromptSource(make_prompts(20), shuffle=True, seed=seed).next_batch(60))
        return [tuple(prompt.id for prompt in islice(stream, 20)) for _ in range(3)]

    assert len({*orders(0), *orders(1)}) == 6


def test_an_id_that_is_not_outstanding() -> None:
    source = PromptSource(make_prompts(3), shuffle=False, seed=0)
    source.next_batch(1)
    source.mark_consumed([0])
    with pytest.raises(KeyError):
        source.mark_consumed([0])


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (PromptSource(make_prompts(5), shuffle=True, seed=0), "num_prompts was 4 and is now 5"),
        (PromptSource(make_prompts(5)[1:], shuffle=True, seed=0), "prompts_sha256 was .* and is now"),
        (PromptSource(make_prompts(4), shuffle=False, seed=0), "shuffle was True and is now False"),
        (PromptSource(make_prompts(4), shuffle=True, seed=2), "seed was 0 and is now 2"),
    ],
)
def test_a_cursor_of_other_prompts_is_refused(other: PromptSource, change: str) -> None:
    state = PromptSource(make_prompts(4), shuffle=True, seed=0).state_dict()
    before = other.state_dict()
    with pytest.raises(CheckpointError, match=change):
        other.load_state_dict(state)
    assert other.state_dict() == before


# -------------------------------------------------------------------------------------------- shares


def make_share(num_prompts: int, rank: int, size: int) -> PromptShare:
    """Of the prompts 0, 3, ..., 21."""
    return PromptShare(PromptSource(make_prompts(8), shuffle=False, seed=0), num_prompts, rank, size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_replicas_share_the_prompts_of_a_step(size: int) -> None:
    """Together the same prompts whatever the number of replicas; none twice."""
    shares = [make_share(4, rank, size) for rank in range(size)]
    for expected in ([0, 3, 6, 9], [12, 15, 18, 21], [0, 3, 6, 9]):
        parts = [[prompt.id for prompt in share.next()] for share in shares]
        assert {len(part) for part in parts} == {4 // size}
        assert sorted(id_ for part in parts for id_ in part) == expected


def test_further_prompts_of_a_step() -> None:
    """As many as asked for, on each replica; the next step goes on after them."""
    shares = [make_share(4, rank, 2) for rank in range(2)]
    assert [share.num_prompts for share in shares] == [2, 2]
    drawn = [[share.next(), share.next(1), share.next()] for share in shares]
    ids = [[[prompt.id for prompt in part] for part in parts] for parts in drawn]
    assert ids == [[[0, 6], [12], [18, 0]], [[3, 9], [15], [21, 3]]]


def test_prompts_count_when_the_step_is_done() -> None:
    """On every replica all prompts of the step are marked, its own or not, and those of every round."""
    share = make_share(4, rank=1, size=2)
    share.next()
    assert share.source.num_consumed == 0
    share.mark_consumed()
    assert share.source.num_consumed == 4
    share.mark_consumed()
    assert share.source.num_consumed == 4
    share.next()
    share.next(3)
    share.mark_consumed()
    assert share.source.num_consumed == 14
