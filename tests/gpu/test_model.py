"""The whole policy with Transformer Engine on a GPU: against the CPU, twice the same, and its memory.

Each policy lives in a process of its own: this one may have given torch.cuda the CPU platform's meaning.
"""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from megatron_drpo.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    Dtype,
    Layers,
    LossConfig,
    OptimizerConfig,
    PlatformName,
    PolicyConfig,
)
from megatron_drpo.types import TrainSequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

TF32_RELATIVE_NORM = 1e-2
"""Transformer Engine multiplies fp32 matrices with TF32's 10 bits; a few layers and their gradients."""
BF16_RELATIVE_NORM = 5e-2


def make_config(model: Path, dtype: Dtype, layers: Layers) -> Config:
    return Config(
        data=DataConfig(train_path="unused"),
        algorithm=AlgorithmConfig(loss=LossConfig(delta=0.5)),
        policy=PolicyConfig(model_path=str(model), dtype=dtype, layers=layers),
        optimizer=OptimizerConfig(lr=1e-3),
    )


def take_step(platform_name: PlatformName, config: Config, sequences: list[TrainSequence]) -> dict[str, Any]:
    """One update: loss, gradient norm, weights afterwards, bytes on the device, and where the host waited."""
    from megatron_drpo.batching.packing import unpack
    from megatron_drpo.metrics.timing import StepTimer
    from megatron_drpo.platform.base import build_platform
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy
    from megatron_drpo.step.global_batch import iter_global_batches

    platform = build_platform(platform_name)
    parallel = initialise_parallel(config.parallel, platform.backend, platform.prepare(0))
    policy = Policy(config, platform, parallel)
    on_gpu = platform_name is PlatformName.cuda
    before = torch.cuda.memory_allocated() if on_gpu else 0
    [micro_batches] = iter_global_batches(config, policy, sequences)
    logprobs: dict[int, torch.Tensor] = {}  # by sequence: padding depends on the platform
    for values, micro_batch in zip(policy.compute_logprobs(micro_batches), micro_batches, strict=True):
        logprobs |= unpack(values.cpu(), micro_batch)
    result = policy.train_step(micro_batches, StepTimer())
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    waits = find_waits(lambda: policy.reduce(policy.forward_backward(micro_batches))) if on_gpu else []
    weights = {name: tensor.cpu().clone() for name, tensor in policy.hf_tensors()}
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "logprobs": torch.cat([logprobs[sequence.id] for sequence in sequences]),
        "weights": weights,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "held": before,
        "peak": peak,
        "waits": waits,
    }


def find_waits(run: Callable[[], object]) -> list[str]:
    """Functions of this package in which torch saw the host wait for the GPU, once per time."""
    places: list[str] = []

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        own = [frame for frame in traceback.extract_stack() if "/megatron_drpo/" in frame.filename]
        places.extend(f"{Path(frame.filename).name}:{frame.name}" for frame in own[-1:])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def in_a_process(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(take_step, *arguments).result(timeout=250)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(Dtype.fp32, TF32_RELATIVE_NORM), (Dtype.bf16, BF16_RELATIVE_NORM)]
)
@pytest.mark.parametrize("model", ["dense_tied", "qwen2", "moe_mixed"])
def test_the_model_of_the_cpu(
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    dtype: Dtype,
    limit: float,
) -> None:
    """Logprobs, loss and gradient norm, against Megatron's own layers in fp32 on the CPU."""
    sequences = make_sequences([5, 17, 2, 9, 31])
    te = make_config(hf_model(model), dtype, Layers.transformer_engine)
    found = in_a_process(PlatformName.cuda, te, sequences)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local = make_config(hf_model(model), Dtype.fp32, Layers.local)
    expected = in_a_process(PlatformName.cpu, local, sequences)
    assert relative(found["logprobs"], expected["logprobs"]) < limit
    assert found["loss"] == pytest.approx(expected["loss"], rel=limit)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=limit)


def test_a_step_is_repeatable(
    hf_model: Callable[[str], Path], make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """The experts of a token are added in a fixed order: two forward passes give the same bits."""
    config = make_config(hf_model("moe"), Dtype.bf16, Layers.transformer_engine)
    first, second = (in_a_process(PlatformName.cuda, config, make_sequences([40] * 16)) for _ in range(2))
    assert torch.equal(first["logprobs"], second["logprobs"])


def test_memory_of_a_step(
    hf_model: Callable[[str], Path], make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """A parameter has 2 bytes of itself, 4 of its gradient and 4 of its main copy; its moments, 8, are made
    in the first update. Twice the tokens in one micro-batch at most double the rest."""
    config = make_config(hf_model("moe"), Dtype.bf16, Layers.transformer_engine)
    small, large = (
        in_a_process(PlatformName.cuda, config, make_sequences([64] * number)) for number in (32, 64)
    )
    per_parameter = small["held"] / small["parameters"]
    assert 10 <= per_parameter < 12
    fixed = small["held"] + 8 * small["parameters"]
    assert large["peak"] - fixed < 2.2 * (small["peak"] - fixed)


def test_the_host_waits_once_per_update(
    hf_model: Callable[[str], Path], make_sequences: Callable[..., list[TrainSequence]]
) -> None:
    """As tests/unit/policy/test_forward.py counts it on a CPU. Where Megatron waits, it was called from one
    of two functions: in the model's forward pass, or by its schedule."""
    config = make_config(hf_model("moe"), Dtype.bf16, Layers.transformer_engine)
    waits = in_a_process(PlatformName.cuda, config, make_sequences([40] * 16))["waits"]
    megatrons = {"forward.py:run_model", "schedule.py:run_schedule"}
    assert [place for place in waits if place not in megatrons] == ["policy.py:reduce"]
