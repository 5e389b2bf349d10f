"""Weights inside requests: base64 pickles over HTTP, or handles of GPU memory where both share a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.path import Failures, Server, attempt, begin, end
from megatron_drpo.weight_sync.wire import encode_bucket, encode_cuda_handle


class TensorPath:
    """Needs nothing but HTTP. A bucket on a GPU is sent as a CUDA IPC handle, so its servers must be on this
    machine and see that GPU; a bucket on the CPU travels whole."""

    def __init__(self) -> None:
        self._version = ""

    async def open(self, servers: Sequence[Server], version: str) -> Failures:
        self._version = version
        return await begin(servers)

    async def send(self, servers: Sequence[Server], bucket: Bucket) -> Failures:
        if bucket.data.is_cuda:
            torch.cuda.synchronize(bucket.data.device)  # the servers read on streams of their own
            content = b""
        else:
            content = encode_bucket(bucket)
        version = self._version if bucket.is_last else None

        async def step(server: Server) -> None:
            # Every tensor-parallel rank gets the whole tensors and takes its part.
            ranks = range(server.info.tp_size)
            payloads = [content or encode_cuda_handle(bucket) for _ in ranks]
            await server.client.update_weights_from_tensor(payloads, weight_version=version)

        return await attempt(servers, step)

    async def finish(self, servers: Sequence[Server]) -> Failures:
        return await end(servers)

    async def discard(self, endpoints: Sequence[str]) -> None:
        pass

    async def close(self) -> None:
        pass
