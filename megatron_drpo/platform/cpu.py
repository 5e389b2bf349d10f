"""Megatron-Core on a machine without a GPU: for correctness, debugging and CI, never for speed.

Megatron-Core calls `torch.cuda` in its schedules, optimizers and checkpoints. `CpuPlatform.prepare` gives
those calls a CPU meaning. It is called explicitly, once per process, and only on this platform; every
replacement is listed here with its upstream source, and tests/unit/platform/test_cpu.py has one test each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from megatron_drpo.config.schema import Layers, PlatformName
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu import finder as te_cpu
from megatron_drpo.platform.versions import installed_version, require, require_supported

_PROVEN_MEGATRON = ">=0.16.1,<0.20"
_prepared = False


class CpuPlatform:
    """gloo between ranks, and a stand-in for Transformer Engine's layers and optimizer (`te_cpu`)."""

    name = PlatformName.cpu
    backend = "gloo"
    token_multiple = 1

    def prepare(self, local_rank: int) -> torch.device:
        global _prepared
        if not _prepared:
            require_supported()
            require("megatron-core", _PROVEN_MEGATRON, "CPU platform")
            require("psutil", ">=5", "megatron-core's checkpoint writer")
            if torch.cuda.is_available():
                raise PlatformError(
                    "platform=cpu on a machine with a GPU: hide it (CUDA_VISIBLE_DEVICES='') so that "
                    "torch.cuda calls cannot reach it"
                )
            _disable_compilation()
            _replace_cuda_runtime()
            _replace_cuda_rng()
            _replace_tensor_methods()
            _replace_factories()
            _replace_all_to_all()
            _replace_megatron_functions()
            _prepared = True
        return torch.device("cpu")

    def require_layers(self, layers: Layers) -> None:
        if layers is Layers.local or te_cpu.is_in_use():
            return
        raise PlatformError(
            "policy.layers=transformer_engine on a CPU: Transformer Engine's stand-in is not in use. Either "
            "Transformer Engine itself is installed, which needs a GPU: uninstall it here, or set "
            "policy.layers=local. Or megatron.core was imported before megatron_drpo: import it afterwards"
        )

    def describe(self, layers: Layers) -> list[tuple[str, str]]:
        threads = torch.get_num_threads()
        megatron = f"megatron-core {installed_version('megatron-core')}"
        stands_in = "Transformer Engine's interface in plain torch"
        return [
            ("device", f"CPU, {os.cpu_count()} cores, {threads} thread(s) per rank, gloo"),
            ("layers", f"{megatron} {'local' if layers is Layers.local else f'with {stands_in}'}"),
            ("optimizer", f"AdamW, distributed ({stands_in if te_cpu.is_in_use() else 'torch'})"),
            ("gradient accumulation", "torch" if layers is Layers.local else "in the layers"),
        ]


class _Stream:
    """A CUDA stream on a machine where everything is already in order."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _disable_compilation() -> None:
    """Megatron's jit_fuser is torch.compile: here it would call a C++ compiler for three-line functions.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/jit.py
    """
    torch.compiler.set_stance("force_eager")


def _replace_cuda_runtime() -> None:
    """torch.cuda's device and streams, used by megatron/core/{parallel_state,pipeline_parallel,optimizer}.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/pipeline_parallel/schedules.py
    """

    # A function of its own for every name: torch._dynamo refuses one object under two of them.
    def no_op() -> Callable[..., None]:
        def nothing(*_: object, **__: object) -> None:
            return None

        return nothing

    def new_stream() -> Callable[..., _Stream]:
        def make(*_: object, **__: object) -> _Stream:
            return _Stream()

        return make

    replacements: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": new_stream(),
        "default_stream": new_stream(),
        "stream": lambda _: contextlib.nullcontext(),
        "current_device": lambda: torch.device("cpu"),
        "set_device": no_op(),
        "synchronize": no_op(),
        "empty_cache": no_op(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _replace_cuda_rng() -> None:
    """torch.cuda's random state becomes torch's own, for Megatron's RNG tracker.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/tensor_parallel/random.py
    """

    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    def call_now(function: Callable[[], None], **_: object) -> None:
        function()

    replacements: dict[str, Any] = {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        "_lazy_call": call_now,
        "default_generators": {torch.device("cpu"): torch.default_generator},
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = get_rng_state


def _replace_tensor_methods() -> None:
    """Tensor.cuda, Tensor.record_stream, and the type names the distributed optimizer compares.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/optimizer/distrib_optimizer.py#L361
    """
    original_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return self

    def record_stream(self: torch.Tensor, _: object) -> None:
        return None

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    setattr(torch.Tensor, "cuda", cuda)  # noqa: B010  a method of the same name exists
    setattr(torch.Tensor, "record_stream", record_stream)  # noqa: B010
    setattr(torch.Tensor, "type", type_)  # noqa: B010


_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def _replace_factories() -> None:
    """`device="cuda"` in factory calls becomes "cpu".

    Only these functions are wrapped: a TorchFunctionMode would double the cost of every torch call.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/pipeline_parallel/schedules.py#L596
    """

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapped

    # `with torch.device(...)` knows factories by identity, in a set built on first use: have it built now.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _replace_all_to_all() -> None:
    """gloo's all_to_all_single takes split sizes as lists; the MoE dispatcher passes tensors.

    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/tensor_parallel/mappings.py
    """
    original = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        return original(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group, async_op
        )

    dist.all_to_all_single = all_to_all_single


def _replace_megatron_functions() -> None:
    """Names inside megatron.core itself."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.tensor_parallel.random as megatron_random

    # Imported by name from torch.cuda when megatron loads, possibly before prepare().
    setattr(megatron_random, "_lazy_call", torch.cuda._lazy_call)  # noqa: B010
    _write_checkpoints_in_process(writer)


def _write_checkpoints_in_process(writer: Any) -> None:
    """Checkpoint files are written by the rank itself.

    Upstream forks writers (threads from 0.19 on) and starts a manager process for their results; a fork of a
    process that runs gloo's threads can hang, and the manager outlives a killed rank.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/dist_checkpointing/strategies/filesystem_async.py
    """
    results: queue.Queue[Any] = queue.Queue()

    def write(
        transforms: Any, use_msc: bool, rank: int, buckets: Any, global_results: queue.Queue[Any]
    ) -> None:
        local_results: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        for index, bucket in enumerate(buckets):
            pending.put(index)
            writer.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, local_results, pending, True, use_msc=use_msc
            )
        outcomes = dict(local_results.get() for _ in buckets)
        failure = next((o for o in outcomes.values() if isinstance(o, Exception)), None)
        global_results.put(failure or outcomes)

    def result_queue(mp_mode: str = "") -> queue.Queue[Any]:
        return results

    forks = hasattr(writer.FileSystemWriterAsync, "write_preloaded_data_multiproc")
    name = "write_preloaded_data_multiproc" if forks else "write_preloaded_data_multithread"
    setattr(writer.FileSystemWriterAsync, name, staticmethod(write))
    setattr(writer, "_get_write_results_queue" if forks else "get_write_results_queue", result_queue)
