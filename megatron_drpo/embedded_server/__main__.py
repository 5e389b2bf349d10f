"""`python -m megatron_drpo.embedded_server --model-path FOLDER --port 30000`"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time

import torch
from transformers.utils.logging import disable_progress_bar

from megatron_drpo.embedded_server.server import EmbeddedServer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PARENT_POLL_S = 0.5


def main() -> None:
    arguments = _parse_arguments()
    if arguments.parent_pid is not None:
        threading.Thread(target=_exit_with_parent, args=(arguments.parent_pid,), daemon=True).start()
    torch.set_num_threads(arguments.num_threads)
    disable_progress_bar()
    with _listen(arguments) as sock:
        server = EmbeddedServer(
            model_path=arguments.model_path,
            dtype=_DTYPES[arguments.dtype],
            num_slots=arguments.num_slots,
            deterministic=arguments.deterministic,
            weight_version=arguments.weight_version,
            quantization=arguments.quantization,
        )
        print(f"serving {arguments.model_path} on {sock.getsockname()[:2]}", flush=True)
        server.serve(sock)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_drpo.embedded_server", description=__doc__)
    parser.add_argument("--model-path", required=True, help="HF folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--fd", type=int, help="serve on this inherited listening socket instead")
    parser.add_argument("--num-slots", type=int, default=64, help="sequences decoded together")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads of the model")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--weight-version", default="0", help="version of the weights in the folder")
    parser.add_argument(
        "--quantization", choices=["fp8"], help="of the matrices; such a server gets no weights"
    )
    parser.add_argument("--deterministic", action="store_true", help="never mix requests in one batch")
    parser.add_argument("--parent-pid", type=int, help="exit when this process is no longer the parent")
    return parser.parse_args()


def _listen(arguments: argparse.Namespace) -> socket.socket:
    if arguments.fd is not None:
        return socket.socket(fileno=arguments.fd)
    return socket.create_server((arguments.host, arguments.port))


def _exit_with_parent(parent_pid: int) -> None:
    """Leave no server behind when the parent is killed: an orphan gets another parent."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
