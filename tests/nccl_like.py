"""A backend of torch.distributed with NCCL's habits, over gloo: what a test over gloo alone cannot see.

- A group is connected by its first collective, whose caller is blocked until every member is inside.
- Members on one device, or with different versions of the library, refuse each other.
- Collectives of a group run one at a time, in the order of the calls. Members that call different ones, or
  the same in another order, are found out; NCCL would hang or mix up their data.
- A time limit counts from the call, so a collective also ages while others are before it. What goes wrong is
  torch.distributed's DistBackendError, and a group in which something went wrong stays broken.

Sends and receives connect each pair at its first use, without blocking the caller: whether NCCL blocks him
depends on batches, which a backend written in Python is not told of. Tensors are on the CPU, and waiting for
one blocks the caller as gloo does, not a stream.

NCCL's own checks: https://github.com/NVIDIA/nccl/blob/master/src/init.cc (initTransportsRank).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "nccl_like"
DEVICE = "NCCL_LIKE_DEVICE"
"""Environment variable: the device that this process pretends to have; without it each has its own."""
VERSION = "NCCL_LIKE_VERSION"
"""Environment variable: the version that it pretends to have, as NCCL counts: 22705 is 2.27.5."""
_DEFAULT_VERSION = "22705"
_POLL_S = 0.002
_DESCRIPTION_BYTES = 96

_UNEQUAL_SIZES = {"alltoall", "alltoall_base", "all_to_all_single"}
"""Collectives whose tensors may differ in size between members."""
_COLLECTIVES = (
    *("broadcast", "allreduce", "allreduce_coalesced", "reduce", "barrier", "gather", "scatter"),
    *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    *_UNEQUAL_SIZES,
)
"""Methods of a ProcessGroup, by their names in all supported versions of torch."""


@dataclass
class Options:
    """In the place of ProcessGroupNCCL.Options; the fields with an underscore are torch's."""

    _timeout: timedelta = timedelta(minutes=10)
    device: str = field(default_factory=lambda: os.environ.get(DEVICE, f"of process {os.getpid()}"))
    version: str = field(default_factory=lambda: os.environ.get(VERSION, _DEFAULT_VERSION))


class NcclLike(dist.ProcessGroup):
    """Made by torch (`register`), or by hand in the place of ProcessGroupNCCL."""

    Options = Options

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options | None = None) -> None:
        super().__init__(rank, size)  # pyrefly: ignore[bad-argument-type, missing-argument]  torch's stubs lack it
        self._store = store
        self._rank, self._size = rank, size
        self._options = options or Options()
        self._gloo: dist.ProcessGroup | None = None
        """Once the members are connected."""
        self._error: Exception | None = None
        """The first."""
        self._num_collectives = 0
        self._lane = _Lane()
        self._pairs: dict[int, _Pair] = {}

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def name(self) -> str:
        return NAME

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[torch.Tensor], dstRank: int, tag: int = 0) -> dist.Work:
        return self._pair(dstRank).start("send", tensors, tag)

    def recv(self, tensors: list[torch.Tensor], srcRank: int, tag: int = 0) -> dist.Work:
        return self._pair(srcRank).start("recv", tensors, tag)

    def abort(self) -> None:
        """No later collective begins; one that has begun ends by its own time limit."""
        self._error = self._error or _backend_error("the communicator was aborted")
        self.shutdown()

    def shutdown(self) -> None:
        self._lane.close()
        for pair in self._pairs.values():
            pair.lane.close()

    def __del__(self) -> None:
        self.shutdown()

    def _pair(self, peer: int) -> _Pair:
        if peer not in self._pairs:
            self._pairs[peer] = _Pair(self._store, self._rank, peer, self._options._timeout)
        return self._pairs[peer]

    def start(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.Work:
        """Connect, if nobody has; then append a collective to the lane."""
        deadline = time.monotonic() + self._options._timeout.total_seconds()
        if self._error is not None:
            raise self._error
        if self._gloo is None:
            try:
                self._gloo = self._connect(deadline)
            except RuntimeError as error:
                self._error = error
                raise
        gloo = self._gloo
        self._num_collectives += 1
        text = f"collective {self._num_collectives}, {_describe(name, args, kwargs)}"
        work = _Work()

        def run() -> None:
            try:
                if self._error is not None:
                    raise self._error
                _compare(gloo, text, deadline)
                _finish(getattr(gloo, name)(*args, **kwargs), text, deadline)
            except (RuntimeError, TypeError, ValueError) as error:
                self._error = error
                work.end(error)
            else:
                work.end()

        self._lane.put(run)
        return work

    def _connect(self, deadline: float) -> dist.ProcessGroup:
        keys = [f"member {rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], f"{self._options.device}|{self._options.version}")
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise _backend_error(
                    f"ranks {missing} of {self._size} did not call a collective of this group in time"
                )
            time.sleep(_POLL_S)
        members = [self._store.get(key).decode().rsplit("|", 1) for key in keys]
        device, version = members[self._rank]
        for rank, (its_device, its_version) in enumerate(members):
            if its_version != version:
                raise _backend_error(
                    f"Mismatched NCCL version detected : rank {rank} version {its_version} "
                    f"rank {self._rank} version {version}",
                    kind="ncclInvalidUsage",
                )
            if rank != self._rank and its_device == device:
                raise _backend_error(
                    f"Duplicate GPU detected : rank {self._rank} and rank {rank} both on CUDA device "
                    f"{device}",
                    kind="ncclInvalidUsage",
                )
        return _make_gloo(self._store, self._rank, self._size, self._options._timeout)


def _collective(name: str) -> Callable[..., dist.Work]:
    def call(self: NcclLike, *args: Any, **kwargs: Any) -> dist.Work:
        return self.start(name, args, kwargs)

    return call


for _name in _COLLECTIVES:
    setattr(NcclLike, _name, _collective(_name))


class _Pair:
    """Messages between two members, in order in each direction."""

    def __init__(self, store: dist.Store, rank: int, peer: int, timeout: timedelta) -> None:
        self.lane = _Lane()
        low, high = sorted((rank, peer))
        self._store = dist.PrefixStore(f"pair {low} {high}", store)
        self._rank = int(rank == high)
        self._timeout = timeout
        self._gloo: dist.ProcessGroup | None = None

    def start(self, name: str, tensors: list[torch.Tensor], tag: int) -> dist.Work:
        work = _Work()
        deadline = time.monotonic() + self._timeout.total_seconds()

        def finish(started: dist.Work) -> None:
            try:
                _finish(started, name, deadline)
            except RuntimeError as error:
                work.end(error)
            else:
                work.end()

        def begin() -> None:
            try:
                self._gloo = self._gloo or _make_gloo(self._store, self._rank, 2, self._timeout)
                started = getattr(self._gloo, name)(tensors, 1 - self._rank, tag)
            except RuntimeError as error:
                work.end(_backend_error(f"{name}: {error}"))
            else:
                threading.Thread(target=finish, args=(started,), daemon=True).start()

        self.lane.put(begin)
        return work


class _Work(dist.Work):
    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        self._error = error
        self._ended.set()

    def is_completed(self) -> bool:
        return self._ended.is_set()

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._ended.wait(timeout.total_seconds() or None):
            raise _backend_error("waiting for a collective took too long")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()


class _Lane:
    """Runs one function after the other, in a thread of its own from the first one on."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, function: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_work_off, args=(self._queue,), name=NAME, daemon=True)
            self._thread.start()
        self._queue.put(function)

    def close(self) -> None:
        self._queue.put(None)


@torch.no_grad()  # a thread of its own does not know that autograd is off
def _work_off(functions: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (function := functions.get()) is not None:
        function()
        del function


def _make_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """A group of torch around a gloo backend: its methods have the names that torch.distributed calls."""
    store = dist.PrefixStore("gloo", store)
    group = dist.ProcessGroup(store, rank, size)
    kind = dist.ProcessGroup.BackendType.GLOO
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, gloo)
    return group


def _compare(gloo: dist.ProcessGroup, text: str, deadline: float) -> None:
    """Do all members mean the same collective?

    Raises:
        DistBackendError: they do not, or one is not there in time.
    """
    own = torch.zeros(_DESCRIPTION_BYTES, dtype=torch.uint8)
    encoded = text.encode()[:_DESCRIPTION_BYTES]
    own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(gloo.size())]
    _finish(gloo.allgather([found], [own]), text, deadline)
    texts = [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in found]
    if len(set(texts)) > 1:
        told = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(texts))
        raise _backend_error(f"Mismatched collective detected: {told}")


def _finish(work: dist.Work, text: str, deadline: float) -> None:
    """Wait for something that runs over gloo.

    Raises:
        DistBackendError: it failed, or is not done by `deadline` of time.monotonic().
    """
    remaining = deadline - time.monotonic()
    try:
        if remaining <= 0:
            raise RuntimeError("the group's time limit has passed")
        work.wait(timedelta(seconds=remaining))
    except RuntimeError as error:
        raise _backend_error(f"{text}: {error}") from error


def _describe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What must be the same at all members."""
    parts = [name]
    values = [*args, *kwargs.values()]
    tensor = next(_tensors(values), None)
    if tensor is not None and name != "barrier":
        size = "" if name in _UNEQUAL_SIZES else f"[{tensor.numel()}]"
        parts.append(f"{str(tensor.dtype).removeprefix('torch.')}{size}")
    for value in values:
        if hasattr(value, "rootRank"):
            parts.append(f"root {value.rootRank}")
        if hasattr(value, "reduceOp"):
            parts.append(value.reduceOp.op.name)
    return " ".join(parts)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _backend_error(reason: str, kind: str = "ncclRemoteError") -> dist.DistBackendError:
    return dist.DistBackendError(f"NCCL error in: {NAME}, {kind}\nLast error:\n{reason}")


def register() -> None:
    """Let torch.distributed make groups of this backend by its name; repeatable."""

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> NcclLike:
        return NcclLike(store, rank, size, Options(_timeout=timeout))

    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, devices=["cpu"])
