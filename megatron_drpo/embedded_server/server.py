"""One embedded server: model, generator and HTTP, put together."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import uvicorn
from transformers import PreTrainedModel

from megatron_drpo.embedded_server.app import EmbeddedApp
from megatron_drpo.embedded_server.generator import Generator
from megatron_drpo.embedded_server.protocol import ModelLimits
from megatron_drpo.embedded_server.runner import ModelRunner, load_model
from megatron_drpo.embedded_server.weights import WeightStore
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.tied_head import check_tied_head


class EmbeddedServer:
    """Serves on a socket until told to exit, or until its generator fails."""

    def __init__(
        self,
        *,
        model_path: str | Path,
        dtype: torch.dtype,
        num_slots: int,
        deterministic: bool,
        weight_version: str = "0",
        quantization: str | None = None,
    ) -> None:
        folder = HfFolder(model_path)
        check_tied_head(folder)
        model = load_model(model_path, dtype)
        store = WeightStore(model, folder.keys(), weight_version, quantization)
        self.generator = Generator(
            ModelRunner(model, num_slots),
            store,
            num_slots=num_slots,
            deterministic=deterministic,
            on_exit=self.stop,
        )
        app = EmbeddedApp(self.generator, store, _limits(model), str(model_path))
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app.build(), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        )

    def serve(self, sock: socket.socket) -> None:
        """Serve on a bound socket until `stop`, SIGINT or SIGTERM.

        Raises:
            RuntimeError: the generator's thread has failed; its traceback is on stderr.
        """
        # Connections inherit it. Without it the two parts of an answer cost 40 ms: asyncio sets it by itself
        # only where the socket's protocol number is known.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._uvicorn.run(sockets=[sock])
        if not self.generator.is_alive():
            raise RuntimeError("the generator has failed")
        self.generator.close()

    def stop(self) -> None:
        """Make `serve` return; callable from any thread."""
        self._uvicorn.should_exit = True


def _limits(model: PreTrainedModel) -> ModelLimits:
    assert model.generation_config is not None
    eos: int | list[int] | None = model.generation_config.eos_token_id
    return ModelLimits(
        vocab_size=model.config.vocab_size,
        max_tokens=model.config.max_position_embeddings,
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
    )
