"""Tokens that an engine cannot have sampled with the probability it reported, named for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_drpo.types import Origin

_NUM_SHOWN = 3
"""Tokens named in one message."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FaultyToken:
    """A loss token that was left out, see `losses.objective.Objective.is_faulty`."""

    replica: int
    """Data-parallel rank whose leader has the sequence."""
    sequence_id: int
    """Unique within a replica's share of a step."""
    position: int
    """Index among the response tokens."""
    logprob: float
    """log pi."""
    rollout_logprob: float
    """log mu as the engine reported it."""


@dataclass(frozen=True, slots=True)
class FaultReport:
    """A faulty token in words."""

    endpoint: str
    """Of the server that sampled it."""
    where: str


def report_faults(faults: Iterable[FaultyToken], origins: Mapping[int, Origin | None]) -> list[FaultReport]:
    """
    Args:
        faults: of one replica.
        origins: of its sequences, by id.
    """
    reports = []
    for fault in faults:
        origin = origins.get(fault.sequence_id)
        where = f"sequence {fault.sequence_id}" if origin is None else origin.where
        values = f"log pi {fault.logprob:.4g}, log mu {fault.rollout_logprob:.4g}"
        endpoint = "an unknown server" if origin is None else origin.server_of(fault.position)
        reports.append(FaultReport(endpoint, f"{where}, response token {fault.position} ({values})"))
    return reports


def alarm_of_faults(reports: list[FaultReport], limit: float) -> str:
    """What is wrong, where, and what to do.

    Args:
        reports: at least one.
        limit: `algorithm.correction.faulty_log_ratio`.
    """
    counts: dict[str, int] = {}
    for report in reports:
        counts[report.endpoint] = counts.get(report.endpoint, 0) + 1
    servers = ", ".join(f"{endpoint}: {count}" for endpoint, count in sorted(counts.items()))
    shown = "; ".join(f"{report.where} of {report.endpoint}" for report in reports[:_NUM_SHOWN])
    more = f"; and {len(reports) - _NUM_SHOWN} more" if len(reports) > _NUM_SHOWN else ""
    are = "1 faulty token was" if len(reports) == 1 else f"{len(reports)} faulty tokens were"
    return (
        f"{are} kept out of the loss ({servers}): more than e^{limit:g} times as probable under the policy "
        f"as the server that sampled it says, which no sampling brings about. {shown}{more}. The server "
        "reports wrong logprobs or has wrong weights: look at its log, restart it, or take it out of the "
        "fleet. The limit is algorithm.correction.faulty_log_ratio"
    )
