"""One test per replacement of `platform/cpu.py`, and that Megatron-Core cannot do without it."""

from __future__ import annotations

import multiprocessing.process
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
import megatron.core.tensor_parallel.random as megatron_random
import megatron.core.transformer.moe.moe_utils as moe_utils
import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.jit import jit_fuser
from torch.distributed.checkpoint.api import CheckpointException

from megatron_drpo.config.schema import Layers, PlatformName
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform import cpu, versions
from megatron_drpo.platform.base import Platform, build_platform
from megatron_drpo.platform.cpu import CpuPlatform
from megatron_drpo.policy.parallel import ParallelState

# ------------------------------------------------------------------------------- before and after


def _what_fails_unprepared() -> dict[str, str]:
    """What Megatron-Core calls -> how it fails in a process that has not been prepared."""
    calls: dict[str, Callable[[], object]] = {
        "current_device": torch.cuda.current_device,
        "current_stream": torch.cuda.current_stream,
        "Stream": torch.cuda.Stream,
        "Event.record": lambda: torch.cuda.Event().record(),
        "synchronize": torch.cuda.synchronize,
        "set_device": lambda: torch.cuda.set_device(0),
        "get_rng_state": torch.cuda.get_rng_state,
        "Tensor.cuda": lambda: torch.ones(1).cuda(),
        **{
            name: lambda name=name, args=args: getattr(torch, name)(*args, device="cuda")
            for name, args in FACTORY_ARGUMENTS.items()
        },
    }
    failures = {}
    for name, call in calls.items():
        try:
            call()
            failures[name] = "works"
        except (RuntimeError, AssertionError, AttributeError) as error:
            failures[name] = type(error).__name__
    failures["Tensor.type"] = torch.ones(1).type()
    return failures


FACTORY_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "tensor": ([1.0, 2.0],),
    "zeros": (2,),
    "ones": (2,),
    "empty": (2,),
    "full": ((2,), 3.0),
    "arange": (2,),
    "empty_like": (torch.zeros(2),),
    "zeros_like": (torch.ones(2),),
    "ones_like": (torch.zeros(2),),
}
FACTORY_VALUES = {
    "tensor": [1.0, 2.0],
    "zeros": [0.0, 0.0],
    "ones": [1.0, 1.0],
    "full": [3.0, 3.0],
    "arange": [0, 1],
    "zeros_like": [0.0, 0.0],
    "ones_like": [1.0, 1.0],
}


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_each_replacement_is_needed(run_distributed: Callable[..., list[Any]]) -> None:
    (failures,) = run_distributed(_what_fails_unprepared, 1)
    assert failures.pop("Tensor.type") == "torch.FloatTensor"
    assert not {name for name, how in failures.items() if how == "works"}, failures


def test_prepare_again_changes_nothing(cpu_platform: Platform) -> None:
    before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device, dist.all_to_all_single)
    assert build_platform(PlatformName.cpu).prepare(1) == torch.device("cpu")
    assert (torch.zeros, torch.Tensor.type, torch.cuda.current_device, dist.all_to_all_single) == before


@pytest.mark.parametrize("found", ["0.16.0", "0.20.0"])
def test_another_megatron_is_refused_before_anything_is_replaced(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(cpu, "_prepared", False)
    installed = {"megatron-core": found, "torch": "2.13.0", "psutil": "7.0"}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    before = torch.zeros
    with pytest.raises(PlatformError, match=f"megatron-core {found} is installed, outside the range"):
        CpuPlatform().prepare(0)
    assert torch.zeros is before
    assert not cpu._prepared


def test_a_visible_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_prepared", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(PlatformError, match="CUDA_VISIBLE_DEVICES=''"):
        CpuPlatform().prepare(0)


@pytest.mark.parametrize(
    ("layers", "implementation", "accumulation"),
    [
        (Layers.transformer_engine, " with Transformer Engine's interface in plain torch", "in the layers"),
        (Layers.local, " local", "torch"),
    ],
)
def test_the_banner_names_the_implementations(
    cpu_platform: Platform, layers: Layers, implementation: str, accumulation: str
) -> None:
    lines = dict(cpu_platform.describe(layers))
    assert lines["device"].startswith("CPU, ")
    assert lines["device"].endswith(f"{torch.get_num_threads()} thread(s) per rank, gloo")
    assert lines["layers"].startswith("megatron-core 0.")
    assert lines["layers"].endswith(implementation)
    assert lines["optimizer"] == "AdamW, distributed (Transformer Engine's interface in plain torch)"
    assert lines["gradient accumulation"] == accumulation


# --------------------------------------------------------------------------------------- torch.cuda


def test_streams_and_events_are_always_in_order(cpu_platform: Platform) -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        value = torch.ones(2).add_(1)
    side.wait_stream(main)
    event = side.record_event()
    main.wait_event(event)
    own = torch.cuda.Event(enable_timing=True)
    own.record()
    own.wait()
    own.synchronize()
    side.synchronize()
    torch.cuda.default_stream().synchronize()
    torch.cuda.synchronize()
    assert own.query()
    assert event.query()
    assert side.record_event(own) is own
    assert value.tolist() == [2.0, 2.0]


def test_the_current_device_is_the_cpu(cpu_platform: Platform) -> None:
    torch.cuda.set_device(3)
    torch.cuda.empty_cache()
    assert torch.zeros(1, device=torch.cuda.current_device()).device == torch.device("cpu")


def test_the_cuda_rng_is_the_cpu_rng(cpu_platform: Platform) -> None:
    state = torch.get_rng_state()
    try:
        torch.cuda.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        saved = torch.cuda.get_rng_state()
        assert torch.equal(torch.rand(3), expected)
        torch.cuda.set_rng_state(saved)
        assert torch.equal(torch.rand(3), expected)
        (generator,) = cast(dict[torch.device, torch.Generator], torch.cuda.default_generators).values()
        assert generator is torch.default_generator
    finally:
        torch.set_rng_state(state)


def test_megatrons_rng_tracker_forks_the_cpu_rng(one_rank: ParallelState) -> None:
    """The tracker's draws repeat after a reseed and leave the default stream where it was."""

    def draw() -> tuple[list[float], list[float]]:
        megatron_random.model_parallel_cuda_manual_seed(3)
        tracker = megatron_random.get_cuda_rng_tracker()
        assert tracker is not None
        with tracker.fork():
            inside = torch.rand(2).tolist()
        return inside, torch.rand(2).tolist()

    state = torch.get_rng_state()
    try:
        (inside, outside), again = draw(), draw()
        assert (inside, outside) == again
        assert inside != outside
        torch.manual_seed(3)  # the data-parallel seed of rank 0
        assert outside == torch.rand(2).tolist()
    finally:
        torch.set_rng_state(state)


# ------------------------------------------------------------------------------- tensors and factories


def test_tensor_methods(cpu_platform: Platform) -> None:
    tensor = torch.ones(2)
    assert tensor.cuda(non_blocking=True) is tensor
    tensor.record_stream(torch.cuda.current_stream())
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.half().type() == "torch.cuda.HalfTensor"
    converted = tensor.type(torch.float64)
    assert converted.dtype is torch.float64
    assert converted.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", FACTORY_ARGUMENTS)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_factories_make_cpu_tensors(cpu_platform: Platform, name: str, device: torch.device | str) -> None:
    tensor = getattr(torch, name)(*FACTORY_ARGUMENTS[name], device=device)
    assert tensor.device == torch.device("cpu")
    if name in FACTORY_VALUES:
        assert tensor.tolist() == FACTORY_VALUES[name]


def test_factories_still_know_other_devices(cpu_platform: Platform) -> None:
    for name, arguments in FACTORY_ARGUMENTS.items():
        if name == "tensor":
            continue
        factory = getattr(torch, name)
        assert factory(*arguments, device="meta").is_meta
        assert factory(*arguments).device == torch.device("cpu")
        with torch.device("meta"):
            is_meta = factory(*arguments).is_meta
        assert is_meta != name.endswith("_like"), name


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_transformers_still_loads_what_it_saved(
    cpu_platform: Platform, hf_model: Callable[[str], Path], name: str
) -> None:
    """It builds models under `with torch.device("meta")` and fills in buffers such as inv_freq later."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(hf_model(name))
    built = transformers.AutoModelForCausalLM.from_config(loaded.config)
    built.load_state_dict(loaded.state_dict())
    for buffer, expected in zip(loaded.buffers(), built.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    exponents = torch.arange(0, 16, 2) / 16
    inverse = torch.tensor(loaded.config.rope_parameters["rope_theta"]) ** -exponents
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, inverse)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, built(ids).logits)


# ----------------------------------------------------------------------------------- torch.distributed


def _exchange_with_tensor_splits() -> tuple[str, list[float]]:
    """Rank r sends r + 1 values to rank 0 and 2 to rank 1; splits are tensors, as Megatron passes them."""
    rank = dist.get_rank()
    send = torch.tensor([rank + 1, 2])
    receive = torch.tensor([1, 2]) if rank == 0 else torch.tensor([2, 2])
    values = torch.arange(int(send.sum())) + 10.0 * (rank + 1)
    output = torch.empty(int(receive.sum()))
    try:
        dist.all_to_all_single(output, values, receive, send)
        without = "works"
    except (TypeError, RuntimeError) as error:
        without = type(error).__name__
    build_platform(PlatformName.cpu).prepare(rank)
    dist.all_to_all_single(output, values, receive, send, group=dist.group.WORLD)
    again = torch.empty_like(output)
    work = dist.all_to_all_single(again, values, receive.tolist(), send.tolist(), async_op=True)
    assert work is not None
    work.wait()
    assert torch.equal(output, again)
    return without, output.tolist()


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_all_to_all_takes_splits_as_tensors(run_distributed: Callable[..., list[Any]]) -> None:
    (failure, first), (_, second) = run_distributed(_exchange_with_tensor_splits, 2)
    assert failure == "TypeError"
    assert first == [10.0, 20.0, 21.0]
    assert second == [11.0, 12.0, 22.0, 23.0]


# -------------------------------------------------------------------------------------------- Megatron


def test_the_router_multiplies_in_fp32(cpu_platform: Platform) -> None:
    """Inputs of lower precision, by Transformer Engine's product or its stand-in."""
    tokens, weight = torch.randn(5, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    logits = moe_utils.router_gating_linear(tokens, weight, None, torch.float32)
    torch.testing.assert_close(logits.double(), tokens.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_fused_functions_are_not_compiled(cpu_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's jit_fuser is torch.compile: the wrapped function itself must run."""
    compiled: list[object] = []
    monkeypatch.setattr("torch._dynamo.convert_frame.compile_frame", compiled.append)
    callers: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        callers.append(x.shape[0])
        return x * 2

    fused = jit_fuser(function)
    for size in (2, 3, 2):
        assert torch.equal(fused(torch.ones(size)), torch.full((size,), 2.0))
    assert callers == [2, 3, 2]  # a compiled function would not run its Python again
    assert compiled == []


class TestCheckpointWriter:
    """Files are written by the process itself."""

    @staticmethod
    def state(value: float) -> dict[str, ShardedTensor]:
        tensor = torch.full((4, 3), value)
        return {"weight": ShardedTensor.from_rank_offsets("weight", tensor, replica_id=0)}

    def test_no_process_is_started_while_saving(
        self, one_rank: ParallelState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a process was started")

        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        monkeypatch.setattr(os, "fork", refuse)
        for value in (1.0, 2.0):  # the results of one save must not be taken for those of the next
            folder = tmp_path / str(value)
            folder.mkdir()
            dist_checkpointing.save(self.state(value), str(folder))
            loaded: Any = dist_checkpointing.load(self.state(0.0), str(folder))
            assert loaded["weight"].tolist() == [[value] * 3] * 4

    def test_a_failed_write_is_reported(
        self, one_rank: ParallelState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*_: object, **__: object) -> None:
            raise OSError("no space left on device")

        (tmp_path / "failed").mkdir()
        (tmp_path / "next").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(filesystem_async, "_write_item", full_disk)
            with pytest.raises(CheckpointException, match="no space left on device"):
                dist_checkpointing.save(self.state(1.0), str(tmp_path / "failed"))
        dist_checkpointing.save(self.state(2.0), str(tmp_path / "next"))
        loaded: Any = dist_checkpointing.load(self.state(0.0), str(tmp_path / "next"))
        assert loaded["weight"].unique().tolist() == [2.0]
