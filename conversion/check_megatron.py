"""Verification, levels 2 to 4: what Megatron makes of a checkpoint. Each check runs on ranks of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from conversion.to_hf import ToHf, ToHfOptions
from megatron_drpo.batching.packing import pack
from megatron_drpo.config.schema import Config, DataConfig, Dtype, ParallelConfig, PlatformName, PolicyConfig
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.forward import last_hidden_states, run_model
from megatron_drpo.policy.model import PolicyModel, build_model_chunks, build_transformer_config
from megatron_drpo.policy.parallel import ParallelState, initialise_parallel
from megatron_drpo.policy.schedule import run_schedule
from megatron_drpo.types import MicroBatch, TrainSequence
from megatron_drpo.weights.export import HfExporter
from megatron_drpo.weights.integrity import INTEGRITY_FILE
from megatron_drpo.weights.load_megatron import READ_ERRORS, describe_error, load_megatron_weights
from megatron_drpo.weights.mapping import TensorMap
from megatron_drpo.weights.torch_dist_keys import KeyLayout, is_training_state

_BATCH_BYTES = 2**30


def compare_with_loader(path: Path, config_folder: Path) -> list[str]:
    """Every weight as Megatron's loader gives it, against our own reader; problems as sentences. One rank.

    Also has megatron-core >= 0.19 check integrity.json. Reads a gigabyte at a time, so any model fits.
    """
    register_safe_globals()
    initialise_parallel(ParallelConfig(), "gloo", build_platform(PlatformName.cpu).prepare(0))
    checkpoint = ToHf(path, config_folder, ToHfOptions())
    folder = str(checkpoint.reader.path)
    verifies = "verify_integrity" in inspect.signature(dist_checkpointing.load).parameters
    first: dict[str, Any] = {"verify_integrity": True} if verifies else {}
    if not (checkpoint.reader.path / INTEGRITY_FILE).is_file():
        first = {}
    problems: list[str] = []
    for batch in _batches(checkpoint):
        wanted = {str(i): _whole_matrix(checkpoint, tensor_map) for i, tensor_map in enumerate(batch)}
        try:
            loaded: Any = dist_checkpointing.load(wanted, folder, validate_access_integrity=False, **first)
        except READ_ERRORS as error:
            return [*problems, f"{folder}: Megatron's loader: {describe_error(error)}"]
        first = {}
        for i, tensor_map in enumerate(batch):
            expected = checkpoint.read_matrix(tensor_map)
            rows = len(expected)
            found = loaded[str(i)].view(-1, *expected.shape[1:])
            is_equal = torch.equal(as_integers(found[:rows]), as_integers(expected))
            if not is_equal or found[rows:].any():
                problems.append(f"{folder}: {tensor_map.name} differs as Megatron's loader reads it")
    return problems


def compare_with_model(path: Path, config_folder: Path, parallel: ParallelConfig) -> list[str]:
    """Have Megatron load a model under a layout, gather it again and compare; problems, on rank 0.

    Strictly: the model asks for all that is in the checkpoint, and finds all that it asks for.
    """
    checkpoint = ToHf(path, config_folder, ToHfOptions())
    _, chunks = _build_model(checkpoint, config_folder, parallel, _stored_dtype(checkpoint))
    try:
        problems = _load_strictly(chunks, checkpoint)
    except READ_ERRORS as error:
        return [f"{checkpoint.reader.path}: Megatron's loader: {describe_error(error)}"]
    dtype = chunks[0].config.params_dtype
    expected: dict[str, torch.Tensor] = {}
    maps = {tensor.name: tensor_map for tensor_map in checkpoint.mapping for tensor in tensor_map.hf}
    for name, tensor in HfExporter(chunks, checkpoint.mapping).tensors():
        if name not in expected:
            matrix = checkpoint.read_matrix(maps[name])
            expected = maps[name].to_hf(matrix)
        if not torch.equal(as_integers(tensor), as_integers(expected[name].to(dtype))):
            problems.append(f"{checkpoint.reader.path}: {name!r} differs in the model")
    return problems


@torch.no_grad()
def compute_logits(
    path: Path, config_folder: Path, parallel: ParallelConfig, sequences: list[torch.Tensor], target: Path
) -> None:
    """fp32 logits [T, V] of the packed sequences, written to a file by one rank of the last stage."""
    checkpoint = ToHf(path, config_folder, ToHfOptions())
    state, chunks = _build_model(checkpoint, config_folder, parallel, Dtype.fp32)
    load_megatron_weights(chunks, checkpoint.reader.path, checkpoint.mapping)
    batch = pack_sequences(sequences)
    forward = LogitsForward(sequence_parallel=parallel.sequence_parallel)
    logits = run_schedule(
        forward,
        [chunk.eval() for chunk in chunks],
        [batch] * parallel.pipeline_parallel_size,
        state.device,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if logits and state.tensor_rank == 0:
        num_tokens = sum(map(len, sequences))
        torch.save(logits[0][:num_tokens, : checkpoint.arch.vocab_size].clone(), target)


class LogitsForward:
    """Megatron's forward_step_func that collects [T, V_padded] logits: for checks, never for training."""

    def __init__(self, *, sequence_parallel: bool) -> None:
        self.sequence_parallel = sequence_parallel

    def __call__(self, batches: Iterator[MicroBatch], module: Any) -> tuple[torch.Tensor, Any]:
        def collect(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            hidden_TH = last_hidden_states(hidden, sequence_parallel=self.sequence_parallel)
            return gather_from_tensor_model_parallel_region(hidden_TH @ module.output_weight().T)

        return run_model(next(batches), module), collect


def pack_sequences(sequences: list[torch.Tensor]) -> MicroBatch:
    """One micro-batch of token ids; whatever training needs besides is zero."""
    packed = []
    for number, token_ids in enumerate(sequences):
        zeros = torch.zeros(len(token_ids) - 1)
        packed.append(
            TrainSequence(
                id=number,
                token_ids=token_ids,
                prompt_length=1,
                advantages=zeros,
                rollout_logprobs=zeros,
                loss_mask=zeros.bool(),
            )
        )
    return pack(packed, [sequence.advantages for sequence in packed], pad_to_multiple=12)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor's values, so that NaN equals itself."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _build_model(
    checkpoint: ToHf, config_folder: Path, parallel: ParallelConfig, dtype: Dtype
) -> tuple[ParallelState, list[PolicyModel]]:
    register_safe_globals()
    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(config_folder), dtype=dtype),
        parallel=parallel,
    )
    transformer_config = build_transformer_config(config, checkpoint.arch, platform)
    return state, build_model_chunks(transformer_config, checkpoint.arch, platform, state.device)


def _stored_dtype(checkpoint: ToHf) -> Dtype:
    embedding = checkpoint.places[next(iter(checkpoint.mapping)).name]
    is_bf16 = checkpoint.reader.tensors[embedding.key].dtype is torch.bfloat16
    return Dtype.bf16 if is_bf16 else Dtype.fp32


def _load_strictly(chunks: list[PolicyModel], checkpoint: ToHf) -> list[str]:
    """As Megatron-LM does; keys that only one side has, as sentences."""
    folder = checkpoint.reader.path
    metadata = {"non_homogeneous_layers": checkpoint.places.layout is KeyLayout.per_layer}
    wanted = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    loaded: Any = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    state, left_over, lacking = loaded
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"])
    # Each layer specification asks for the extra states that it has.
    left_over = {key for key in left_over if "_extra_state" not in key and not is_training_state(key)}
    problems = [f"{folder}: the model does not ask for {key!r}" for key in sorted(left_over)]
    return problems + [f"{folder}: the model asks for {key!r} in vain" for key in sorted(lacking)]


def _batches(checkpoint: ToHf) -> Iterator[list[TensorMap]]:
    batch: list[TensorMap] = []
    room = _BATCH_BYTES
    for tensor_map in checkpoint.mapping:
        if room <= 0:
            yield batch.copy()
            batch.clear()
            room = _BATCH_BYTES
        batch.append(tensor_map)
        room -= torch.Size(tensor_map.shape).numel() * 4
    yield batch


def _whole_matrix(checkpoint: ToHf, tensor_map: TensorMap) -> ShardedTensor:
    """A matrix as Megatron's loader is asked for it, padding included."""
    place = checkpoint.places[tensor_map.name]
    stored = checkpoint.reader.tensors[place.key]
    shape = stored.shape[len(place.leading_shape) :]
    values = torch.empty((*(1 for _ in place.leading_shape), *shape), dtype=stored.dtype)
    return ShardedTensor(
        key=place.key,
        data=values,
        dtype=stored.dtype,
        local_shape=tuple(values.shape),
        global_shape=stored.shape,
        global_offset=(*place.leading_offset, *(0 for _ in shape)),
        axis_fragmentations=None,
    )
