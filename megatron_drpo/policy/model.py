"""From an HF architecture and this run's layout to Megatron's model chunks."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_drpo.config.schema import Config, Dtype, Layers, PlatformName, Recompute
from megatron_drpo.errors import ConfigError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.platform.base import Platform
from megatron_drpo.platform.cuda import has_apex_weight_gradients
from megatron_drpo.policy.layers import PackedAttention, RMSNorm
from megatron_drpo.policy.overrides import convert_overrides
from megatron_drpo.policy.te_repairs import mark_expert_weights, output_layer_without_apex

_REFUSALS = (ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What TransformerConfig raises for values that do not go together."""
_DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}
# Megatron pads the vocabulary so that its shards have equal, GEMM-friendly sizes.
_VOCABULARY_MULTIPLE = 128


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns hidden states: the logprob op applies the output layer itself,
    chunk by chunk, so that no [tokens, vocabulary] tensor ever exists."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the LM head, [V_padded / tp, H]; the embedding's if tied."""
        if self.share_embeddings_and_output_weights:
            return cast(torch.Tensor, self.shared_embedding_or_output_weight())
        return cast(torch.Tensor, self.output_layer.weight)


def build_transformer_config(
    config: Config, architecture: ArchitectureConfig, platform: Platform
) -> TransformerConfig:
    """Megatron's configuration of the model, the layout and the numerics, `megatron_overrides` last.

    Raises:
        ConfigError: Megatron refuses a combination of values.
        PlatformError: this machine lacks what policy.layers needs.
    """
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_parallel_size > 1
    dtype = _DTYPES[config.policy.dtype]
    platform.require_layers(config.policy.layers)
    use_te = config.policy.layers is Layers.transformer_engine
    on_gpu = platform.name is PlatformName.cuda
    contextual = parallel.context_parallel_size > 1
    values: dict[str, Any] = dict(
        **architecture.transformer_config_fields(),
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        # Transformer Engine's ring: keys and values travel while a rank computes.
        cp_comm_type="p2p" if contextual else None,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_parallel_size if interleaved else None,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.policy.dtype is Dtype.bf16,
        use_cpu_initialization=not on_gpu,
        transformer_impl=config.policy.layers.value,
        # Micro-batches are packed, so their lengths differ.
        variable_seq_lengths=True,
        # The default p2p of the interleaved schedule exchanges wrong tensors silently when lengths vary.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # The loss of a global batch is a plain sum: Megatron must not divide by micro-batches or replicas.
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        attention_backend=AttnBackend.auto,
        **_fusion_fields(use_te=use_te, on_gpu=on_gpu),
        **_recompute_fields(
            config.policy.recompute, has_grouped_experts=use_te and architecture.moe is not None
        ),
    )
    values.update(convert_overrides(config.policy.megatron_overrides))
    try:
        return TransformerConfig(**values)
    except _REFUSALS as error:
        raise ConfigError(f"Megatron refuses this configuration: {error}") from error


def _fusion_fields(*, use_te: bool, on_gpu: bool) -> dict[str, bool]:
    """What is computed in one kernel: with Transformer Engine's layers the same on every platform."""
    return {
        "moe_grouped_gemm": use_te,
        "gradient_accumulation_fusion": use_te or (on_gpu and has_apex_weight_gradients()),
        "bias_activation_fusion": use_te or on_gpu,
        "bias_dropout_fusion": use_te or on_gpu,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": use_te,
        # Unfused, a token's experts are added in bf16 and in random order on GPUs.
        "moe_permute_fusion": use_te,
        # The replay of routes goes through the unfused router, and both must break ties alike.
        "moe_router_fusion": False,
    }


def _recompute_fields(recompute: Recompute, *, has_grouped_experts: bool) -> dict[str, Any]:
    if recompute is Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute is Recompute.selective and has_grouped_experts:
        # Fused attention keeps no scores; the experts' activations are what is large, K of them for a token.
        return {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}
    if recompute is Recompute.selective:
        return {"recompute_granularity": "selective"}
    return {}


def build_block_spec(
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """This rank's layers. Without Transformer Engine: megatron-core's local layers with our norm and
    attention, under the global checkpoint keys that the Transformer Engine layers have."""
    spec: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if use_transformer_engine:
        return spec
    for layer in spec.layer_specs:
        _use_own_modules(layer)
    spec.layer_norm = RMSNorm
    return spec


def _use_own_modules(layer: Any) -> None:
    submodules = layer.submodules
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    mlp = submodules.mlp  # a ModuleSpec; since megatron-core 0.19 a partial
    if getattr(mlp, "module", getattr(mlp, "func", None)) is not MoELayer:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    submodules.sharded_state_dict_keys_map = keys


def padded_vocabulary_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """`vocab_size` rounded up to a multiple of 128 * tp."""
    multiple = _VOCABULARY_MULTIPLE * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def build_model_chunks(
    config: TransformerConfig, architecture: ArchitectureConfig, platform: Platform, device: torch.device
) -> list[PolicyModel]:
    """This rank's part of the model, one chunk per virtual pipeline stage, weights not yet loaded."""
    use_te = config.transformer_impl == Layers.transformer_engine
    model_parallel_cuda_manual_seed(0)  # weights are loaded afterwards; Megatron wants its RNG tracker seeded
    virtual = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    chunks = []
    for vp_stage in stages:
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        with output_layer_without_apex():
            chunk = PolicyModel(
                config,
                cast(Any, build_block_spec(config, use_transformer_engine=use_te, vp_stage=vp_stage)),
                vocab_size=padded_vocabulary_size(architecture.vocab_size, config.tensor_model_parallel_size),
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_base=cast(int, architecture.rope_theta),  # annotated int upstream, used as a float
                rope_scaling=architecture.rope_scaling_factor is not None,
                rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
                vp_stage=vp_stage,
            )
        mark_expert_weights(chunk)
        chunks.append(chunk.to(device))
    return chunks


def wrap_data_parallel(chunks: list[PolicyModel], config: TransformerConfig) -> list[DistributedDataParallel]:
    """Mixed precision and Megatron's DDP: gradients in fp32 buffers, reduce-scattered over replicas."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        wrapped.append(DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0))
    return wrapped


def unwrap(module: Any) -> PolicyModel:
    """The bare model inside DDP and Float16Module."""
    while not isinstance(module, PolicyModel):
        module = module.module
    return module
