"""The HTTP side of the embedded server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_drpo.embedded_server.generator import Generator
from megatron_drpo.embedded_server.protocol import BadRequest, ModelLimits, parse_generate, render_result
from megatron_drpo.embedded_server.weights import WeightStore
from megatron_drpo.errors import DrpoError, ModelError, WeightSyncError
from megatron_drpo.weight_sync.client import EMBEDDED, MemoryTag
from megatron_drpo.weight_sync.wire import FLATTENED, decode_bucket, decode_named_tensors
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.tied_head import check_tied_head

T = TypeVar("T")
_POLL_S = 0.02


class EmbeddedApp:
    """The endpoints; paths and JSON as SGLang's."""

    def __init__(
        self, generator: Generator, store: WeightStore, limits: ModelLimits, model_path: str
    ) -> None:
        self._generator = generator
        self._store = store
        self._limits = limits
        self._model_path = model_path

    def build(self) -> Starlette:
        """The ASGI application."""
        post: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
            ("/generate", self.generate),
            ("/abort_request", self.abort_request),
            ("/pause_generation", self.pause_generation),
            ("/continue_generation", self.continue_generation),
            ("/begin_weight_update", self.begin_weight_update),
            ("/update_weights_from_tensor", self.update_weights_from_tensor),
            ("/end_weight_update", self.end_weight_update),
            ("/update_weights_from_disk", self.update_weights_from_disk),
            ("/weights_checker", self.weights_checker),
            ("/flush_cache", self.flush_cache),
            ("/release_memory_occupation", self.release_memory),
            ("/resume_memory_occupation", self.resume_memory),
        ]
        get: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
            ("/health", self.health),
            ("/health_generate", self.health_generate),
            ("/model_info", self.model_info),
            ("/server_info", self.server_info),
        ]
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in post]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in get]
        handlers: Any = {
            BadRequest: _bad_request,
            WeightSyncError: _bad_request,
            ModelError: _bad_request,
            DrpoError: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # ------------------------------------------------------------------------------- generation

    async def generate(self, request: Request) -> Response:
        start = time.perf_counter()
        samples, is_batch = parse_generate(await _json_object(request), self._limits)
        future = self._generator.submit(samples)
        finished = asyncio.ensure_future(asyncio.wrap_future(future))
        # After the body, the next message from the connection is that the client has gone.
        gone = asyncio.ensure_future(request.receive())
        await asyncio.wait({finished, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not finished.done():
            for sample in samples:
                self._generator.abort(sample.rid)
        results = await finished
        seconds = time.perf_counter() - start
        rendered = [render_result(result, seconds) for result in results]
        return JSONResponse(rendered if is_batch else rendered[0])

    async def abort_request(self, request: Request) -> Response:
        body = await _json_object(request)
        rid = body.get("rid")
        if not body.get("abort_all") and not isinstance(rid, str):
            raise BadRequest("give rid (a string) or abort_all")
        self._generator.abort(None if body.get("abort_all") else rid)
        return Response()

    async def pause_generation(self, request: Request) -> Response:
        body = await _json_object(request)
        if body.get("mode") != "in_place":
            raise BadRequest("mode must be 'in_place'")
        await _result(self._generator.call(self._generator.pause))
        return JSONResponse({"status": "ok", "message": "Generation paused successfully."})

    async def continue_generation(self, request: Request) -> Response:
        await _result(self._generator.call(self._generator.resume))
        return JSONResponse({"status": "ok", "message": "Generation continued successfully."})

    # ------------------------------------------------------------------------------ information

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self._generator.is_alive() else 503)

    async def health_generate(self, request: Request) -> Response:
        if await _result(self._generator.call(self._generator.is_busy)):
            return Response()  # the call was answered between two tokens: the samples make progress
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        samples, _ = parse_generate(body, self._limits)
        await asyncio.wrap_future(self._generator.submit(samples))
        return Response()

    async def model_info(self, request: Request) -> Response:
        return JSONResponse(
            {"model_path": self._model_path, "weight_version": self._store.version, "is_generation": True}
        )

    async def server_info(self, request: Request) -> Response:
        return JSONResponse(
            {
                "model_path": self._model_path,
                "frontend": EMBEDDED,
                "tp_size": 1,
                "quantization": self._store.quantization,
                "context_length": self._limits.max_tokens,
                "enable_deterministic_inference": self._generator.deterministic,
            }
        )

    # ---------------------------------------------------------------------------------- weights

    async def begin_weight_update(self, request: Request) -> Response:
        self._store.begin()
        return _success("update open")

    async def update_weights_from_tensor(self, request: Request) -> Response:
        body = await _json_object(request)
        payloads = body.get("serialized_named_tensors")
        version = body.get("weight_version")
        if not isinstance(payloads, list) or len(payloads) != 1 or not isinstance(payloads[0], str):
            raise BadRequest("serialized_named_tensors must be a list of one base64 string (tp_size is 1)")
        decoders = {FLATTENED: decode_bucket, None: decode_named_tensors}
        decode = decoders.get(body.get("load_format"))
        if decode is None or not (version is None or isinstance(version, str)):
            raise BadRequest(f"load_format must be {FLATTENED} or null, and weight_version a string")
        self._store.stage(decode(payloads[0]), version)
        return _success("tensors staged")

    async def end_weight_update(self, request: Request) -> Response:
        await _result(self._generator.update_weights())
        return _success(f"weight version {self._store.version}")

    async def update_weights_from_disk(self, request: Request) -> Response:
        body = await _json_object(request)
        path, version = body.get("model_path"), body.get("weight_version")
        if not isinstance(path, str) or not isinstance(version, str):
            raise BadRequest("model_path and weight_version must be strings")
        folder = HfFolder(path)
        self._store.begin()
        copy = check_tied_head(folder)
        self._store.stage(((name, folder.get(name)) for name in folder if name != copy), version)
        return await self.end_weight_update(request)

    async def weights_checker(self, request: Request) -> Response:
        body = await _json_object(request)
        if body.get("action", "checksum") != "checksum":
            raise BadRequest("action must be 'checksum'")
        digests, total = await _result(self._generator.call(self._store.checksums))
        ranks = [{"checksums": digests, "per_gpu_checksum": total}]
        message = {"success": True, "message": "", "ranks": ranks, "per_engine_checksum": total}
        return JSONResponse(message)

    # ----------------------------------------------------------------------------------- memory

    async def flush_cache(self, request: Request) -> Response:
        """There is none between requests; like SGLang's, it waits until nothing is generated."""
        deadline = time.monotonic() + float(request.query_params.get("timeout", 0))
        while await _result(self._generator.call(self._generator.is_busy)):
            if time.monotonic() > deadline:
                raise BadRequest("the cache is not flushed while requests run")
            await asyncio.sleep(_POLL_S)
        return Response("Cache flushed.\n")

    async def release_memory(self, request: Request) -> Response:
        tags = await _memory_tags(request)
        await _result(self._generator.call(lambda: self._generator.release(tags)))
        return JSONResponse(None)

    async def resume_memory(self, request: Request) -> Response:
        tags = await _memory_tags(request)
        await _result(self._generator.call(lambda: self._generator.resume_memory(tags)))
        return JSONResponse(None)


async def _memory_tags(request: Request) -> list[MemoryTag]:
    tags = (await _json_object(request)).get("tags")
    try:
        return [MemoryTag(tag) for tag in (tags or MemoryTag)]
    except (TypeError, ValueError) as error:
        raise BadRequest(f"tags must be a list of {', '.join(MemoryTag)}") from error


async def _result(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _success(message: str) -> Response:
    return JSONResponse({"success": True, "message": message})


def _error(status_code: int, error: Exception) -> Response:
    content = {"success": False, "message": str(error), "error": {"message": str(error)}}
    return JSONResponse(content, status_code=status_code)


async def _bad_request(request: Request, error: Exception) -> Response:
    return _error(400, error)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, error)
