"""Rollouts for reading: one JSONL file per step, and a page that shows them in any browser, offline."""

from __future__ import annotations

import html
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_drpo.types import Rollout

PAGE_STEPS = 40
"""Steps on the page: the last half of them, and earlier ones spread evenly."""

PAGE_CHARACTERS = 4000
"""Of a prompt or a response on the page; the JSONL files have all."""

_TEMPLATE = Path(__file__).with_name("rollout_page.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecord:
    """What is kept of one rollout; a line of rollouts/step_000012.jsonl."""

    prompt_id: int
    """Line of the prompt file, from 0."""
    sample_index: int
    """Within the samples of this prompt."""
    prompt: str
    response: str
    answer: str | None
    reward: float
    advantage: float
    prompt_tokens: int
    response_tokens: int
    finish_reason: str
    policy_versions: list[tuple[int, int]]
    """(version, tokens) runs in order: more than one if the weights changed while sampling."""
    mean_logprob: float
    """Mean log mu of the response's sampled tokens."""


def build_record(rollout: Rollout, *, reward: float, advantage: float) -> RolloutRecord:
    runs = itertools.groupby(rollout.policy_versions)
    mask = rollout.response_mask or itertools.repeat(True)
    sampled = list(itertools.compress(rollout.rollout_logprobs, mask))
    return RolloutRecord(
        prompt_id=rollout.prompt.id,
        sample_index=rollout.sample_index,
        prompt=rollout.prompt.text,
        response=rollout.text,
        answer=rollout.prompt.answer,
        reward=reward,
        advantage=advantage,
        prompt_tokens=len(rollout.prompt.token_ids),
        response_tokens=len(rollout.response_ids),
        finish_reason=rollout.finish_reason.value,
        policy_versions=[(version, len(list(run))) for version, run in runs],
        mean_logprob=sum(sampled) / max(len(sampled), 1),
    )


def write_rollouts(run_dir: str | Path, step: int, records: Sequence[RolloutRecord]) -> Path:
    """Write run_dir/rollouts/step_NNNNNN.jsonl, whole or not at all; a step run again replaces its file."""
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06}.jsonl"
    lines = [json.dumps(asdict(record), allow_nan=False) + "\n" for record in records]
    _write_atomically(path, "".join(lines))
    return path


def delete_rollouts(run_dir: str | Path, *, after_step: int) -> None:
    """Delete the files of later steps: the run continues after `after_step` and will write its own."""
    for path in (Path(run_dir) / "rollouts").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > after_step:
            path.unlink()


def write_index(run_dir: str | Path) -> Path:
    """Write run_dir/rollouts/index.html from the JSONL files there: one file, no network needed."""
    folder = Path(run_dir) / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    paths = _spread(sorted(folder.glob("step_*.jsonl")), PAGE_STEPS)
    steps = [{"step": int(path.stem.removeprefix("step_")), "rollouts": _read(path)} for path in paths]
    # `<` could end the script element: inside JSON strings, the only place it occurs, < means the same.
    data = json.dumps(steps).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("@@TITLE@@", html.escape(Path(run_dir).resolve().name)).replace("@@DATA@@", data)
    path = folder / "index.html"
    _write_atomically(path, page)
    return path


def _spread(paths: list[Path], limit: int) -> list[Path]:
    """At most `limit` paths in order: the last limit/2, and others spread evenly over the earlier ones."""
    if len(paths) <= limit:
        return paths
    recent = limit // 2
    earlier, spread = paths[:-recent], limit - recent
    picked = [earlier[round(i * (len(earlier) - 1) / (spread - 1))] for i in range(spread)]
    return [*picked, *paths[-recent:]]


def _read(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        for name in ("prompt", "response"):
            hidden = len(record[name]) - PAGE_CHARACTERS
            if hidden > 0:
                record[name] = (
                    f"{record[name][:PAGE_CHARACTERS]} … ({hidden:,} more characters in {path.name})"
                )
    return records


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
