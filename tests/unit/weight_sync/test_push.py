"""Weights pushed to real embedded servers, and to servers that do not do as told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.errors import WeightSyncError
from megatron_drpo.rollout.client import SGLangClient
from megatron_drpo.rollout.embedded.runner import load_model
from megatron_drpo.weight_sync import push as push_module
from megatron_drpo.weight_sync.checksum import compute_checksum
from megatron_drpo.weight_sync.push import WeightPusher

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def new(model_path: Path) -> Tensors:
    torch.manual_seed(3)
    tensors = load_file(model_path / "model.safetensors")
    return {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def push_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    endpoints: list[str],
    *,
    policy_version: int,
    timeout_s: float,
    **settings: Any,
) -> None:
    pusher = WeightPusher(endpoints, timeout_s=timeout_s, **settings)
    try:
        pusher.push(tensors, policy_version)
    finally:
        pusher.close()


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
def test_servers_generate_with_the_new_weights(
    endpoint: str, model_path: Path, new: Tensors, tmp_path: Path, bucket_bytes: int
) -> None:
    """Against a model that transformers loads from a file of the new weights."""
    push_weights(iter(new.items()), [endpoint], policy_version=3, timeout_s=10, bucket_bytes=bucket_bytes)
    assert get(f"{endpoint}/model_info")["weight_version"] == "3"
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_path / "config.json").read_text())
    reference = load_model(tmp_path, torch.float32)
    tokens, actual = logprobs(endpoint, [4, 5, 6])
    expected = reference(torch.tensor([[4, 5, 6, *tokens]])).logits[0, 2:-1].log_softmax(-1)
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(actual), expected.amax(-1), atol=1e-5, rtol=0)


def test_the_stream_is_not_held_in_memory(
    endpoint: str, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small buckets at most two are taken from the stream before the first is sent."""
    taken_at_send: list[int] = []
    num_taken = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal num_taken
        for item in new.items():
            num_taken += 1
            yield item

    encode = push_module.encode_bucket

    def counting(bucket: list[tuple[str, torch.Tensor]]) -> bytes:
        taken_at_send.append(num_taken)
        return encode(bucket)

    monkeypatch.setattr(push_module, "encode_bucket", counting)
    push_weights(stream(), [endpoint], policy_version=1, timeout_s=10, bucket_bytes=1)
    assert taken_at_send[:3] == [3, 4, 5]  # the next bucket and the tensor that closed it
    assert len(taken_at_send) == len(new)


def test_a_payload_is_serialised_once_for_all_servers(
    make_endpoint: Callable[[], str], new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = push_module.encode_bucket

    def counting(bucket: list[tuple[str, torch.Tensor]]) -> bytes:
        sizes.append(len(bucket))
        return encode(bucket)

    monkeypatch.setattr(push_module, "encode_bucket", counting)
    endpoints = [make_endpoint(), make_endpoint()]
    push_weights(new.items(), endpoints, policy_version=1, timeout_s=10)
    assert sizes == [len(new)]
    assert [get(f"{endpoint}/model_info")["weight_version"] for endpoint in endpoints] == ["1", "1"]


def test_a_refused_update_names_server_and_tensor(endpoint: str, new: Tensors) -> None:
    del new["model.layers.2.mlp.experts.5.down_proj.weight"]
    with pytest.raises(
        WeightSyncError, match=rf"{endpoint}/end_weight_update: HTTP 400: .*experts\.5\.down_proj"
    ):
        push_weights(new.items(), [endpoint], policy_version=1, timeout_s=10)
    assert get(f"{endpoint}/model_info")["weight_version"] == "0"


def test_an_absent_server_is_named(endpoint: str, new: Tensors) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        absent = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(WeightSyncError, match=rf"{absent}/server_info: cannot be reached"):
        push_weights(new.items(), [endpoint, absent], policy_version=1, timeout_s=10)


def test_a_server_with_other_weights_or_version_is_found_out(
    endpoint: str, new: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(new))
    encode = push_module.encode_bucket

    def damage(bucket: list[tuple[str, torch.Tensor]]) -> bytes:
        return encode([(name, t.nextafter(t + 1) if name == first else t) for name, t in bucket])

    monkeypatch.setattr(push_module, "encode_bucket", damage)
    checksum = compute_checksum(new.items())
    with pytest.raises(
        WeightSyncError, match=rf"{endpoint}: the weights of version 1 have .* trainer's {checksum}"
    ):
        push_weights(new.items(), [endpoint], policy_version=1, timeout_s=10)
    push_weights(new.items(), [endpoint], policy_version=2, timeout_s=10, verify_checksum=False)

    async def old_version(client: SGLangClient) -> str:
        return "0"

    monkeypatch.setattr(SGLangClient, "weight_version", old_version)
    with pytest.raises(WeightSyncError, match=rf"{endpoint}: serves weight version '0', not '3'"):
        push_weights(new.items(), [endpoint], policy_version=3, timeout_s=10)


def test_pushing_while_requests_run(endpoint: str, new: Tensors) -> None:
    """Running requests go on, and each says which version sampled its tokens."""
    answers: list[dict[str, Any]] = []

    def generate() -> None:
        params = {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0}
        body = {"input_ids": [[4, 5]] * 4, "sampling_params": params}
        answers.extend(httpx.post(f"{endpoint}/generate", json=body, trust_env=False, timeout=30).json())

    thread = threading.Thread(target=generate)
    thread.start()
    version = 0
    while thread.is_alive():
        version += 1
        push_weights(new.items(), [endpoint], policy_version=version, timeout_s=10)
    thread.join()
    for answer in answers:
        spans = answer["meta_info"]["weight_versions"]
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == 120
        versions = [int(span["version"]) for span in spans]
        assert versions == sorted(set(versions))
        assert len(versions) > 1


def test_timeout_is_an_error(endpoint: str, new: Tensors) -> None:
    with pytest.raises(WeightSyncError, match=r"no answer within 1e-06 s"):
        push_weights(new.items(), [endpoint], policy_version=1, timeout_s=1e-6)


def test_one_pusher_pushes_again_and_again(endpoint: str, new: Tensors) -> None:
    pusher = WeightPusher([endpoint], timeout_s=10)
    for version in (1, 2, 3):
        pusher.push(new.items(), version)
        assert get(f"{endpoint}/model_info")["weight_version"] == str(version)
    pusher.close()
