"""The decode loop: one thread that owns the model and works off a queue of samples."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from megatron_drpo.embedded_server.protocol import SampleRequest, SampleResult
from megatron_drpo.embedded_server.runner import ModelRunner
from megatron_drpo.embedded_server.sampling import SamplingBatch
from megatron_drpo.embedded_server.weights import WeightStore
from megatron_drpo.errors import DrpoError, RolloutError, WeightSyncError
from megatron_drpo.weight_sync.client import MemoryTag

T = TypeVar("T")
_ABORTED = {"type": "abort", "message": "Aborted"}


class _Batch:
    """The samples of one request, answered together."""

    def __init__(self, requests: list[SampleRequest]) -> None:
        self.results = [SampleResult(request) for request in requests]
        self.num_unfinished = len(requests)
        self.future: Future[list[SampleResult]] = _uncancellable()


def _uncancellable() -> Future[Any]:
    """A future that a caller who no longer waits cannot cancel: setting its result never fails."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class Generator:
    """Continuous batching over `num_slots` rows: a row that becomes free takes the next waiting sample.

    With `deterministic`, samples of two requests are never decoded together, so that the shapes of all
    forward passes, and with them the last bits of the logits, depend on the request alone.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: WeightStore,
        *,
        num_slots: int,
        deterministic: bool,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            on_exit: called from the thread when it ends, by `close` or by an error.
        """
        self.deterministic = deterministic
        self._runner = runner
        self._store = store
        self._num_slots = num_slots
        self._on_exit = on_exit
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[tuple[_Batch, SampleResult]] = deque()
        self._active: list[tuple[_Batch, SampleResult]] = []
        """Row i of the runner decodes sample i."""
        self._sampling: SamplingBatch | None = None
        self._closing = False
        self._paused = False
        self._released: set[MemoryTag] = set()
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- from other threads

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def is_busy(self) -> bool:
        """Whether samples are decoded or wait. In the thread: see `call`."""
        return bool(self._active or self._waiting)

    def submit(self, requests: list[SampleRequest]) -> Future[list[SampleResult]]:
        """Generate all samples; the future has them in order, or RolloutError if logits are not finite."""
        batch = _Batch(requests)
        if self._released:
            batch.future.set_exception(
                RolloutError(f"this server has released its {', '.join(self._released)}")
            )
            return batch.future
        self._post(lambda: self._waiting.extend((batch, result) for result in batch.results))
        return batch.future

    def abort(self, rid: str | None) -> None:
        """End the sample `rid`, or all for None, with finish reason `abort`.

        As in SGLang, one that is being decoded gets one more token, which may be a stop id or the last of
        `max_new_tokens`, and one that waits has none.
        """
        self._post(lambda: self._abort(rid))

    def update_weights(self) -> Future[None]:
        """Commit the store's update between two tokens; running samples go on with their old cache."""
        return self.call(self._update_weights)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` between two tokens; its DrpoError is the future's."""
        future: Future[T] = _uncancellable()

        def run() -> None:
            try:
                future.set_result(function())
            except DrpoError as error:
                future.set_exception(error)

        self._post(run)
        return future

    def pause(self) -> None:
        """Hold all samples where they are, with their cache; run it through `call`."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`; run it through `call`."""
        self._paused = False

    def release(self, tags: Collection[MemoryTag]) -> None:
        """Free this memory; run it through `call`. Nothing can be submitted until it is taken back.

        Raises:
            WeightSyncError: samples are decoded or wait.
        """
        if self.is_busy():
            raise WeightSyncError("memory can be released only while nothing is generated")
        self._released |= set(tags)
        if MemoryTag.weights in tags:
            self._store.release()
        self._runner.reset()

    def resume_memory(self, tags: Collection[MemoryTag]) -> None:
        """Take memory back; the weights are undefined until an update. Run it through `call`."""
        if MemoryTag.weights in self._released & set(tags):
            self._store.resume()
        self._released -= set(tags)

    def close(self) -> None:
        """Stop after the current token and wait for the thread; harmless when it has ended."""
        self._inbox.put(self._close)
        self._thread.join()

    def _post(self, function: Callable[[], None]) -> None:
        if not self.is_alive():
            raise RuntimeError("the generator's thread has ended; see the server's log")
        self._inbox.put(function)

    # ----------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_messages()
                if self._paused or self._closing:
                    continue
                self._admit()
                if self._active:
                    self._decode_one_token()
        finally:
            for batch, _ in [*self._active, *self._waiting]:
                if not batch.future.done():
                    batch.future.set_exception(RolloutError("the server stopped while generating"))
            self._on_exit()

    def _take_messages(self) -> None:
        """Handle all messages; with nothing else to do, wait for one."""
        block = self._paused or not (self._active or self._waiting)
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return
            message()
            block = False

    def _close(self) -> None:
        self._closing = True

    def _admit(self) -> None:
        """Fill free rows from the waiting samples, in order."""
        if not self._active:
            self._runner.reset()
        first = len(self._active)
        while self._waiting and len(self._active) < self._num_slots:
            next_batch, _ = self._waiting[0]
            if self.deterministic and self._active and self._active[0][0] is not next_batch:
                break
            self._active.append(self._waiting.popleft())
        if len(self._active) > first:
            prompts = [result.request.prompt for _, result in self._active[first:]]
            routes = self._runner.prefill(prompts, rows=list(range(first, len(self._active))))
            for row, part in routes.items():
                self._active[row][1].add_routes(part)
            self._sampling = None

    @torch.inference_mode()
    def _decode_one_token(self) -> None:
        results = [result for _, result in self._active]
        if self._sampling is None:
            self._sampling = SamplingBatch([result.request.params for result in results])
        num_sampled = [len(result.token_ids) for result in results]
        logits_AV = self._runner.decode(
            [(result.token_ids or result.request.prompt)[-1] for result in results],
            [len(result.request.prompt) - 1 + n for result, n in zip(results, num_sampled, strict=True)],
        )
        if self._runner.has_routers and any(result.request.return_routes for result in results):
            for result, part in zip(results, self._runner.routes().split(1), strict=True):
                result.add_routes(part)
        columns = (column.tolist() for column in self._sampling.sample(logits_AV, num_sampled))
        for result, token, logprob, topk_logprobs, topk_ids in zip(results, *columns, strict=True):
            params = result.request.params
            result.token_ids.append(token)
            result.logprobs.append(logprob)
            result.topk_logprobs.append(topk_logprobs[: params.num_topk])
            result.topk_ids.append(topk_ids[: params.num_topk])
            if result.is_aborted:  # as SGLang, which looks at nothing else then
                result.finish_reason = _ABORTED
            elif token in params.stop_token_ids:
                result.finish_reason = {"type": "stop", "matched": token}
            elif len(result.token_ids) == params.max_new_tokens:
                result.finish_reason = {"type": "length", "length": params.max_new_tokens}
        self._retire()

    def _retire(self) -> None:
        """Answer finished samples and close the gaps they leave."""
        for row in reversed(range(len(self._active))):
            batch, result = self._active[row]
            if result.finish_reason is None:
                continue
            last = self._active.pop()
            if row < len(self._active):
                self._active[row] = last
                self._runner.move(len(self._active), row)
            self._sampling = None
            self._finish(batch, result)

    def _finish(self, batch: _Batch, result: SampleResult) -> None:
        result.close_span(self._store.version)
        batch.num_unfinished -= 1
        if batch.num_unfinished or batch.future.done():
            return
        for result in batch.results:
            if not all(map(math.isfinite, result.logprobs)):
                message = f"non-finite logits: request {result.request.rid}, weights {self._store.version}"
                batch.future.set_exception(RolloutError(message))
                return
        batch.future.set_result(batch.results)

    def _abort(self, rid: str | None) -> None:
        waiting, self._waiting = self._waiting, deque()
        for batch, result in waiting:
            if rid is None or result.request.rid == rid:
                result.finish_reason = _ABORTED
                self._finish(batch, result)
            else:
                self._waiting.append((batch, result))
        for _, result in self._active:
            result.is_aborted |= rid is None or result.request.rid == rid

    def _update_weights(self) -> None:
        self._store.end()
        for _, result in self._active:
            result.close_span(self._store.version)
        self._store.commit()
