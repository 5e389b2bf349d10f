"""The Megatron model against transformers, its configuration, and the keys of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.enums import AttnBackend

from megatron_drpo.batching.packing import pack
from megatron_drpo.config.schema import Config, Dtype, Layers, ParallelConfig, Recompute
from megatron_drpo.errors import ConfigError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.forward import run_model
from megatron_drpo.policy.model import (
    PolicyModel,
    build_transformer_config,
    padded_vocabulary_size,
    unwrap,
    wrap_data_parallel,
)
from megatron_drpo.types import TrainSequence
from megatron_drpo.weights.export import HfExporter
from megatron_drpo.weights.hf_folder import HfFolder

MODELS = [
    "dense",
    "dense_tied",
    "qwen2",
    "qwen2_tied",
    "llama",
    "llama_tied",
    "moe",
    "moe_renormalised",
    "moe_mixed",
    "moe_sparse_step_tied",
]
LENGTHS = [5, 17, 1 + 1, 9, 31]

L, H, E, F = 4, 64, 8, 32  # layers, hidden size, experts, width of an expert
Shapes = dict[str, tuple[int, ...]]
LLAMA_ATTENTION_SHAPES: Shapes = {
    "self_attention.linear_qkv.layer_norm_weight": (H,),
    "self_attention.linear_qkv.weight": ((4 + 2 * 2) * 16, H),
    "self_attention.linear_proj.weight": (H, 4 * 16),
}
QKV_BIAS_SHAPE: Shapes = {"self_attention.linear_qkv.bias": ((4 + 2 * 2) * 16,)}
ATTENTION_SHAPES: Shapes = LLAMA_ATTENTION_SHAPES | {
    "self_attention.q_layernorm.weight": (16,),
    "self_attention.k_layernorm.weight": (16,),
}
DENSE_SHAPES: Shapes = {
    "mlp.linear_fc1.layer_norm_weight": (H,),
    "mlp.linear_fc1.weight": (2 * 96, H),
    "mlp.linear_fc2.weight": (H, 96),
}
EXPERT_SHAPES: Shapes = {
    "pre_mlp_layernorm.weight": (H,),
    "mlp.router.weight": (E, H),
    "mlp.experts.experts.linear_fc1.weight": (E, 2 * F, H),
    "mlp.experts.experts.linear_fc2.weight": (E, H, F),
}
EMBEDDING_SHAPES: Shapes = {
    "embedding.word_embeddings.weight": (128, H),
    "decoder.final_layernorm.weight": (H,),
}
OUTPUT_SHAPE: Shapes = {"output_layer.weight": (128, H)}


def stacked(shapes: Shapes) -> Shapes:
    return {f"decoder.layers.{name}": (L, *shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layers", Layers)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_packed_sequences(
    build_model: Callable[..., PolicyModel],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    name: str,
    layers: Layers,
) -> None:
    """Each sequence as if it were alone, whatever is packed beside it; padding changes nothing."""
    sequences = make_sequences(LENGTHS)
    micro_batch = pack(sequences, [s.advantages for s in sequences], pad_to_multiple=16)
    model = build_model(name, layers=layers).eval()
    hidden = run_model(micro_batch, model)
    assert hidden.shape == (micro_batch.num_tokens, 1, H)
    logits = (hidden[:, 0] @ model.output_weight().T)[: sum(LENGTHS)]
    assert logits.shape[1] == 128
    assert torch.equal(logits[:, 101:], torch.zeros_like(logits[:, 101:]))  # rows of the padding are zero

    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_model(name)).eval()
    expected = torch.cat([reference(sequence.token_ids[None]).logits[0] for sequence in sequences])
    assert expected.std() > 0.5  # the tolerance means something
    torch.testing.assert_close(logits[:, :101], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_both_kinds_of_layers_give_the_same_logits(
    build_model: Callable[..., PolicyModel], make_sequences: Callable[..., list[TrainSequence]], name: str
) -> None:
    sequences = make_sequences(LENGTHS)
    micro_batch = pack(sequences, [s.advantages for s in sequences], pad_to_multiple=16)
    models = [build_model(name, layers=layers).eval() for layers in Layers]
    first, second = (run_model(micro_batch, model)[:, 0] @ model.output_weight().T for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_the_layers_are_those_that_were_asked_for(build_model: Callable[..., PolicyModel]) -> None:
    """Megatron's names: a model that took the other kind in silence would pass every comparison."""
    classes = {
        layers: {type(module).__name__ for module in build_model("moe", layers=layers).modules()}
        for layers in Layers
    }
    assert classes[Layers.transformer_engine] >= {
        "TELayerNormColumnParallelLinear",
        "TERowParallelLinear",
        "TEDotProductAttention",
        "TEGroupedMLP",
        "TEColumnParallelGroupedLinear",
        "TERowParallelGroupedLinear",
        "RMSNorm",
    }
    assert classes[Layers.local] >= {"SequentialMLP", "RowParallelLinear", "PackedAttention", "RMSNorm"}
    assert not any(name.startswith("TE") for name in classes[Layers.local])


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("layers", Layers)
@pytest.mark.parametrize("name", ["dense_tied", "qwen2", "llama"])
def test_gradients_are_those_of_transformers(
    build_model: Callable[..., PolicyModel],
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    name: str,
    layers: Layers,
) -> None:
    """Of every parameter, biases among them, for a random weighting of the logits."""
    (sequence,) = make_sequences([23])
    weighting = torch.randn(len(sequence.token_ids), 101, generator=torch.Generator().manual_seed(2))
    micro_batch = pack([sequence], [sequence.advantages], pad_to_multiple=1)
    # Without Megatron's DDP there is no main_grad to add to.
    model = build_model(name, layers=layers, megatron_overrides={"gradient_accumulation_fusion": False})
    logits = run_model(micro_batch, model)[:, 0] @ model.output_weight().T
    (logits[:, :101] * weighting).sum().backward()

    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_model(name))
    (reference(sequence.token_ids[None]).logits[0] * weighting).sum().backward()
    folder = HfFolder(hf_model(name))
    family = get_family(folder.config)
    exporter = HfExporter([model], family.mapping(family.architecture(folder.config)))
    found = dict(exporter.tensors(gradient))
    assert found.keys() == {key for key, _ in reference.named_parameters()}
    for key, parameter in reference.named_parameters():
        expected = gradient(parameter)
        assert expected.norm() > 1e-2
        assert (found[key] - expected).norm() < 1e-5 * expected.norm(), key


@pytest.mark.parametrize("layers", Layers)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", EMBEDDING_SHAPES | OUTPUT_SHAPE | stacked(ATTENTION_SHAPES | DENSE_SHAPES)),
        ("dense_tied", EMBEDDING_SHAPES | stacked(ATTENTION_SHAPES | DENSE_SHAPES)),
        ("llama_tied", EMBEDDING_SHAPES | stacked(LLAMA_ATTENTION_SHAPES | DENSE_SHAPES)),
        (
            "qwen2_tied",
            EMBEDDING_SHAPES | stacked(LLAMA_ATTENTION_SHAPES | QKV_BIAS_SHAPE | DENSE_SHAPES),
        ),
        ("moe", EMBEDDING_SHAPES | OUTPUT_SHAPE | stacked(ATTENTION_SHAPES | EXPERT_SHAPES)),
        (
            "moe_mixed",
            EMBEDDING_SHAPES
            | OUTPUT_SHAPE
            | {
                f"decoder.layers.{layer}.{key}": shape
                for layer in range(L)
                for key, shape in (ATTENTION_SHAPES | (DENSE_SHAPES if layer == 1 else EXPERT_SHAPES)).items()
            },
        ),
    ],
)
def test_checkpoint_keys_are_the_same_of_both_kinds_of_layers(
    build_model: Callable[..., PolicyModel], name: str, layers: Layers, expected: Shapes
) -> None:
    """The local specs of upstream differ for MoE layers."""
    shapes: Shapes = {}
    for entry in build_model(name, layers=layers).sharded_state_dict().values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                shapes[part.key] = tuple(part.global_shape)
    assert shapes == expected


def test_rotary_frequencies_are_scaled_as_in_llama_3(
    build_model: Callable[..., PolicyModel], hf_model: Callable[[str], Path]
) -> None:
    """Short sequences would not show it: only low frequencies are scaled."""
    reference = transformers.LlamaForCausalLM.from_pretrained(hf_model("llama"))
    expected = reference.model.rotary_emb.inv_freq
    assert isinstance(expected, torch.Tensor)
    divisors = 500_000.0 ** (-torch.arange(0, 16, 2) / 16) / expected
    assert divisors[:4].tolist() == pytest.approx([1.0] * 4)
    assert 1.5 < divisors[4].item() < 30.0
    assert divisors[5:].tolist() == pytest.approx([32.0] * 3)
    torch.testing.assert_close(build_model("llama").rotary_pos_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_tied_embeddings_share_one_parameter(build_model: Callable[..., PolicyModel]) -> None:
    tied, untied = build_model("dense_tied"), build_model("dense")
    assert tied.output_weight() is tied.embedding.word_embeddings.weight
    assert untied.output_weight() is not untied.embedding.word_embeddings.weight


@pytest.mark.parametrize(
    ("vocab_size", "tensor_size", "expected"),
    [
        (1, 1, 128),
        (128, 1, 128),
        (129, 1, 256),
        (101, 2, 256),
        (49152, 3, 49152),
        (101, 3, 384),
        (151936, 8, 152576),
    ],
)
def test_padded_vocabulary(vocab_size: int, tensor_size: int, expected: int) -> None:
    assert padded_vocabulary_size(vocab_size, tensor_size) == expected


def test_overrides_come_last_and_act(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
    build_model: Callable[..., PolicyModel],
    make_sequences: Callable[..., list[TrainSequence]],
) -> None:
    described = architecture("moe")
    overrides = {"moe_router_topk": 1, "layernorm_epsilon": 0.5}
    config = build_transformer_config(
        policy_config("moe", megatron_overrides=overrides), described, cpu_platform
    )
    assert (config.moe_router_topk, config.layernorm_epsilon) == (1, 0.5)
    plain = build_transformer_config(policy_config("moe"), described, cpu_platform)
    assert (plain.moe_router_topk, plain.layernorm_epsilon) == (2, 1e-6)
    sequences = make_sequences([6])
    micro_batch = pack(sequences, [s.advantages for s in sequences], pad_to_multiple=1)
    with torch.no_grad():
        first = run_model(micro_batch, build_model("moe"))
        second = run_model(micro_batch, build_model("moe", megatron_overrides=overrides))
    assert (first - second).abs().max() > 0.1


def test_an_override_of_an_enum_is_its_member(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
) -> None:
    """As a text it would be equal to no member, and do nothing."""
    config = policy_config("moe", megatron_overrides={"attention_backend": "flash"})
    built = build_transformer_config(config, architecture("moe"), cpu_platform)
    assert built.attention_backend is AttnBackend.flash


def test_a_combination_that_megatron_refuses(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
) -> None:
    config = policy_config("moe", megatron_overrides={"recompute_granularity": "sometimes"})
    with pytest.raises(ConfigError, match=r"Megatron refuses this configuration: .*sometimes"):
        build_transformer_config(config, architecture("moe"), cpu_platform)


def test_the_interleaved_schedule_gets_the_p2p_that_exchanges_the_right_tensors(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
) -> None:
    config = policy_config("moe")
    for virtual in (1, 2):
        config.parallel = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=virtual)
        built = build_transformer_config(config, architecture("moe"), cpu_platform)
        assert built.overlap_p2p_comm is (virtual > 1)
        assert built.batch_p2p_comm is (virtual == 1)
        assert built.variable_seq_lengths


def test_context_parallelism_uses_the_ring(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
) -> None:
    """Where Transformer Engine computes attention; Megatron's default leaves the choice to its version."""
    config = policy_config("moe")
    for size, expected in ((1, None), (4, "p2p")):
        config.parallel = ParallelConfig(context_parallel_size=size)
        built = build_transformer_config(config, architecture("moe"), cpu_platform)
        assert (built.context_parallel_size, built.cp_comm_type) == (size, expected)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (Recompute.none, (None, None, None)),
        (Recompute.selective, ("selective", None, None)),
        (Recompute.full, ("full", "uniform", 1)),
    ],
)
def test_recompute_settings(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
    recompute: Recompute,
    expected: tuple[str | None, str | None, int | None],
) -> None:
    config = build_transformer_config(
        policy_config("moe", recompute=recompute), architecture("moe"), cpu_platform
    )
    found = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
    assert found == expected


@pytest.mark.parametrize(
    ("model", "layers", "modules"),
    [
        ("moe", Layers.transformer_engine, ["moe_act", "layernorm"]),
        ("moe", Layers.local, ["core_attn"]),
        ("dense", Layers.transformer_engine, ["core_attn"]),
    ],
)
def test_what_is_large_is_recomputed(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
    model: str,
    layers: Layers,
    modules: list[str],
) -> None:
    wanted = policy_config(model, recompute=Recompute.selective, layers=layers)
    assert build_transformer_config(wanted, architecture(model), cpu_platform).recompute_modules == modules


def test_bf16_keeps_gradients_in_fp32(build_model: Callable[..., PolicyModel]) -> None:
    model = build_model("moe", dtype=Dtype.bf16)
    (wrapped,) = wrap_data_parallel([model], model.config)
    assert unwrap(wrapped) is model
    for name, parameter in model.named_parameters():
        expected = torch.float32 if "router" in name and parameter.dtype is torch.float32 else torch.bfloat16
        assert parameter.dtype is expected, name
        assert vars(parameter)["main_grad"].dtype is torch.float32, name


def test_architecture_fields_reach_megatron(
    cpu_platform: Platform,
    policy_config: Callable[..., Config],
    architecture: Callable[[str], ArchitectureConfig],
) -> None:
    """The plain sum of the loss, and nothing random, whatever the architecture."""
    described = replace(architecture("moe"), norm_eps=1e-3)
    config = build_transformer_config(policy_config("moe"), described, cpu_platform)
    assert config.layernorm_epsilon == 1e-3
    assert config.calculate_per_token_loss
    assert config.moe_router_load_balancing_type == "none"
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
