"""Servers that let go of their memory and take it back: the protocol, on real embedded servers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from megatron_drpo.config.schema import RolloutConfig, WeightSyncConfig, WeightSyncPath
from megatron_drpo.errors import WeightSyncError
from megatron_drpo.fleet.state import FleetState, ServerState, ServerStatus, yield_file
from megatron_drpo.weight_sync.client import MemoryTag, WeightClient
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weight_sync.server_memory import ServerMemory

pytestmark = pytest.mark.server
MakeEndpoint = Callable[[], str]
BODY = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 8, "temperature": 0.0}}


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


def make_memory(**fields: str) -> ServerMemory:
    return ServerMemory(RolloutConfig(startup_timeout_s=5.0, **fields), timeout_s=20.0)  # type: ignore[arg-type]


def test_released_weights_are_gone_until_an_update(
    make_endpoint: MakeEndpoint, model_path: Path, tmp_path: Path, http: httpx.Client
) -> None:
    endpoint = make_endpoint()
    before = http.post(f"{endpoint}/generate", json=BODY).json()["output_ids"]
    memory = make_memory()
    assert memory.release([endpoint]) == {}
    assert memory.released == [endpoint]
    refused = http.post(f"{endpoint}/generate", json=BODY)
    assert refused.status_code == 500
    assert "released" in refused.text
    assert memory.resume([endpoint], MemoryTag.weights) == {}
    pusher = WeightPusher(
        WeightSyncConfig(path=WeightSyncPath.tensor), model_path=model_path, run_dir=tmp_path
    )
    report = pusher.push(load_file(model_path / "model.safetensors").items(), 1, [endpoint])
    pusher.close()
    assert report.updated == [endpoint]
    assert http.post(f"{endpoint}/generate", json=BODY).status_code == 500, "it has no cache yet"
    assert memory.resume([endpoint], MemoryTag.cache) == {}
    assert memory.released == []
    assert http.post(f"{endpoint}/generate", json=BODY).json()["output_ids"] == before
    assert memory.resume([endpoint], MemoryTag.cache) == {}, "nothing to take back is no failure"


def test_resumed_weights_are_nan_until_an_update(make_endpoint: MakeEndpoint, http: httpx.Client) -> None:
    """So that a tensor which an update forgets is noticed."""
    endpoint, memory = make_endpoint(), make_memory()
    memory.release([endpoint])
    for tag in MemoryTag:
        memory.resume([endpoint], tag)
    assert "non-finite" in http.post(f"{endpoint}/generate", json=BODY).text


def test_a_release_waits_for_what_is_generated(make_endpoint: MakeEndpoint, http: httpx.Client) -> None:
    endpoint, memory = make_endpoint(), make_memory()
    with held_request(endpoint, http) as answers:
        with pytest.raises(WeightSyncError, match="only while nothing is generated"):
            asyncio.run(release_now(endpoint))
        threading.Timer(0.3, lambda: http.post(f"{endpoint}/continue_generation", json={})).start()
        start = time.monotonic()
        assert memory.release([endpoint]) == {}
        assert time.monotonic() - start > 0.2
    assert answers == [200]


@contextmanager
def held_request(endpoint: str, http: httpx.Client) -> Iterator[list[int]]:
    """A request that waits at a paused server; the status of its answer afterwards."""
    http.post(f"{endpoint}/pause_generation", json={"mode": "in_place"})
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{endpoint}/generate", json=BODY, timeout=30).status_code)
    )
    thread.start()
    while http.post(f"{endpoint}/flush_cache").is_success:  # until the request has come
        time.sleep(0.01)
    yield answers
    thread.join(timeout=10)


async def release_now(endpoint: str) -> None:
    async with WeightClient(endpoint, timeout_s=20.0) as client:
        await client.release_memory(tuple(MemoryTag))


def test_a_dead_server_is_named(make_endpoint: MakeEndpoint) -> None:
    failures = make_memory().release([make_endpoint(), "http://127.0.0.1:1"])
    assert list(failures) == ["http://127.0.0.1:1"]
    assert "cannot be reached" in failures["http://127.0.0.1:1"]


def test_the_announcement_waits_for_a_server_that_is_starting(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    server = ServerState(name="rollout server 0", state=ServerStatus.starting)
    fleet = FleetState(pid=1, servers=[server])
    fleet.write(path)

    def come_up() -> None:
        time.sleep(0.5)
        assert yield_file(path).exists()
        server.state = ServerStatus.up
        fleet.write(path)

    memory = make_memory(fleet_file=str(path))
    thread = threading.Thread(target=come_up)
    thread.start()
    start = time.monotonic()
    memory.announce()
    assert time.monotonic() - start >= 0.4
    thread.join()
    memory.end()
    assert not yield_file(path).exists()
