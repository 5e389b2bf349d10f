"""A torch process group between global rank 0 and the ranks of some servers, beside the trainer's own groups.

SGLang makes its side with `init_custom_process_group` of
https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/utils/common.py: a TCPStore client
whose keys carry the group's name twice and a device, because torch's `_new_process_group_helper` adds the
latter two. Here the backend object is made directly with the same prefixes: torch's global registry of
groups, its shutdown included, does not know of it, so that a dead server cannot hold up the trainer's own.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_drpo.errors import RolloutError, WeightSyncError
from megatron_drpo.weight_sync.nccl import explain
from megatron_drpo.weight_sync.path import Server

_NUM_ATTEMPTS = 3
_HANDSHAKE_S = 30.0
"""Limit of one attempt, and of the first broadcast. On two busy cores a handshake takes about a second; one
that has not met by now never does, but the next one does."""
_POLL_S = 0.001


class BroadcastGroup:
    """Rank 0 of a group whose other ranks are the tensor-parallel ranks of its servers, in order."""

    def __init__(
        self, servers: Sequence[Server], name: str, backend: Any, store: dist.Store, timeout_s: float
    ) -> None:
        self.servers = tuple(servers)
        self.name = name
        self.is_connected = False
        """A broadcast has arrived. NCCL's ranks meet at the first one, and nothing but a request makes a
        server take part in it: let that be a small one."""
        self._backend: Any = backend
        self._store = store
        self._timeout_s = timeout_s
        self._sending: asyncio.Future[None] | None = None
        """The last broadcast, in its thread."""

    @property
    def endpoints(self) -> frozenset[str]:
        return frozenset(server.endpoint for server in self.servers)

    @property
    def keeps_order(self) -> bool:
        """The next broadcast may be asked for while the server still loads the last: over gloo a broadcast
        has left only when it was being received, so no request overtakes another.

        In a larger group that holds for the first receiver alone, and NCCL holds back nothing that is small.
        """
        return len(self.servers) == 1 and self._backend.name() == "gloo"

    async def broadcast(self, data: torch.Tensor, watched: Sequence[asyncio.Future[None]]) -> None:
        """Send a uint8 buffer to all ranks; it is free afterwards.

        Runs in a thread: NCCL's first broadcast blocks its caller until all ranks take part.

        Args:
            watched: answers of the receivers; one that fails ends the wait with its error.

        Raises:
            RolloutError: a receiver's, or the broadcast failed, or did not finish in time.
        """
        limit_s = self._timeout_s if self.is_connected else min(_HANDSHAKE_S, self._timeout_s)
        names = ", ".join(sorted(self.endpoints))
        self._sending = _in_thread(_broadcast, self._backend, data, self._timeout_s)
        sending = asyncio.shield(self._sending)
        waiting: set[asyncio.Future[None]] = {sending, *watched}
        try:
            async with asyncio.timeout(limit_s):
                while not sending.done():
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for one in done:
                        one.result()
        except TimeoutError as error:
            which = "a" if self.is_connected else "the first"
            raise WeightSyncError(
                f"{names}: {which} broadcast did not finish within {limit_s:g} s"
            ) from error
        except RuntimeError as error:  # torch.distributed's errors among them
            raise WeightSyncError(f"{names}: a broadcast failed: {explain(error)}") from error
        finally:
            sending.cancel()  # nobody waits for it any more; the thread goes on
        self.is_connected = True

    def drop(self) -> None:
        """Let go of the group. One whose last broadcast hangs is kept, by that one's thread, until it has
        given up: its end would wait for it, and the exit of the process must not find it ending."""
        backend, sending = self._backend, self._sending
        self._backend = self._sending = None
        if sending is not None and not sending.done() and backend.name() != "gloo":
            threading.Thread(target=backend.abort, name="abort weight group", daemon=True).start()


def _broadcast(backend: Any, data: torch.Tensor, timeout_s: float) -> None:
    """From beginning to end; the buffer is free then.

    Raises:
        RuntimeError: torch.distributed's.
    """
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=timeout_s)
    # The current device belongs to the thread.
    with torch.cuda.device(data.device) if data.is_cuda else nullcontext():
        work = backend.broadcast([data], options)
        while not work.is_completed():  # NCCL's wait() blocks a stream, not the thread
            time.sleep(_POLL_S)
        work.wait()


async def join_group(
    servers: Sequence[Server], *, host: str, backend: str, timeout_s: float, num_attempts: int = _NUM_ATTEMPTS
) -> BroadcastGroup:
    """Make a group with the servers; every attempt has a port, a store and a name of its own.

    Args:
        host: this machine's address as the servers reach it.
        backend: gloo or nccl.
        timeout_s: limit of each broadcast, and of all attempts together.

    Raises:
        WeightSyncError: no attempt met in time; names the servers and the versions of both sides.
    """
    handshake_s = min(_HANDSHAKE_S, timeout_s / num_attempts)
    reason = ""
    for _ in range(num_attempts):
        try:
            async with asyncio.timeout(handshake_s):
                return await _join_once(servers, host, backend, handshake_s, timeout_s)
        except TimeoutError:
            reason = f"not all ranks met within {handshake_s:g} s"
        except (RolloutError, RuntimeError, OSError) as error:
            reason = str(error)
    sides = ", ".join(f"{server.endpoint} (SGLang {server.info.version})" for server in servers)
    raise WeightSyncError(
        f"no {backend} group with {sides} in {num_attempts} attempts: {reason}. This side has torch "
        f"{torch.__version__}; compare with the torch of the servers' environment, and see that they reach "
        f"weight_sync.host={host}"
    )


async def _join_once(
    servers: Sequence[Server], host: str, backend: str, handshake_s: float, timeout_s: float
) -> BroadcastGroup:
    name = f"weights-{uuid.uuid4().hex[:12]}"
    world_size = 1 + sum(server.info.tp_size for server in servers)
    store, port = _serve_store(host, world_size, handshake_s)
    # When this side gives up, its store goes, and with it the servers' wait for this attempt.
    own_side = _in_thread(_make_backend, _group_store(store, name, backend), backend, world_size, handshake_s)
    calls = []
    rank = 1
    for server in servers:
        calls.append(
            asyncio.ensure_future(
                server.client.init_weights_update_group(
                    address=host,
                    port=port,
                    rank_offset=rank,
                    world_size=world_size,
                    group_name=name,
                    backend=backend,
                )
            )
        )
        rank += server.info.tp_size
    try:
        # gloo's side returns when all have met; NCCL's at once, and meets the others at the first broadcast.
        made, *_ = await asyncio.gather(own_side, *calls)
    except BaseException:
        for call in calls:
            call.cancel()
        raise
    return BroadcastGroup(servers, name, made, store, timeout_s)


def _serve_store(host: str, world_size: int, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """The key-value store of one handshake, on a port that is held from the moment it is chosen."""
    local = host in ("127.0.0.1", "localhost")
    listener = socket.create_server(("127.0.0.1" if local else "", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _group_store(store: dist.Store, name: str, backend: str) -> dist.Store:
    """The store as torch hands it to the backend of a group that SGLang makes."""
    device = "cuda" if backend == "nccl" else "cpu"
    rendezvous = dist.PrefixStore(name, store)
    return dist.PrefixStore(f"{device}/", dist.PrefixStore(f"{name}/", rendezvous))


def _make_backend(store: dist.Store, backend: str, world_size: int, handshake_s: float) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, world_size, timeout=timedelta(seconds=handshake_s))
    options = dist.ProcessGroupNCCL.Options()
    # NCCL's watchdog ends the process when a broadcast exceeds this; `wait` gives up long before.
    options._timeout = timedelta(days=1)
    return dist.ProcessGroupNCCL(store, 0, world_size, options)


def _in_thread(function: Any, *args: Any) -> asyncio.Future[Any]:
    """Run a function that may hang in a daemon thread: neither this event loop nor the exit waits for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*args)
        except RuntimeError as caught:  # what torch raises here, its DistError included
            error = caught
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    threading.Thread(target=run, name="weight group", daemon=True).start()
    return future
