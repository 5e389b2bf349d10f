"""Weights through an HF folder on a file system that the servers share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_drpo.weight_sync.bucket import Bucket
from megatron_drpo.weight_sync.path import Failures, Server, attempt
from megatron_drpo.weights.hf_folder import HfWriter


class DiskPath:
    """Writes run_dir/weights/version_N, holding one bucket in memory, and deletes older versions once servers
    have the new one. Servers go on generating while the folder is written."""

    def __init__(
        self, run_dir: str | Path, *, source: str | Path, bucket_bytes: int, load_limit_s: float
    ) -> None:
        """
        Args:
            source: the HF folder whose config and tokenizer files go with the weights.
            bucket_bytes: about the size of one weights file.
            load_limit_s: how long a server may take to load all weights.
        """
        self._root = Path(run_dir).resolve() / "weights"
        self._source = source
        self._bucket_bytes = bucket_bytes
        self._load_limit_s = load_limit_s
        self._version = ""
        self._writer: HfWriter | None = None

    async def open(self, servers: Sequence[Server], version: str) -> Failures:
        self._abandon()
        self._version = version

        def create() -> None:
            folder, source = self._folder, self._source
            writer = HfWriter(folder, source=source, max_shard_bytes=self._bucket_bytes, overwrite=True)
            self._writer = writer.__enter__()

        return self._try(create, servers)

    async def send(self, servers: Sequence[Server], bucket: Bucket) -> Failures:
        def write() -> None:
            assert self._writer is not None
            for name, tensor in bucket.tensors():
                self._writer.add(name, tensor)
            if bucket.is_last:
                self._writer.__exit__(None, None, None)
                self._writer = None

        return self._try(write, servers)

    async def finish(self, servers: Sequence[Server]) -> Failures:
        async def step(server: Server) -> None:
            await server.client.pause_generation()
            await server.client.update_weights_from_disk(
                str(self._folder), weight_version=self._version, timeout_s=self._load_limit_s
            )

        failures = await attempt(servers, step)
        if len(failures) < len(servers):
            for folder in self._root.iterdir():
                if folder != self._folder:
                    shutil.rmtree(folder, ignore_errors=True)
        return failures

    async def discard(self, endpoints: Sequence[str]) -> None:
        pass

    async def close(self) -> None:
        self._abandon()

    def _try(self, write: Callable[[], None], servers: Sequence[Server]) -> Failures:
        """A folder that cannot be written is every server's failure."""
        try:
            write()
        except OSError as error:
            self._abandon()
            return {server.endpoint: f"{self._folder}: cannot be written: {error}" for server in servers}
        return {}

    def _abandon(self) -> None:
        if self._writer is not None:
            error = InterruptedError("the update was not finished")
            self._writer.__exit__(type(error), error, None)
            self._writer = None

    @property
    def _folder(self) -> Path:
        return self._root / f"version_{self._version}"
