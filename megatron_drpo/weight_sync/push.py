"""Send the policy's weights to the rollout servers and verify that they arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_drpo.config import Config, RolloutEngineName
from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.rollout.client import SGLangClient, run_all
from megatron_drpo.weight_sync.checksum import WeightsChecksum
from megatron_drpo.weight_sync.wire import encode_bucket

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Bucket = list[tuple[str, torch.Tensor]]
DEFAULT_BUCKET_BYTES = 256 * 2**20


class WeightPusher:
    """Keeps connections to the servers; used on global rank 0 alone, from one thread."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        timeout_s: float,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        verify_checksum: bool = True,
    ) -> None:
        """
        Args:
            endpoints: base URLs of the servers.
            timeout_s: limit of each request.
            bucket_bytes: tensors are sent in buckets of about this size; one larger tensor goes alone. The
                embedded server holds all buckets until the update ends, so a failed update changes nothing
                there.
            verify_checksum: compare checksums afterwards. SGLang's checker hashes its own fused layout, which
                has no counterpart here: pass False for it, and the version alone is verified.
        """
        self._clients: list[SGLangClient] = []
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._verify_checksum = verify_checksum
        self._tp_sizes: list[int] = []
        """Of each server; known from the first push on."""
        self._runner = asyncio.Runner()

    def push(self, tensors: NamedTensors, policy_version: int, endpoints: Sequence[str]) -> PushReport:
        """Make the servers serve these weights as `policy_version`.

        Args:
            tensors: every tensor of the model under its HF name, whole, on the CPU; consumed as a stream.
        """
        self._clients = [SGLangClient(url, timeout_s=self._timeout_s) for url in endpoints]
        self._tp_sizes = []
        try:
            self._runner.run(self._push(tensors, str(policy_version)))
        except RolloutError as error:
            for _ in tensors:
                pass
            return PushReport([], dict.fromkeys(endpoints, str(error)))
        return PushReport(list(endpoints), {})

    def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            for client in self._clients:
                await client.close()

        self._runner.run(close())
        self._runner.close()

    async def _push(self, tensors: NamedTensors, version: str) -> None:
        if not self._tp_sizes:
            infos = await run_all(client.server_info() for client in self._clients)
            self._tp_sizes = [int(info["tp_size"]) for info in infos]
        checksum = WeightsChecksum()
        await run_all(client.begin_weight_update() for client in self._clients)
        for bucket, is_last in _mark_last(_buckets(tensors, self._bucket_bytes)):
            for name, tensor in bucket:
                checksum.add(name, tensor)
            payload = encode_bucket(bucket)
            await run_all(
                client.update_weights_from_tensor(
                    payload, tp_size=tp_size, weight_version=version if is_last else None
                )
                for client, tp_size in zip(self._clients, self._tp_sizes, strict=True)
            )
        await run_all(client.end_weight_update() for client in self._clients)
        expected = checksum.hexdigest() if self._verify_checksum else None
        await run_all(_verify(client, version, expected) for client in self._clients)


@dataclass(frozen=True, slots=True)
class PushReport:
    """What became of a push."""

    updated: list[str]
    failed: dict[str, str]
    """Endpoint to error."""


def build_pusher(config: Config) -> WeightPusher:
    return WeightPusher(
        [],
        timeout_s=config.weight_sync.timeout_s,
        bucket_bytes=config.weight_sync.bucket_bytes,
        verify_checksum=config.rollout.engine is RolloutEngineName.embedded,
    )


async def _verify(client: SGLangClient, version: str, checksum: str | None) -> None:
    served = await client.weight_version()
    if served != version:
        raise WeightSyncError(f"{client.endpoint}: serves weight version {served!r}, not {version!r}")
    if checksum is None:
        return
    served_checksum = await client.weights_checksum()
    if served_checksum != checksum:
        raise WeightSyncError(
            f"{client.endpoint}: the weights of version {version} have checksum {served_checksum}, "
            f"the trainer's {checksum}"
        )


def _buckets(tensors: NamedTensors, bucket_bytes: int) -> Iterator[Bucket]:
    bucket: Bucket = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket = []
            size = 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _mark_last(buckets: Iterator[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    """Each bucket with whether it is the last; holds two at a time."""
    current = next(buckets, None)
    while current is not None:
        following = next(buckets, None)
        yield current, following is None
        current = following
