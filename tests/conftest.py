"""Fixtures of all tests."""

from __future__ import annotations

import faulthandler
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
import torch.distributed as dist
import transformers
import uvicorn

from megatron_drpo.config.schema import ParallelConfig, PlatformName
from megatron_drpo.platform.base import Platform, build_platform
from megatron_drpo.policy.parallel import ParallelState, initialise_parallel
from megatron_drpo.runtime.upstream_warnings import EXPECTED, ignore_expected_warnings
from megatron_drpo.types import TrainSequence

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not torch.cuda.is_available():  # read when triton is first imported, which Megatron does
    os.environ.setdefault("TRITON_INTERPRET", "1")

ignore_expected_warnings()  # also in every process a test starts
transformers.utils.logging.disable_progress_bar()

_WORKER = Path(__file__).parent / "distributed_worker.py"
_GRACE_S = 2.0
"""How long the other ranks may go on, to report their own error, once one rank has failed."""
_EXIT_S = 60.0
"""How long the process may take to exit after the last test: pytest's time limits hold for tests alone."""


def pytest_configure(config: pytest.Config) -> None:
    """All warnings are errors, but for what Megatron-Core and torch say of themselves.

    A shell's background job starts with SIGINT ignored, and so does all that it starts: tests of Ctrl-C need
    Python's own handler.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    filters = [f"ignore:{start}" for start in EXPECTED]
    for category in ("DeprecationWarning", "FutureWarning"):
        filters += [f"ignore::{category}:megatron", f"ignore::{category}:torch"]
    for line in filters:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(trylast=True)  # pytest's own hook cancels all dumps
def pytest_unconfigure() -> None:
    """A thread that a test has left behind would keep the process for ever; instead its stack is shown."""
    faulthandler.dump_traceback_later(_EXIT_S, exit=True)


@pytest.fixture(scope="session")
def _rank_context() -> ForkServerContext:
    """Ranks fork from a clean process that has imported Megatron once: each starts in 0.1 s, not in 8 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_drpo.policy.model"])
    return context


@pytest.fixture
def run_distributed(_rank_context: ForkServerContext, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a module-level function of the test file on several ranks.

    `run_distributed(function, world_size, *args, timeout_s=60.0, backend="gloo")` calls `function(*args)` in
    `world_size` processes of one thread each, with torch.distributed initialised (the store is a file) and
    RANK, LOCAL_RANK and WORLD_SIZE set, and returns their results in rank order. `backend="nccl_like"` has
    NCCL's habits. Arguments and results are pickled. If a rank raises, dies or exceeds `timeout_s`, all ranks
    are killed and the test fails with the output and the traceback of every rank that did not finish.
    """
    num_jobs = 0

    def run(
        function: Callable[..., Any],
        world_size: int,
        *args: object,
        timeout_s: float = 60.0,
        backend: str = "gloo",
    ) -> list[Any]:
        nonlocal num_jobs
        folder = tmp_path / f"ranks_{num_jobs}"
        num_jobs += 1
        folder.mkdir()
        job = {
            "function": (inspect.getfile(function), function.__module__, function.__name__),
            "args": pickle.dumps(args),
            "world_size": world_size,
            "timeout_s": timeout_s,
            "backend": backend,
            "environ": dict(os.environ),
        }
        (folder / "job").write_bytes(pickle.dumps(job))
        ranks: list[ForkServerProcess] = []
        try:
            for rank in range(world_size):
                names = {"JOB": str(folder), "RANK": rank}
                process = _rank_context.Process(target=runpy.run_path, args=(str(_WORKER), names))
                process.start()
                ranks.append(process)
            _wait(ranks, time.monotonic() + timeout_s + _GRACE_S)
        finally:
            for process in ranks:
                _kill(process)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        if failed:
            pytest.fail(
                "\n".join(_report(folder, rank, ranks[rank].exitcode) for rank in failed), pytrace=False
            )
        return [pickle.loads((folder / f"rank_{rank}.result").read_bytes()) for rank in range(world_size)]

    return run


def _wait(ranks: list[ForkServerProcess], deadline: float) -> None:
    """Until all ranks ended, the deadline passed, or the grace period after the first failure passed."""
    running = list(ranks)
    while running and time.monotonic() < deadline:
        remaining = max(0.0, deadline - time.monotonic())
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=remaining)
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        running = [process for process in running if process.exitcode is None]


def _kill(process: ForkServerProcess) -> None:
    """End a rank and the processes it started; harmless for a rank that has ended."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of them ended, or the rank had not made its group yet
        process.kill()
    process.join()


def _report(folder: Path, rank: int, exit_code: int | None) -> str:
    log = folder / f"rank_{rank}.log"
    output = log.read_text() if log.exists() else "(it never started)"
    return f"---------- rank {rank} (exit code {exit_code}) ----------\n{output}"


@pytest.fixture(scope="session")
def cpu_platform() -> Platform:
    """The CPU platform, prepared: this process can run Megatron from here on."""
    platform = build_platform(PlatformName.cpu)
    platform.prepare(0)
    return platform


@pytest.fixture(scope="session")
def one_rank(cpu_platform: Platform) -> Iterator[ParallelState]:
    """This process as the only rank of a run, with Megatron's process groups."""
    yield initialise_parallel(ParallelConfig(), cpu_platform.backend, torch.device("cpu"))
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------- servers


@pytest.fixture(scope="session")
def serve_in_thread() -> Callable[..., AbstractContextManager[str]]:
    """`with serve_in_thread(run, stop, stop_s=10.0) as url`: `run(socket)` in a thread of its own.

    At the end `stop()` must make `run` return, or the test fails after `stop_s` with the thread's stack.
    """
    return _serve_in_thread


@contextmanager
def _serve_in_thread(
    run: Callable[[socket.socket], None], stop: Callable[[], None], stop_s: float = 10.0
) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=run, args=(sock,), name=f"server {url}", daemon=True)
        thread.start()
        try:
            yield url
        finally:
            stop()
            thread.join(stop_s)
        if thread.is_alive():
            assert thread.ident is not None
            frame = sys._current_frames().get(thread.ident)
            stack = "".join(traceback.format_stack(frame))
            pytest.fail(f"{thread.name} did not stop within {stop_s:g} s; it is here:\n{stack}")


@pytest.fixture(scope="session")
def serve_app() -> Iterator[Callable[[Any], str]]:
    """`serve_app(asgi_app)`: serve it until the session ends; its base URL."""
    with ExitStack() as stack:

        def serve(app: Any) -> str:
            config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)

            def run(sock: socket.socket) -> None:
                server.run(sockets=[sock])

            def stop() -> None:
                server.should_exit = True

            return stack.enter_context(_serve_in_thread(run, stop))

        yield serve


# ------------------------------------------------------------------------------- models and data

_SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "dense": ("qwen3", {}),
    "dense_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {"rope_parameters": _LLAMA3_ROPE, "max_position_embeddings": 16384}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "moe_perturbed": ("qwen3_moe", {"norm_topk_prob": False, "initializer_range": 0.15}),
    "moe_renormalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "moe_bf16": ("qwen3_moe", {"norm_topk_prob": True}),
    "moe_mixed": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "moe_sparse_step_tied": ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hf_model(name)`: the folder of one of `_MODELS`, with 4 layers and a vocabulary of 101."""
    root = tmp_path_factory.mktemp("hf_models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            _save_model(name, root / name)
        return root / name

    return folder


def _save_model(name: str, path: Path) -> None:
    model_type, fields = _MODELS[name]
    experts = _EXPERTS if model_type == "qwen3_moe" else {}
    config = transformers.AutoConfig.for_model(model_type, **{**_SHAPE, **experts, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide a swap
                parameter.uniform_(0.5, 1.5)
    dtype = torch.bfloat16 if name == "moe_bf16" else torch.float32
    model.to(dtype).save_pretrained(path)
    _save_tokenizer(path)


def _save_tokenizer(path: Path) -> None:
    """One token per character, and fillers up to the vocabulary of 101."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *"0123456789+= "]
    vocabulary += [f"<{number}>" for number in range(len(vocabulary), 101)]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(path)


@pytest.fixture
def make_sequences() -> Callable[..., list[TrainSequence]]:
    """`make_sequences(lengths, vocab_size=101)`: random sequences, the same every time.

    A sequence of L tokens has a prompt of about a third of them; logprobs are off-policy, advantages
    uncentred, and one response token in seven is masked.
    """

    def make(lengths: list[int], vocab_size: int = 101) -> list[TrainSequence]:
        generator = torch.Generator().manual_seed(sum(lengths))
        sequences = []
        for number, length in enumerate(lengths):
            prompt_length = max(1, length // 3)
            num_response = length - prompt_length
            uniform = torch.rand(num_response, generator=generator)
            sequences.append(
                TrainSequence(
                    id=number,
                    token_ids=torch.randint(0, vocab_size, (length,), generator=generator),
                    prompt_length=prompt_length,
                    advantages=torch.full((num_response,), 0.3 + 0.5 * (number % 3)),
                    rollout_logprobs=-5.0 * uniform - 0.5,
                    loss_mask=torch.arange(num_response) % 7 != 3,
                )
            )
        return sequences

    return make
