"""Rollouts on disk and on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.metrics import rollout_dump
from megatron_drpo.metrics.rollout_dump import (
    RolloutRecord,
    build_record,
    delete_rollouts,
    write_index,
    write_rollouts,
)
from megatron_drpo.types import FinishReason, Prompt, Rollout

NASTY = "</script><script>alert(1)</script> \u2028 \x85 \ud800 @@DATA@@ ü"


def make_record(
    response: str = "42", step: int = 0, response_mask: list[bool] | None = None
) -> RolloutRecord:
    prompt = Prompt(id=7, text=f"6 * 7 = {NASTY}", token_ids=(5, 6, 7, 8), answer="42")
    rollout = Rollout(
        prompt=prompt,
        sample_index=3,
        response_ids=[4, 2, 0],
        rollout_logprobs=[-0.5, -1.0, -3.0],
        policy_versions=[step, step, step + 1],
        finish_reason=FinishReason.length,
        text=response,
        response_mask=response_mask,
    )
    return build_record(rollout, reward=1.0, advantage=-0.25)


def page_data(page: str) -> list[dict[str, Any]]:
    """What a browser finds in the page's data element, which ends at the first `</script`."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_record_of_a_rollout() -> None:
    record = make_record(step=2)
    assert record.policy_versions == [(2, 2), (3, 1)]
    assert record.mean_logprob == pytest.approx(-1.5)
    assert (record.prompt_id, record.sample_index, record.answer) == (7, 3, "42")
    assert (record.prompt_tokens, record.response_tokens, record.finish_reason) == (4, 3, "length")
    assert (record.reward, record.advantage) == (1.0, -0.25)


def test_inserted_tokens_have_no_logprob() -> None:
    record = make_record(response_mask=[True, False, True])
    assert record.mean_logprob == pytest.approx(-1.75)
    assert record.response_tokens == 3


def test_step_file_has_a_line_per_rollout_and_is_replaced_whole(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 12, [make_record("old"), make_record("old"), make_record("old")])
    path = write_rollouts(tmp_path, 12, [make_record(NASTY), make_record("new")])
    assert path == tmp_path / "rollouts" / "step_000012.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["response"] for record in records] == [NASTY, "new"]
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000012.jsonl"]


def test_files_of_steps_that_are_run_again_go(tmp_path: Path) -> None:
    delete_rollouts(tmp_path, after_step=0)  # nothing there yet
    for step in (2, 9, 10, 1_000_000):
        write_rollouts(tmp_path, step, [make_record()])
    write_index(tmp_path)
    delete_rollouts(tmp_path, after_step=9)
    kept = {"step_000002.jsonl", "step_000009.jsonl", "index.html"}
    assert {path.name for path in (tmp_path / "rollouts").iterdir()} == kept


def test_page_holds_the_steps_and_survives_any_text(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 3, [make_record(NASTY)])
    write_rollouts(tmp_path, 1, [make_record("one"), make_record("two")])
    page = write_index(tmp_path).read_text()
    steps = page_data(page)
    assert [(step["step"], len(step["rollouts"])) for step in steps] == [(1, 2), (3, 1)]
    assert steps[1]["rollouts"][0]["response"] == NASTY
    assert steps[1]["rollouts"][0]["policy_versions"] == [[0, 2], [1, 1]]
    assert page.count("<script") == 2


def test_page_loads_nothing(tmp_path: Path) -> None:
    """It must work from a folder, offline."""
    page = write_index(tmp_path).read_text()
    assert page_data(page) == []
    assert not re.search(r"https?:|src=|@import|url\(|fetch\(|<link", page)


def test_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 of 20 steps: the last 4, and 4 evenly from the first 16, the very first among them."""
    monkeypatch.setattr(rollout_dump, "PAGE_STEPS", 8)
    monkeypatch.setattr(rollout_dump, "PAGE_CHARACTERS", 10)
    for step in range(20):
        write_rollouts(tmp_path, step, [make_record("x" * 1234)])
    steps = page_data(write_index(tmp_path).read_text())
    assert [step["step"] for step in steps] == [0, 5, 10, 15, 16, 17, 18, 19]
    assert steps[1]["rollouts"][0]["response"] == "xxxxxxxxxx … (1,224 more characters in step_000005.jsonl)"
