"""The weight-update endpoints of one server that speaks SGLang's native HTTP API.

Endpoints and fields: https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/managers/io_struct.py.
Updates never flush the server's cache: a refused flush would fail the update, and requests carry the policy
version as `extra_key`, which keeps the versions' prefixes apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.rollout.answer import Answer, shorten
from megatron_drpo.rollout.client import SGLangClient
from megatron_drpo.rollout.http_errors import NotDoneError
from megatron_drpo.rollout.retry import retry_while_unavailable

_MAX_WAIT_S = 30.0
"""For a server that is busy or not there at present; other servers wait for it meanwhile."""
EMBEDDED = "embedded"
"""The `frontend` that this project's own server reports; SGLang's is `python`."""


class MemoryTag(StrEnum):
    """Parts of a server's memory, as SGLang names them."""

    weights = "weights"
    cache = "kv_cache"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a weight update must know of a server, from its /server_info."""

    frontend: str
    version: str
    """Of SGLang."""
    tp_size: int
    device: str
    dtype: str
    """As given at its start: float32, bfloat16, auto ..."""
    arguments: Mapping[str, Any]
    """All of /server_info."""

    @property
    def is_embedded(self) -> bool:
        return self.frontend == EMBEDDED

    @property
    def can_release_memory(self) -> bool:
        """Whether `release_memory` would do what it says; on a CPU SGLang only goes through the motions."""
        return self.device == "cpu" or bool(self.arguments.get("enable_memory_saver"))


class WeightClient(SGLangClient):
    """Every step of an update is done once: a request is repeated only while the server answers that it has
    not begun with it (425, 429, 503). A failure is a RolloutError that names the server, the endpoint and the
    server's reason."""

    async def read_info(self) -> ServerInfo:
        """The server's start-up arguments."""
        return self.parse_info(await self.server_info(), self.endpoint)

    @staticmethod
    def parse_info(info: Mapping[str, Any], endpoint: str) -> ServerInfo:
        """What a weight update must know of an answer of /server_info."""
        answer = Answer(info, f"{endpoint}/server_info")
        return ServerInfo(
            frontend=answer.find("frontend", str) or "python",
            version=answer.find("version", str) or "unknown",
            tp_size=answer.get("tp_size", int),
            device=answer.find("device", str) or "cpu",
            dtype=answer.find("dtype", str) or "auto",
            arguments=info,
        )

    async def pause_generation(self) -> None:
        """Hold running requests where they are, with their cache, until `continue_generation`."""
        await self._post("/pause_generation", {"mode": "in_place"})

    async def continue_generation(self) -> None:
        """Go on generating, with the weights of now."""
        await self._post("/continue_generation", {})

    async def begin_weight_update(self) -> None:
        """Open an update; one that an earlier failure left open is closed first."""
        try:
            await self._update("/begin_weight_update", {})
        except WeightSyncError as error:
            if "already open" not in str(error):
                raise
            await self.end_weight_update()
            await self._update("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        """Close the update; the embedded server takes the new weights only now."""
        await self._update("/end_weight_update", {})

    async def update_weights_from_tensor(
        self, payloads: Sequence[bytes], *, weight_version: str | None
    ) -> None:
        """Send one bucket.

        Args:
            payloads: one per tensor-parallel rank, from `weight_sync.wire`.
            weight_version: the version from now on; give it with the last bucket only.
        """
        # By hand: a payload is large, and json.dumps would look at each of its characters.
        version = b"null" if weight_version is None else b'"' + weight_version.encode() + b'"'
        content = b"".join(
            [
                b'{"serialized_named_tensors":["',
                b'","'.join(payloads),
                b'"],"load_format":"flattened_bucket","flush_cache":false,"weight_version":',
                version,
                b"}",
            ]
        )
        headers = {"Content-Type": "application/json"}
        _check_success(
            await self._post("/update_weights_from_tensor", content=content, headers=headers),
            f"{self.endpoint}/update_weights_from_tensor",
        )

    async def init_weights_update_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Have all tensor-parallel ranks join a broadcast group, as ranks `rank_offset` + tp rank.

        Answers when the group stands: the trainer must join at the same time.
        """
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._update("/init_weights_update_group", body)

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None,
    ) -> None:
        """Receive one broadcast of bytes, the tensors one after the other, and load them."""
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": weight_version,
        }
        await self._update("/update_weights_from_distributed", body)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        """Have all tensor-parallel ranks leave a broadcast group."""
        await self._update("/destroy_weights_update_group", {"group_name": group_name})

    async def update_weights_from_disk(
        self, model_path: str, *, weight_version: str, timeout_s: float
    ) -> None:
        """Load all weights from an HF folder that the server can read, within a limit of its own."""
        body = {"model_path": model_path, "flush_cache": False, "weight_version": weight_version}
        await self._update("/update_weights_from_disk", body, timeout_s=timeout_s)

    async def weights_checksums(self) -> list[dict[str, str]]:
        """Per tensor-parallel rank: the checksum of every parameter, by the server's own name for it."""
        where = f"{self.endpoint}/weights_checker"
        answer = await self._post("/weights_checker", {"action": "checksum"})
        _check_success(answer, where)
        return [rank.get("checksums", dict) for rank in Answer(answer, where).objects("ranks")]

    async def flush_cache(self, timeout_s: float) -> None:
        """Wait until nothing is generated any more, then empty the cache."""
        await self._post("/flush_cache", params={"timeout": timeout_s}, parse=False)

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Free these parts of the memory; SGLang dies of it while it generates. Nothing is generated until
        all of them are resumed."""
        await self._post("/release_memory_occupation", {"tags": tags}, parse=False)

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take these parts back, which must have been released; weights are undefined until an update."""
        await self._post("/resume_memory_occupation", {"tags": tags}, parse=False)

    async def _update(self, path: str, body: Mapping[str, Any], **kwargs: Any) -> None:
        _check_success(await self._post(path, body, **kwargs), f"{self.endpoint}{path}")

    async def _request(self, method: str, path: str, **kwargs: Any) -> Any:
        def ask() -> Awaitable[Any]:
            return super(WeightClient, self)._request(method, path, **kwargs)

        return await retry_while_unavailable(ask, min(self._timeout_s, _MAX_WAIT_S), NotDoneError)

    async def _post(self, path: str, body: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if body is not None:
            kwargs["json"] = body
        try:
            return await self._request("POST", path, **kwargs)
        except RolloutError as error:
            raise WeightSyncError(str(error)) from error


def _check_success(answer: Any, where: str) -> None:
    if not isinstance(answer, dict) or not answer.get("success"):
        raise WeightSyncError(f"{where}: refused: {shorten(answer)}")
