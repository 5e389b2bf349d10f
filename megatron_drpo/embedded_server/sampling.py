"""Next tokens from logits, vectorised over sequences, each with its own parameters and randomness.

Dimensions: A active sequences, V vocabulary, K most probable ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled."""

    max_new_tokens: int
    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """-1: off."""
    seed: int
    """Only its low 64 bits count."""
    stop_token_ids: frozenset[int]
    num_topk: int = 0
    """Most probable ids to report with each token."""


class Sampled(NamedTuple):
    """One token per sequence, and what is reported of its distribution."""

    tokens_A: Int[torch.Tensor, " A"]
    """int64."""
    logprobs_A: Float[torch.Tensor, " A"]
    """float32, natural log of the probability at the sequence's temperature (1 where greedy), before top-k
    and top-p, as SGLang reports them."""
    topk_logprobs_AK: Float[torch.Tensor, "A K"]
    """The largest logprobs of the same distribution, descending; K is the largest num_topk of the batch."""
    topk_ids_AK: Int[torch.Tensor, "A K"]


class SamplingBatch:
    """The parameters of A sequences as tensors."""

    def __init__(self, params: list[SamplingParams]) -> None:
        temperature_A = torch.tensor([p.temperature for p in params])
        self.greedy_A = temperature_A == 0
        self.temperature_A = torch.where(self.greedy_A, 1.0, temperature_A)
        self.top_p_A = torch.tensor([p.top_p for p in params], dtype=torch.float64)
        self.top_k_A = torch.tensor([p.top_k if p.top_k != -1 else 2**62 for p in params])
        self.num_topk = max(p.num_topk for p in params)
        self.any_greedy = bool(self.greedy_A.any())
        self.truncates = any(p.top_p < 1 or p.top_k != -1 for p in params)
        self.seed_A = np.array([p.seed % 2**64 for p in params], dtype=np.uint64)

    def sample(self, logits_AV: Float[torch.Tensor, "A V"], num_sampled: list[int]) -> Sampled:
        """Sample one token per sequence.

        Args:
            logits_AV: any float dtype.
            num_sampled: tokens each sequence has so far: with its seed, the only source of randomness.
        """
        logprobs_AV = (logits_AV.float() / self.temperature_A[:, None]).log_softmax(-1)
        probs_AV = logprobs_AV.double().exp()
        if self.truncates:
            probs_AV = _truncate(probs_AV, self.top_p_A, self.top_k_A)
        tokens_A = _invert_cdf(probs_AV, torch.from_numpy(uniform(self.seed_A, num_sampled)))
        if self.any_greedy:
            tokens_A = torch.where(self.greedy_A, logits_AV.argmax(-1), tokens_A)
        return Sampled(
            tokens_A, logprobs_AV.gather(-1, tokens_A[:, None])[:, 0], *logprobs_AV.topk(self.num_topk)
        )


def uniform(seeds: npt.NDArray[np.uint64], counters: list[int]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1): a function of (seed, counter) alone.

    SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) of the counter, started at the mixed seed.
    """
    bits = _mix(_mix(seeds) + (np.array(counters, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def _truncate(
    probs_AV: Float[torch.Tensor, "A V"],
    top_p_A: Float[torch.Tensor, " A"],
    top_k_A: Int[torch.Tensor, " A"],
) -> Float[torch.Tensor, "A V"]:
    """Zero all but the top k, and all but the smallest set whose mass reaches top p (both as in SGLang)."""
    sorted_AV, order_AV = probs_AV.sort(dim=-1, descending=True, stable=True)
    mass_before_AV = sorted_AV.cumsum(-1) - sorted_AV
    rank_V = torch.arange(probs_AV.shape[1])
    drop_AV = (rank_V >= top_k_A[:, None]) | ((mass_before_AV >= top_p_A[:, None]) & (top_p_A[:, None] < 1))
    return probs_AV.masked_fill(torch.zeros_like(drop_AV).scatter(-1, order_AV, drop_AV), 0.0)


def _invert_cdf(
    probs_AV: Float[torch.Tensor, "A V"], uniform_A: Float[torch.Tensor, " A"]
) -> Int[torch.Tensor, " A"]:
    """The first token whose cumulative (unnormalised) probability exceeds uniform * total.

    uniform <= 1 - 2^-53 keeps the target below the total in float64, so no token of probability 0 is taken.
    """
    cdf_AV = probs_AV.cumsum(-1)
    target_A = uniform_A * cdf_AV[:, -1]
    tokens_A = torch.searchsorted(cdf_AV, target_A[:, None], right=True)[:, 0]
    return tokens_A.clamp_max(probs_AV.shape[1] - 1)  # only reached by NaN
