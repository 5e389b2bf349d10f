"""What a failure at a server is taken for."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.rollout.http_errors import NotDoneError, ServerFailureError, UnreachableError
from megatron_drpo.weight_sync.client import ServerInfo, WeightClient
from megatron_drpo.weight_sync.path import Absence, Server, attempt


class Client:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint


def server(endpoint: str) -> Server:
    return Server(cast(WeightClient, Client(endpoint)), cast(ServerInfo, None))


def wrapped(cause: RolloutError) -> WeightSyncError:
    """As a WeightClient raises it."""
    try:
        raise WeightSyncError(str(cause)) from cause
    except WeightSyncError as error:
        return error


@pytest.mark.parametrize(
    ("error", "is_absence"),
    [
        (UnreachableError("reset"), True),
        (wrapped(NotDoneError("HTTP 503")), True),
        (wrapped(UnreachableError("reset")), True),
        (wrapped(ServerFailureError("HTTP 500")), False),
        (WeightSyncError("another shape"), False),
    ],
)
def test_an_absence_is_told_from_a_refusal(error: RolloutError, is_absence: bool) -> None:
    async def step(each: Server) -> None:
        if each.endpoint == "http://a":
            raise error

    failures = asyncio.run(attempt([server("http://a"), server("http://b")], step))
    assert failures == {"http://a": str(error)}
    assert isinstance(failures["http://a"], Absence) == is_absence
