"""From one response object of SGLang's /generate to checked tokens, logprobs and policy versions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_drpo.errors import RolloutError
from megatron_drpo.types import FinishReason

_MAX_LOGPROB = 1e-6
"""A logprob is at most 0, up to rounding."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server sampled; the three lists have one entry per response token."""

    token_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]
    finish_reason: FinishReason


def parse_completion(response: Any, *, newest_version: int, where: str) -> Completion:
    """Check one response.

    Args:
        newest_version: the trainer's own policy version; no server may be ahead of it.
        where: server and request, for messages.

    Raises:
        RolloutError: fields that are missing, lengths that disagree, a logprob that is not finite or is
            positive, an unknown version.
    """
    try:
        meta = response["meta_info"]
        token_ids = [int(entry[1]) for entry in meta["output_token_logprobs"]]
        logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"]]
        lengths = {len(token_ids), int(meta["completion_tokens"]), len(response["output_ids"])}
        finish_reason = FinishReason(meta["finish_reason"]["type"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RolloutError(f"{where}: malformed response: {type(error).__name__}: {error}") from error
    if len(lengths) != 1 or response["output_ids"] != token_ids:
        raise RolloutError(
            f"{where}: {len(response['output_ids'])} output_ids, {len(token_ids)} output_token_logprobs and "
            f"completion_tokens={meta['completion_tokens']} disagree"
        )
    for index, logprob in enumerate(logprobs):
        if not math.isfinite(logprob) or logprob > _MAX_LOGPROB:
            raise RolloutError(f"{where}: the logprob of response token {index} is {logprob}")
    versions = _policy_versions(meta, len(token_ids), newest_version, where)
    return Completion(token_ids, logprobs, versions, finish_reason)


def _policy_versions(meta: dict[str, Any], num_tokens: int, newest_version: int, where: str) -> list[int]:
    """Per token, from the spans of versions if there are any, else from the one version."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": num_tokens}
    ]
    versions: list[int] = []
    for span in spans:
        version = str(span["version"])
        if not version.isdecimal() or int(version) > newest_version:
            raise RolloutError(
                f"{where}: weight version {span['version']!r} is not one of the trainer's, "
                f"0..{newest_version}; a token never carries an unknown policy version"
            )
        if span["start"] != len(versions):
            break
        versions += [int(version)] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise RolloutError(f"{where}: the version spans {spans} do not cover the {num_tokens} tokens")
    return versions
