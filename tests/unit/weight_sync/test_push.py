"""Weights pushed to real embedded servers, and to servers that do not do as told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.embedded_server.runner import load_model
from megatron_drpo.rollout.client import SGLangClient
from megatron_drpo.weight_sync import tensor_path
from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.push import PushReport, WeightPusher

Tensors = dict[str, torch.Tensor]
StandIn = Any
"""conftest.py's."""


@pytest.fixture
def make_pusher(model_path: Path, tmp_path: Path) -> Iterator[Callable[..., WeightPusher]]:
    """`make_pusher(**settings)`: a pusher of the model of `model_path`, closed after the test."""
    pushers: list[WeightPusher] = []

    def make(**settings: Any) -> WeightPusher:
        settings = {"path": WeightSyncPath.tensor, "timeout_s": 10.0, **settings}
        config = WeightSyncConfig(**settings)
        pushers.append(WeightPusher(config, model_path=model_path, run_dir=tmp_path / "run"))
        return pushers[-1]

    yield make
    for pusher in pushers:
        pusher.close()


@pytest.fixture
def push(make_pusher: Callable[..., WeightPusher]) -> Callable[..., PushReport]:
    """`push(tensors, endpoints, version=1, **settings)`"""

    def run(
        tensors: Iterable[tuple[str, torch.Tensor]], endpoints: list[str], version: int = 1, **settings: Any
    ) -> PushReport:
        return make_pusher(**settings).push(tensors, version, endpoints)

    return run


def get(url: str) -> Any:
    return httpx.get(url, trust_env=False, timeout=10).json()


def logprobs(endpoint: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True},
    }
    meta = httpx.post(f"{endpoint}/generate", json=body, trust_env=False, timeout=10).json()["meta_info"]
    return [e[1] for e in meta["output_token_logprobs"]], [e[0] for e in meta["output_token_logprobs"]]


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize("path", [WeightSyncPath.tensor, WeightSyncPath.disk])
def test_servers_generate_with_the_new_weights(
    push: Callable[..., PushReport],
    endpoint: str,
    model_path: Path,
    new: Tensors,
    tmp_path: Path,
    path: WeightSyncPath,
    bucket_bytes: int,
) -> None:
    """Against a model that transformers loads from a file of the new weights."""
    report = push(iter(new.items()), [endpoint], 3, path=path, bucket_bytes=bucket_bytes)
    assert report == PushReport(updated=[endpoint], failed={}, notes=[])
    assert get(f"{endpoint}/model_info")["weight_version"] == "3"
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_path / "config.json").read_text())
    reference = load_model(tmp_path, torch.float32)
    tokens, actual = logprobs(endpoint, [4, 5, 6])
    expected = reference(torch.tensor([[4, 5, 6, *tokens]])).logits[0, 2:-1].log_softmax(-1)
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(actual), expected.amax(-1), atol=1e-5, rtol=0)


def test_the_stream_is_not_held_in_memory(
    push: Callable[..., PushReport], endpoint: str, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a bucket is sent, no more than the next one and the tensor that closed it have been taken."""
    taken_at_send: list[int] = []
    num_taken = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal num_taken
        for item in new.items():
            num_taken += 1
            yield item

    encode = tensor_path.encode_bucket

    def counting(bucket: Bucket) -> bytes:
        taken_at_send.append(num_taken)
        return encode(bucket)

    monkeypatch.setattr(tensor_path, "encode_bucket", counting)
    push(stream(), [endpoint], bucket_bytes=1)
    assert len(taken_at_send) == len(new)
    assert all(taken <= i + 3 for i, taken in enumerate(taken_at_send))


def test_a_payload_is_serialised_once_for_all_servers(
    push: Callable[..., PushReport],
    make_endpoint: Callable[[], str],
    new: Tensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    encode = tensor_path.encode_bucket

    def counting(bucket: Bucket) -> bytes:
        sizes.append(len(bucket.names))
        return encode(bucket)

    monkeypatch.setattr(tensor_path, "encode_bucket", counting)
    endpoints = [make_endpoint(), make_endpoint()]
    assert push(new.items(), endpoints).updated == endpoints
    assert sizes == [len(new)]
    assert [get(f"{endpoint}/model_info")["weight_version"] for endpoint in endpoints] == ["1", "1"]


def test_a_refused_update_names_server_and_tensor(
    push: Callable[..., PushReport], endpoint: str, new: Tensors
) -> None:
    missing = "model.layers.2.mlp.experts.5.down_proj.weight"
    del new[missing]
    report = push(new.items(), [endpoint])
    assert report.updated == []
    assert report.failed[endpoint].startswith(f"{endpoint}/end_weight_update: HTTP 400: ")
    assert missing in report.failed[endpoint]
    assert get(f"{endpoint}/model_info")["weight_version"] == "0"


def test_an_absent_server_is_named_and_the_others_are_updated(
    push: Callable[..., PushReport], endpoint: str, new: Tensors
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        absent = f"http://127.0.0.1:{sock.getsockname()[1]}"
    report = push(new.items(), [absent, endpoint])
    assert report.updated == [endpoint]
    assert report.failed.keys() == {absent}
    assert "/server_info: cannot be reached" in report.failed[absent]


def test_the_stream_is_consumed_even_if_all_servers_fail(
    push: Callable[..., PushReport], new: Tensors
) -> None:
    """It is a collective of all ranks."""
    stream = iter(new.items())
    with socket.create_server(("127.0.0.1", 0)) as sock:
        absent = f"http://127.0.0.1:{sock.getsockname()[1]}"
    assert push(stream, [absent]).failed.keys() == {absent}
    assert next(stream, None) is None
    stream = iter(new.items())
    assert push(stream, []) == PushReport(updated=[], failed={}, notes=[])
    assert next(stream, None) is None


def test_a_server_with_other_weights_or_version_is_found_out(
    make_pusher: Callable[..., WeightPusher], endpoint: str, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is taken after every second push only; the version after each."""
    first = next(iter(new))
    encode = tensor_path.encode_bucket

    def damage(bucket: Bucket) -> bytes:
        damaged = replace(bucket, data=bucket.data.clone())
        for name, tensor in damaged.tensors():
            if name == first:
                tensor.copy_(tensor.nextafter(tensor + 1))
        return encode(damaged)

    monkeypatch.setattr(tensor_path, "encode_bucket", damage)
    pusher = make_pusher(verify_every=2)
    assert (
        f"{endpoint}: rank 0: {first} has checksum"
        in pusher.push(new.items(), 1, [endpoint]).failed[endpoint]
    )
    assert pusher.push(new.items(), 2, [endpoint]).updated == [endpoint]
    assert pusher.push(new.items(), 3, [endpoint]).updated == []

    async def old_version(client: SGLangClient) -> str:
        return "0"

    monkeypatch.setattr(SGLangClient, "weight_version", old_version)
    failed = pusher.push(new.items(), 4, [endpoint]).failed
    assert failed == {endpoint: f"{endpoint}: serves weight version '0', not '4'"}


def test_pushing_while_requests_run(
    make_pusher: Callable[..., WeightPusher], endpoint: str, new: Tensors
) -> None:
    """Running requests go on, and each says which version sampled its tokens."""
    answers: list[dict[str, Any]] = []

    def generate() -> None:
        params = {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0}
        body = {"input_ids": [[4, 5]] * 4, "sampling_params": params}
        answers.extend(httpx.post(f"{endpoint}/generate", json=body, trust_env=False, timeout=90).json())

    thread = threading.Thread(target=generate)
    pusher = make_pusher()
    thread.start()
    for version in range(1, 21):  # without an end the server would do little else on a busy machine
        assert pusher.push(new.items(), version, [endpoint]).updated == [endpoint]
        if not thread.is_alive():
            break
    thread.join()
    for answer in answers:
        spans = answer["meta_info"]["weight_versions"]
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == 120
        versions = [int(span["version"]) for span in spans]
        assert versions == sorted(set(versions))
        assert len(versions) > 1


def test_one_pusher_pushes_again_and_again_to_whom_it_is_told(
    make_pusher: Callable[..., WeightPusher], make_endpoint: Callable[[], str], new: Tensors
) -> None:
    pusher = make_pusher()
    first, second = make_endpoint(), make_endpoint()
    for version, endpoints in enumerate(([first, second], [second], [first], [second, first]), 1):
        assert pusher.push(new.items(), version, endpoints).updated == endpoints
        for endpoint in endpoints:
            assert get(f"{endpoint}/model_info")["weight_version"] == str(version)


def test_only_the_latest_folder_is_kept(
    make_pusher: Callable[..., WeightPusher], endpoint: str, new: Tensors, tmp_path: Path
) -> None:
    pusher = make_pusher(path=WeightSyncPath.disk)
    for version in (1, 2):
        assert pusher.push(new.items(), version, [endpoint]).updated == [endpoint]
    assert [path.name for path in (tmp_path / "run" / "weights").iterdir()] == ["version_2"]


def test_a_server_that_loads_a_folder_has_a_limit_of_its_own(
    make_pusher: Callable[..., WeightPusher], make_stand_in: Callable[[], StandIn], new: Tensors
) -> None:
    """The other requests of the update keep theirs."""
    server = make_stand_in()
    server.delays_s["/update_weights_from_disk"] = 3.0
    limits = {"path": WeightSyncPath.disk, "timeout_s": 1.5}
    assert make_pusher(**limits, disk_timeout_s=20.0).push(new.items(), 1, [server.endpoint]).failed == {}
    report = make_pusher(**limits, disk_timeout_s=2.0).push(new.items(), 2, [server.endpoint])
    assert "/update_weights_from_disk: no answer within 2 s" in report.failed[server.endpoint]
    server.delays_s["/model_info"] = 3.0
    report = make_pusher(**limits, disk_timeout_s=20.0).push(new.items(), 3, [server.endpoint])
    assert "/model_info: no answer within 1.5 s" in report.failed[server.endpoint]


def test_a_folder_that_cannot_be_written_is_every_servers_failure(
    push: Callable[..., PushReport], endpoint: str, new: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    report = push(new.items(), [endpoint], path=WeightSyncPath.disk)
    assert "cannot be written" in report.failed[endpoint]
    assert get(f"{endpoint}/model_info")["weight_version"] == "0"


# ------------------------------------------------------------------------------------- failures

STEPS = {
    "/server_info": 0,
    "/pause_generation": 1,
    "/begin_weight_update": 2,
    "/update_weights_from_tensor": 3,
    "/end_weight_update": 5,
    "/model_info": 6,
    "/weights_checker": 7,
    "/continue_generation": 8,
}
"""Each step, and how many requests the server has answered before it when there are two buckets."""


@pytest.mark.parametrize("fault", ["500", "reset", "hang"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_concerns_that_server_alone(
    make_pusher: Callable[..., WeightPusher],
    make_stand_in: Callable[[], StandIn],
    stopwatch: Callable[[], float],
    new: Tensors,
    step: str,
    fault: str,
) -> None:
    """It is reported, nothing more is asked of it, the other is updated, and the next push repairs it."""
    bad, good = make_stand_in(), make_stand_in()
    bad.faults[step] = fault
    pusher = make_pusher(timeout_s=2.0, bucket_bytes=sum(t.nbytes for t in new.values()) * 2 // 3)
    stream = iter(new.items())
    report = pusher.push(stream, 1, [bad.endpoint, good.endpoint])
    assert next(stream, None) is None
    assert report.updated == [good.endpoint]
    assert report.failed.keys() == {bad.endpoint}
    assert report.failed[bad.endpoint].startswith(f"{bad.endpoint}{step}: ")
    assert bad.asked[-1] == step
    assert len(bad.asked) == STEPS[step] + 1
    assert good.asked[-1] == "/continue_generation"
    assert stopwatch() < 10
    bad.faults.clear()
    bad.received.clear()
    assert pusher.push(new.items(), 2, [bad.endpoint, good.endpoint]).failed == {}
    for server in (bad, good):
        assert server.version == "2"
        assert server.received.keys() == new.keys()
        assert all(torch.equal(server.received[name], new[name]) for name in new)
