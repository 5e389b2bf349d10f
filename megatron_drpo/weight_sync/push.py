"""Send the policy's weights to rollout servers and verify that they arrived.

The calling thread takes the tensors from the policy (a collective of all ranks) and packs the next bucket,
while threads of the pusher's own hash it and send the last one. At each server: pause in place -> begin ->
buckets -> end -> verify -> continue. Requests in flight stay where they are meanwhile and go on with the new
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_drpo.config.schema import WeightSyncConfig, WeightSyncPath
from megatron_drpo.errors import WeightSyncError
from megatron_drpo.rollout.event_loop import EventLoopThread
from megatron_drpo.rollout.time_limits import reload_limit_s
from megatron_drpo.weight_sync.bucket import Bucket, BucketPacker, NamedTensors
from megatron_drpo.weight_sync.disk_path import DiskPath
from megatron_drpo.weight_sync.distributed_path import DistributedPath
from megatron_drpo.weight_sync.path import Failures, Server, WeightPath, attempt
from megatron_drpo.weight_sync.servers import Servers
from megatron_drpo.weight_sync.source_hash import SourceHasher
from megatron_drpo.weight_sync.tensor_path import TensorPath
from megatron_drpo.weight_sync.verify import Checksums, Verification
from megatron_drpo.weights.hf_folder import read_hf_config

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class PushReport:
    """What became of one update."""

    updated: list[str]
    """Endpoints that serve the new weights, in the order given."""
    failed: dict[str, str]
    """Endpoint -> why. Its weights may be a mixture, and it is paused or dead: let it serve nothing until an
    update succeeds."""
    notes: list[str] = field(default_factory=list)
    """What a person should know; each is said once in the pusher's life."""


@dataclass(slots=True)
class _Update:
    """One push, as far as it has come."""

    version: str
    servers: list[Server]
    """Those that have not failed."""
    failed: Failures
    all_failed: bool = False
    verification: Verification | None = None


class WeightPusher:
    """Keeps connections and broadcast groups; used on global rank 0 alone, from one thread."""

    def __init__(
        self,
        config: WeightSyncConfig,
        *,
        model_path: str | Path,
        run_dir: str | Path,
        device: torch.device = _CPU,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            model_path: the policy's HF folder, whose config.json says what the servers serve.
            run_dir: the disk path writes below it.
            device: of the policy's tensors.
            api_key: what the servers ask for.
        """
        self._config = config
        self._model_config = read_hf_config(Path(model_path))
        self._path = _build_path(config, model_path, run_dir, device)
        self._packer = BucketPacker(
            config.bucket_bytes, _CPU if config.path is WeightSyncPath.disk else device
        )
        self._keeps_buffers = device.type == "cpu"
        self._servers = Servers(config.timeout_s, api_key)
        self._num_pushed = 0
        self._agreed_version = ""
        self._agreed: Mapping[Any, Checksums] = {}
        self._known: set[Any] = set()
        self._hasher = SourceHasher(config.bucket_bytes // 4)
        self._has_noted_unknown = False
        self._loop = EventLoopThread("weight sync")

    def push(self, tensors: NamedTensors, policy_version: int, endpoints: Sequence[str]) -> PushReport:
        """Make servers serve these weights as `policy_version`; a server's failure is reported, not raised.

        Args:
            tensors: every tensor of the model under its HF name, whole; consumed as a stream, to its end even
                where all servers have failed.
            endpoints: base URLs of the servers to update now.
        """
        update = _Update(str(policy_version), [], {})
        opening = sending = self._loop.submit(self._open(update, endpoints))

        def add(name: str, tensor: torch.Tensor) -> None:
            opening.result()  # it says what is to be verified
            if update.verification is not None and not update.all_failed:
                update.verification.add(name, tensor)

        if self._verifies():
            tensors = self._hasher.watch(tensors, add)
        try:
            # While one bucket travels the next is gathered, in the other of the packer's buffers.
            for bucket in self._packer.pack(tensors, wanted=lambda: not update.all_failed):
                sending.result()
                sending = self._loop.submit(self._send(update, bucket))
        finally:
            sending.result()
            if not self._keeps_buffers:
                self._packer.release()
        notes = self._loop.submit(self._finish(update)).result()
        self._num_pushed += 1
        updated = [server.endpoint for server in update.servers]
        return PushReport(updated, update.failed, notes)

    def close(self) -> None:
        """Leave the groups and close the connections, without waiting for dead servers; repeatable."""
        if self._loop.is_closed:
            return

        async def close() -> None:
            await self._path.close()
            await self._servers.close()

        self._loop.run(close())
        self._loop.close()
        self._hasher.close()

    def _verifies(self) -> bool:
        """Whether the checksums of this push are compared."""
        every = self._config.verify_every
        return every > 0 and self._num_pushed % every == 0

    # ------------------------------------------------------------------------- in the loop's thread

    async def _open(self, update: _Update, endpoints: Sequence[str]) -> None:
        urls = list(dict.fromkeys(endpoint.rstrip("/") for endpoint in endpoints))
        update.servers, failures = await self._servers.find(urls)
        await self._take(update, failures)
        await self._take(update, await self._path.open(update.servers, update.version))
        if self._verifies():
            agreed = self._agreed if self._agreed_version == update.version else {}
            update.verification = Verification(update.servers, self._model_config, agreed, self._known)

    async def _send(self, update: _Update, bucket: Bucket) -> None:
        if update.servers:
            await self._take(update, await self._path.send(update.servers, bucket))

    async def _finish(self, update: _Update) -> list[str]:
        """The steps after the last bucket; returns the notes."""
        notes: list[str] = []
        await self._take(update, await self._path.finish(update.servers))

        async def check_version(server: Server) -> None:
            served = await server.client.weight_version()
            if served != update.version:
                raise WeightSyncError(
                    f"{server.endpoint}: serves weight version {served!r}, not {update.version!r}"
                )

        await self._take(update, await attempt(update.servers, check_version))
        if update.verification is not None and update.servers:
            await self._take(update, await update.verification.compare(update.servers))
            self._agreed_version, self._agreed = update.version, update.verification.agreed
            notes = self._notes(update.verification)
        resume = await attempt(update.servers, lambda server: server.client.continue_generation())
        await self._take(update, resume)
        return notes

    async def _take(self, update: _Update, failures: Failures) -> None:
        """Go on without the servers that failed. Nothing more is asked of them: they must not serve."""
        update.failed |= failures
        update.servers = [server for server in update.servers if server.endpoint not in failures]
        update.all_failed = not update.servers
        await self._path.discard(list(failures))
        await self._servers.forget(list(failures))

    def _notes(self, verification: Verification) -> list[str]:
        if not verification.unknown or self._has_noted_unknown:
            return []
        self._has_noted_unknown = True
        return [
            f"weights of {', '.join(verification.unknown)} lie in a layout that is not known here: their "
            "checksums are compared with each other only"
        ]


def _build_path(
    config: WeightSyncConfig, model_path: str | Path, run_dir: str | Path, device: torch.device
) -> WeightPath:
    if config.path is WeightSyncPath.tensor:
        return TensorPath()
    if config.path is WeightSyncPath.disk:
        return DiskPath(
            run_dir,
            source=model_path,
            bucket_bytes=config.bucket_bytes,
            load_limit_s=reload_limit_s(config),
        )
    assert config.path is WeightSyncPath.distributed  # `resolve_config` leaves no auto
    return DistributedPath(
        host=config.host,
        backend="nccl" if device.type == "cuda" else "gloo",
        servers_per_group=config.servers_per_group,
        timeout_s=config.timeout_s,
    )
