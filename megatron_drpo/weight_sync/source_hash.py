"""The policy's tensors are hashed as they come, before anything copies them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_drpo.weight_sync.bucket import NamedTensors


class SourceHasher:
    """A thread that hashes while the caller gathers, packs and sends: it takes about as long as sending, and
    leaves the interpreter free.

    What is hashed is what the policy gave, not what lies in a bucket: so whatever happens to a value on its
    way, from the first copy on, shows in the servers' checksums.
    """

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: of tensors that are kept until they are hashed; a larger one is kept alone.
        """
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, "hash weights")

    def watch(self, tensors: NamedTensors, add: Callable[[str, torch.Tensor], None]) -> NamedTensors:
        """The same tensors, each given to `add` in the thread; all have been when the stream ends."""
        pending: deque[tuple[Future[None], int]] = deque()
        num_bytes = 0
        for name, tensor in tensors:
            while pending and num_bytes + tensor.nbytes > self._max_bytes:
                num_bytes -= _wait(pending)
            pending.append((self._thread.submit(add, name, tensor), tensor.nbytes))
            num_bytes += tensor.nbytes
            yield name, tensor
        while pending:
            _wait(pending)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def _wait(pending: deque[tuple[Future[None], int]]) -> int:
    """Until the oldest is hashed; its size."""
    future, num_bytes = pending.popleft()
    future.result()
    return num_bytes
