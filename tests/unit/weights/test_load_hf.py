"""A model loaded from an HF folder: its logits against transformers, and folders that do not fit.

Megatron is imported by the ranks alone: that takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_drpo.config.schema import Config, DataConfig, Dtype, ParallelConfig, PlatformName, PolicyConfig
from megatron_drpo.errors import ModelError
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import build_platform
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
LENGTHS = [5, 17, 9]


def load(path: Path, weights: Path) -> Any:
    """The PolicyModel that `path` describes, on one rank, with the tensors in `weights`."""
    from megatron_drpo.policy.model import build_model_chunks, build_transformer_config
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.weights.load_hf import load_hf_weights

    platform = build_platform(PlatformName.cpu)
    parallel = ParallelConfig()
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(path), dtype=Dtype.fp32),
        parallel=parallel,
    )
    described, folder = HfFolder(path), HfFolder(weights)
    architecture = get_family(described.config).architecture(described.config)
    family = get_family(folder.config)
    mapping = family.mapping(family.architecture(folder.config))
    transformer_config = build_transformer_config(config, architecture, platform)
    (model,) = build_model_chunks(transformer_config, architecture, platform, state.device)
    load_hf_weights([model], folder, mapping)
    return model.eval()


@torch.no_grad()
def logits_of(path: Path, sequences: list[torch.Tensor]) -> torch.Tensor:
    """[T, V_padded] of the packed sequences."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = load(path, path)
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    cu_seqlens = lengths.cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(map(len, sequences)),
        max_seqlen_kv=max(map(len, sequences)),
    )
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    hidden = model(torch.cat(sequences)[None], positions[None], None, packed_seq_params=packed)
    return hidden[:, 0] @ model.output_weight().T


def run_one_rank(
    paths: list[Path], sequences: list[torch.Tensor], misfits: list[tuple[Path, Path]]
) -> tuple[list[torch.Tensor], list[str]]:
    """Logits of every model; the messages of loads that must fail."""
    logits = [logits_of(path, sequences) for path in paths]
    messages = []
    for path, weights in misfits:
        with pytest.raises(ModelError) as error:
            load(path, weights)
        messages.append(str(error.value))
    return logits, messages


def variant(source: Path, path: Path, **changes: object) -> Path:
    """A copy of a folder with another config."""
    shutil.copytree(source, path)
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_logits_and_misfits(
    tmp_path: Path, hf_model: Callable[[str], Path], run_distributed: Callable[..., list[Any]]
) -> None:
    """fp32 logits of packed sequences within 1e-4 of transformers; what does not fit is refused by name."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 101, (length,), generator=generator) for length in LENGTHS]
    source = hf_model("moe")
    shallow = variant(source, tmp_path / "shallow", num_hidden_layers=2)
    narrow = variant(source, tmp_path / "narrow", moe_intermediate_size=16)
    extra = retensor(variant(source, tmp_path / "extra"), lambda t: t.update(bias=torch.zeros(2)))
    lacking = retensor(variant(source, tmp_path / "lacking"), lambda t: t.pop("model.norm.weight"))
    tied = hf_model("dense_tied")
    head = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    copy = retensor(variant(tied, tmp_path / "copy"), lambda t: t.update({"lm_head.weight": head.clone()}))
    other = retensor(variant(tied, tmp_path / "other"), lambda t: t.update({"lm_head.weight": head + 1}))
    misfits = [
        (extra, extra),
        (lacking, lacking),
        (narrow, narrow),
        (shallow, source),
        (hf_model("dense"), source),
        (other, other),
    ]
    paths = [*(hf_model(name) for name in MODELS), copy]
    ((logits, messages),) = run_distributed(run_one_rank, 1, paths, sequences, misfits)
    for path, found in zip(paths, logits, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
        assert expected.abs().max() > 1
        torch.testing.assert_close(found[:, :101], expected, atol=1e-4, rtol=0)
        assert not found[:, 101:].any()
    assert messages[0] == f"{extra}: weights and config.json disagree: unexpected tensor 'bias'"
    assert (
        messages[1] == f"{lacking}: weights and config.json disagree: tensor 'model.norm.weight' is missing"
    )
    assert messages[2].startswith(
        f"{narrow}: weights and config.json disagree: "
        "tensor 'model.layers.0.mlp.experts.0.gate_proj.weight': "
        "expected shape [16, 64] from config.json, found [32, 64]; "
    )
    assert "and 76 more" in messages[2]
    assert messages[3].startswith(
        f"{source}: 66 tensors belong to no parameter of the model, first 'model.layers.2."
    )
    assert "'decoder.layers.mlp.linear_fc1.weight', layer 0 has no" in messages[4]
    assert "'lm_head.weight'" in messages[5]
