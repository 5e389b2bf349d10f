"""Sampling against softmax, brute force and a reference SplitMix64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_drpo.embedded_server.sampling import SamplingBatch, SamplingParams, _invert_cdf, uniform

BASE = SamplingParams(
    max_new_tokens=1, temperature=1.0, top_p=1.0, top_k=-1, seed=0, stop_token_ids=frozenset()
)
PROBS = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
NUM_DRAWS = 20_000


def draw(params: SamplingParams, logits: torch.Tensor, num_draws: int = NUM_DRAWS) -> torch.Tensor:
    """Tokens of `num_draws` sequences that differ in their seed only."""
    batch = SamplingBatch([dataclasses.replace(params, seed=seed) for seed in range(num_draws)])
    return batch.sample(logits.expand(num_draws, -1), [0] * num_draws)[0]


def chi_square(tokens: torch.Tensor, probs: list[float]) -> float:
    expected = torch.tensor(probs, dtype=torch.float64) * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


def splitmix64(state: int, num_steps: int) -> int:
    """The published generator, in Python integers: advance `num_steps` times, then mix."""

    def mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    return mix((mix(state) + num_steps * 0x9E3779B97F4A7C15) % 2**64)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), counter=st.integers(0, 10_000))
def test_uniform_is_splitmix64(seed: int, counter: int) -> None:
    value = uniform(np.array([seed], dtype=np.uint64), [counter])[0]
    assert value == (splitmix64(seed, counter + 1) >> 11) / 2**53


def test_uniform_is_uniform_over_seeds_and_over_positions() -> None:
    over_seeds = uniform(np.arange(NUM_DRAWS, dtype=np.uint64), [0] * NUM_DRAWS)
    over_positions = uniform(np.full(NUM_DRAWS, 7, dtype=np.uint64), list(range(NUM_DRAWS)))
    for values in (over_seeds, over_positions):
        bins = torch.from_numpy((values * 20).astype(np.int64))
        assert chi_square(bins, [0.05] * 20) < 43.8  # 19 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(over_seeds[1:], over_seeds[:-1])[0, 1]) < 0.025


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor(PROBS).log()
    probs = (logits.double() / temperature).softmax(-1).tolist()
    tokens = draw(dataclasses.replace(BASE, temperature=temperature), logits)
    assert chi_square(tokens, probs) < 20.5  # 5 degrees of freedom, 0.1 %


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 50), min_size=2, max_size=8, unique=True),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(1, 9) | st.just(-1),
)
def test_truncation_keeps_exactly_the_top(weights: list[int], top_p: float, top_k: int) -> None:
    """Brute force: walk down the sorted tokens until the mass is reached or k are taken."""
    total = sum(weights)
    kept: set[int] = set()
    for token in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if sum(weights[i] for i in kept) / total >= top_p or len(kept) == top_k:
            break
        kept.add(token)
    mass = sum(weights[i] for i in kept) / total
    if abs(mass - top_p) < 1e-6:  # on the edge rounding decides
        return
    tokens = draw(dataclasses.replace(BASE, top_p=top_p, top_k=top_k), torch.tensor(weights).log(), 3000)
    assert set(tokens.tolist()) <= kept
    renormalised = [w / total / mass if i in kept else 0.0 for i, w in enumerate(weights)]
    assert chi_square(tokens, renormalised) < 35  # 7 degrees of freedom, 1e-5


def test_logprobs_are_of_the_tempered_distribution_before_truncation() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50) * 3
    params = [dataclasses.replace(BASE, temperature=t, top_p=0.6, top_k=5, seed=3) for t in (0.7, 1.0, 1.9)]
    tokens, logprobs, *_ = SamplingBatch(params).sample(logits, [4, 5, 6])
    temperatures = torch.tensor([[0.7], [1.0], [1.9]], dtype=torch.float64)
    reference = (logits.double() / temperatures).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), reference[torch.arange(3), tokens], atol=2e-6, rtol=0)


def test_the_most_probable_ids_are_of_the_same_distribution() -> None:
    """Tempered, before truncation; each row has as many as the largest number asked for."""
    torch.manual_seed(3)
    logits = torch.randn(3, 50) * 3
    params = [
        dataclasses.replace(BASE, temperature=t, top_p=0.6, top_k=2, num_topk=k)
        for t, k in [(0.7, 0), (1.0, 7), (1.9, 3)]
    ]
    sampled = SamplingBatch(params).sample(logits, [0, 0, 0])
    temperatures = torch.tensor([[0.7], [1.0], [1.9]], dtype=torch.float64)
    reference = (logits.double() / temperatures).log_softmax(-1)
    order = reference.argsort(-1, descending=True)[:, :7]
    assert torch.equal(sampled.topk_ids_AK, order)
    torch.testing.assert_close(
        sampled.topk_logprobs_AK.double(), reference.gather(-1, order), atol=2e-6, rtol=0
    )


def test_temperature_zero_is_greedy_with_logprobs_at_temperature_one() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 30)
    tokens, logprobs, *_ = SamplingBatch([dataclasses.replace(BASE, temperature=0.0)] * 4).sample(
        logits, [0] * 4
    )
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_a_sample_depends_on_no_neighbour() -> None:
    """Mixing greedy, truncated and plain rows in any order changes no row's token."""
    torch.manual_seed(2)
    logits = torch.randn(6, 40)
    params = [
        dataclasses.replace(BASE, seed=i, temperature=t, top_p=p, top_k=k)
        for i, (t, p, k) in enumerate(
            [(1, 1, -1), (0, 1, -1), (0.5, 0.5, 3), (1, 0.9, -1), (2, 1, 7), (1, 1, -1)]
        )
    ]
    counters = [3, 1, 4, 1, 5, 9]
    together, logprobs, *_ = SamplingBatch(params).sample(logits, counters)
    for i in (5, 3, 0, 2, 4, 1):
        alone, logprob, *_ = SamplingBatch([params[i]]).sample(logits[i : i + 1], [counters[i]])
        assert alone.item() == together[i].item()
        assert logprob.item() == logprobs[i].item()


def test_no_token_of_probability_zero_is_taken_even_at_the_largest_uniform() -> None:
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.6, 0.0], [0.1, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    largest = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    assert _invert_cdf(probs, largest).tolist() == [3, 0]
    assert _invert_cdf(probs, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 0]
