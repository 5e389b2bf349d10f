"""The process mesh: checked against the model first, then built."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from megatron_drpo.config.schema import ParallelConfig
from megatron_drpo.errors import ConfigError, PlatformError
from megatron_drpo.models.base import ArchitectureConfig


def check_layout(parallel: ParallelConfig, architecture: ArchitectureConfig) -> list[str]:
    """The rules between the mesh and the model, as sentences; empty if the layout fits."""
    problems: list[str] = []

    def must_divide(key: str, size: int, what: str, total: int) -> None:
        if total % size:
            problems.append(f"parallel.{key}={size} must divide the model's {what}, {total}")

    tensor = parallel.tensor_parallel_size
    must_divide("tensor_parallel_size", tensor, "num_attention_heads", architecture.num_attention_heads)
    must_divide("tensor_parallel_size", tensor, "num_key_value_heads", architecture.num_query_groups)
    stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
    if architecture.num_layers % stages:
        problems.append(
            "parallel.pipeline_parallel_size * virtual_pipeline_parallel_size = "
            f"{stages} must divide the model's num_hidden_layers, {architecture.num_layers}"
        )
    problems += _dense_problems(parallel, architecture) + _expert_problems(parallel, architecture)
    return problems


def _dense_problems(parallel: ParallelConfig, architecture: ArchitectureConfig) -> list[str]:
    width = architecture.ffn_hidden_size
    if width % parallel.tensor_parallel_size:
        return [
            f"parallel.tensor_parallel_size={parallel.tensor_parallel_size} must divide "
            f"the model's intermediate_size, {width}"
        ]
    return []


def _expert_problems(parallel: ParallelConfig, architecture: ArchitectureConfig) -> list[str]:
    moe = architecture.moe
    if moe is None:
        sizes = {
            "expert_parallel_size": parallel.expert_parallel_size,
            "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        }
        return [
            f"parallel.{key}={size} needs a mixture-of-experts model; this one is dense"
            for key, size in sizes.items()
            if size > 1
        ]
    problems = []
    if moe.num_experts % parallel.expert_parallel_size:
        problems.append(
            f"parallel.expert_parallel_size={parallel.expert_parallel_size} must divide "
            f"the model's num_experts, {moe.num_experts}"
        )
    width = moe.ffn_hidden_size
    if width % parallel.expert_tensor_parallel_size:
        problems.append(
            f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} must divide "
            f"the model's moe_intermediate_size, {width}"
        )
    if (
        parallel.expert_parallel_size == 1
        and parallel.expert_tensor_parallel_size != parallel.tensor_parallel_size
    ):
        problems.append(
            f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} must equal "
            f"tensor_parallel_size={parallel.tensor_parallel_size} while expert_parallel_size is 1 "
            "(Megatron then reduces expert gradients like dense ones and loses those of other tensor ranks)"
        )
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor_parallel_size={parallel.tensor_parallel_size} with a mixture-of-experts model "
            "needs parallel.sequence_parallel=true (Megatron's dispatcher routes each token once only then)"
        )
    return problems


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Where this process stands, before any process group exists (torchrun's environment)."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> RankInfo:
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )


def initialise_parallel(
    parallel: ParallelConfig, backend: str, device: torch.device, *, store: dist.Store | None = None
) -> ParallelState:
    """Create the default process group if there is none, and Megatron's groups.

    Raises:
        ConfigError: the number of started ranks is not the mesh's.
    """
    from megatron.core import parallel_state

    info = RankInfo.from_environment()
    world_size = dist.get_world_size() if dist.is_initialized() else info.world_size
    if world_size != parallel.world_size:
        raise ConfigError(
            f"{world_size} rank(s) were started, but tensor * context * pipeline * data parallel sizes need "
            f"{parallel.world_size}: start that many, or change parallel.data_parallel_size"
        )
    timeout = timedelta(seconds=parallel.timeout_s)
    if not dist.is_initialized():
        _initialise_process_group(info, backend, timeout, store)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(parallel.timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    return ParallelState(device=device, model_group=_replica_group(timeout))


def _replica_group(timeout: timedelta) -> dist.ProcessGroup:
    """All ranks of one data-parallel replica; Megatron's model-parallel group has no context ranks."""
    from megatron.core import parallel_state

    if parallel_state.get_context_parallel_world_size() == 1:
        return cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())
    replicas: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(replicas, parallel_state.get_data_parallel_rank())
    # Every rank takes part in making every group, in the same order.
    members = [[rank for rank, of in enumerate(replicas) if of == replica] for replica in sorted({*replicas})]
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
    return cast(dist.ProcessGroup, group)


def _initialise_process_group(
    info: RankInfo, backend: str, timeout: timedelta, store: dist.Store | None
) -> None:
    if store is None and info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=info.rank, world_size=info.world_size
        )


class ParallelState:
    """This rank's place in the mesh, in this project's names; a view of Megatron's parallel_state."""

    def __init__(self, *, device: torch.device, model_group: dist.ProcessGroup) -> None:
        from megatron.core import parallel_state as mpu

        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.tensor_rank = mpu.get_tensor_model_parallel_rank()
        self.tensor_size = mpu.get_tensor_model_parallel_world_size()
        self.tensor_group = mpu.get_tensor_model_parallel_group()
        self.context_rank = mpu.get_context_parallel_rank()
        self.context_size = mpu.get_context_parallel_world_size()
        self.context_group = mpu.get_context_parallel_group()
        """The ranks that share the tokens of each sequence."""
        self.pipeline_rank = mpu.get_pipeline_model_parallel_rank()
        self.pipeline_size = mpu.get_pipeline_model_parallel_world_size()
        self.data_rank = mpu.get_data_parallel_rank()
        self.data_size = mpu.get_data_parallel_world_size()
        self.data_group = mpu.get_data_parallel_group()
        """The same place in every replica."""
        self.model_group = model_group
        """All ranks of one data-parallel replica: tensor * context * pipeline."""

    @property
    def is_leader(self) -> bool:
        """This rank asks for its replica's rollouts."""
        return self.tensor_rank == 0 and self.context_rank == 0 and self.pipeline_rank == 0

    @property
    def is_main(self) -> bool:
        """Global rank 0: commands the fleet and writes the logs."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the last pipeline stage, where logprobs are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def pad_sequences_to(self) -> int:
        """Tokens of a packed sequence are a multiple of it: two equal parts for every context rank."""
        return 1 if self.context_size == 1 else 2 * self.context_size

    @property
    def pad_to_multiple(self) -> int:
        """Tokens of a whole micro-batch are a multiple of it: equal shares for the tensor ranks as well."""
        return math.lcm(self.pad_sequences_to, self.context_size * self.tensor_size)

    def gather_over_context(self, values_T: torch.Tensor) -> list[torch.Tensor]:
        """Every context rank's values per token, in rank order, on all of them; without a gradient."""
        if self.context_size == 1:
            return [values_T]
        gathered = [torch.empty_like(values_T) for _ in range(self.context_size)]
        dist.all_gather(gathered, values_T.contiguous(), group=self.context_group)
        return gathered

    def broadcast_from_leader(self, value: object) -> object:
        """Any picklable object, from the replica's leader to its other ranks."""
        if dist.get_world_size(self.model_group) == 1:
            return value
        box = [value]
        leader = dist.get_global_rank(self.model_group, 0)
        if self.is_leader and self.rank != leader:
            raise PlatformError(
                f"rank {self.rank} leads its replica, but its group starts with rank {leader}"
            )
        dist.broadcast_object_list(box, src=leader, group=self.model_group, device=self.device)
        return box[0]

    def sum_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over replicas, in place."""
        dist.all_reduce(values, group=self.data_group)
        return values
