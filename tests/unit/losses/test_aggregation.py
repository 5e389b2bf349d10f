"""The weighted sum equals each definition, whatever the split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.batching.packing import pack_global_batch
from megatron_drpo.config.schema import Aggregation
from megatron_drpo.losses.aggregation import compute_token_weights, count_loss
from megatron_drpo.types import TrainSequence

HORIZON = 64


def _sequence(index: int, mask: list[bool]) -> TrainSequence:
    generator = torch.Generator().manual_seed(index)
    return TrainSequence(
        id=index,
        token_ids=torch.randint(0, 100, (3 + len(mask),), generator=generator),
        prompt_length=3,
        advantages=torch.randn(len(mask), generator=generator),
        rollout_logprobs=torch.randn(len(mask), generator=generator),
        loss_mask=torch.tensor(mask),
    )


def _token_mean(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / sum(map(len, losses))


def _sequence_mean_token_mean(losses: list[list[float]]) -> float:
    return sum(sum(loss) / len(loss) for loss in losses) / len(losses)


def _sequence_mean_token_sum(losses: list[list[float]]) -> float:
    return sum(sum(loss) / HORIZON for loss in losses) / len(losses)


REFERENCES: dict[Aggregation, Callable[[list[list[float]]], float]] = {
    Aggregation.token_mean: _token_mean,
    Aggregation.sequence_mean_token_mean: _sequence_mean_token_mean,
    Aggregation.sequence_mean_token_sum: _sequence_mean_token_sum,
}


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=9),
    aggregation=st.sampled_from(list(Aggregation)),
    num_ranks=st.integers(1, 3),
    max_tokens=st.integers(8, 40),
)
def test_every_split_gives_the_definition(
    masks: list[list[bool]], aggregation: Aggregation, num_ranks: int, max_tokens: int
) -> None:
    """The loss of a token is its advantage here: any number per token will do."""
    sequences = [_sequence(index, mask) for index, mask in enumerate(masks)]
    with_loss = [s.advantages[s.loss_mask].double().tolist() for s in sequences if s.loss_mask.any()]
    expected = REFERENCES[aggregation](with_loss) if with_loss else 0.0

    shares = [sequences[rank::num_ranks] for rank in range(num_ranks)]
    counts = [count_loss(share) for share in shares]
    num_loss_tokens, num_sequences = (sum(column) for column in zip(*counts, strict=True))
    total = 0.0
    for share in shares:
        weights = compute_token_weights(
            share,
            aggregation,
            num_loss_tokens=num_loss_tokens,
            num_sequences=num_sequences,
            horizon_tokens=HORIZON,
        )
        for batch in pack_global_batch(
            share, weights, max_tokens=max_tokens, pad_to_multiple=4, num_micro_batches=None
        ):
            total += float((batch.token_weights_T.double() * batch.advantages_T.double()).sum())
    assert total == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_weights_by_hand() -> None:
    """n = 2, 1 and 0 loss tokens: the masked sequence is not counted."""
    sequences = [_sequence(0, [True, False, True]), _sequence(1, [True]), _sequence(2, [False, False])]
    assert count_loss(sequences) == (3, 2)
    expected = {
        Aggregation.token_mean: [[1 / 3, 0, 1 / 3], [1 / 3], [0, 0]],
        Aggregation.sequence_mean_token_mean: [[1 / 4, 0, 1 / 4], [1 / 2], [0, 0]],
        Aggregation.sequence_mean_token_sum: [[1 / 128, 0, 1 / 128], [1 / 128], [0, 0]],
    }
    for aggregation, rows in expected.items():
        weights = compute_token_weights(
            sequences, aggregation, num_loss_tokens=3, num_sequences=2, horizon_tokens=HORIZON
        )
        for weight, row in zip(weights, rows, strict=True):
            torch.testing.assert_close(weight, torch.tensor(row, dtype=torch.float32))


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_batch_without_loss_tokens_has_zero_weights(aggregation: Aggregation) -> None:
    (weight,) = compute_token_weights(
        [_sequence(0, [False, False])],
        aggregation,
        num_loss_tokens=0,
        num_sequences=0,
        horizon_tokens=HORIZON,
    )
    assert weight.tolist() == [0.0, 0.0]
