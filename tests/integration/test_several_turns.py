"""A run whose rollouts have two turns, by the example's function and reward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]


def test_the_example_asks_again_and_trains_on_answers_alone(
    train: Callable[[list[str]], None],
    run_arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer's logprobs of both answers are the server's: it has seen the same question in between."""
    monkeypatch.chdir(ROOT)  # where the example's module is looked for
    train(
        run_arguments(
            "policy.routing_replay=rollout",  # a router's tie would be a difference of its own
            "rollout.function=examples.second_try:ask",
            "reward.name=examples.second_try:score",
            "rollout.max_response_tokens=14",  # an answer of 5 tokens, a question of 4, an answer of 5
            "rollout.num_prompts_per_step=32",
            "rollout.num_samples_per_prompt=8",
            "rollout.temperature=0.7",
            "metrics.num_rollouts_dumped=256",
        )
    )
    run_dir = tmp_path / "run"
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        assert step["mismatch/first_update_logprob_abs_mean"] < 1e-5
        assert step["mismatch/logprob_abs_max"] < 5e-5
    num_right, num_asked_again = 0, 0
    for path in (run_dir / "rollouts").glob("step_*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            answer, asked_again, second = record["response"].partition(record["prompt"])
            num_right += answer == record["answer"]
            num_asked_again += bool(asked_again)
            assert bool(asked_again) == (answer != record["answer"])
            right = 1.0 if answer == record["answer"] else 0.5 if second == record["answer"] else 0.0
            assert record["reward"] == right
    assert num_asked_again > 400
    assert num_right + num_asked_again == 512
