"""Weight updates under HF names against a freshly loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_drpo.embedded_server.runner import load_model
from megatron_drpo.embedded_server.weights import WeightStore, hf_views
from megatron_drpo.errors import ModelError, WeightSyncError
from megatron_drpo.weight_sync.checksum import compute_checksum

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(tiny_moe: Path) -> Tensors:
    return load_file(tiny_moe / "model.safetensors")


@pytest.fixture
def model(tiny_moe: Path) -> torch.nn.Module:
    return load_model(tiny_moe, torch.float32)


@pytest.fixture
def store(model: torch.nn.Module, tensors: Tensors) -> WeightStore:
    return WeightStore(model, tensors, "0")


def test_views_are_the_files_tensors(model: torch.nn.Module, tensors: Tensors) -> None:
    views = hf_views(model)
    assert views.keys() == tensors.keys()
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)


def test_a_committed_update_is_a_freshly_loaded_model(
    store: WeightStore, model: torch.nn.Module, tensors: Tensors, tmp_path: Path, tiny_moe: Path
) -> None:
    torch.manual_seed(1)
    new = {name: torch.randn_like(tensor) * 0.2 for name, tensor in tensors.items()}
    names = list(new)
    store.begin()
    store.stage([(name, new[name]) for name in names[20:]], "1")
    store.stage([(name, new[name]) for name in names[:20]], None)
    assert store.version == "0"
    store.commit()
    assert store.version == "1"
    assert store.checksums()[1] == compute_checksum(new.items())

    fresh = load_model(tiny_moe, torch.float32)
    fresh.load_state_dict(load_fused(fresh, new))
    ids = torch.tensor([[4, 5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)


def load_fused(model: torch.nn.Module, tensors: Tensors) -> Tensors:
    """The state dict of the fused model, stacked by hand."""
    state: Tensors = {}
    for name in model.state_dict():
        base = name.rpartition(".")[0]
        experts = range(4)
        if name.endswith("experts.gate_up_proj"):
            parts = [
                torch.cat([tensors[f"{base}.{e}.{kind}_proj.weight"] for kind in ("gate", "up")])
                for e in experts
            ]
            state[name] = torch.stack(parts)
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack([tensors[f"{base}.{e}.down_proj.weight"] for e in experts])
        else:
            state[name] = tensors[name]
    return state


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


BAD_UPDATES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "unknown name": (
        lambda t: {**t, "model.layers.9.norm": torch.zeros(1)},
        r"unknown tensor 'model\.layers\.9\.norm'",
    ),
    "wrong shape": (
        lambda t: {**t, EXPERT: t[EXPERT].T.contiguous()},
        r"experts\.3\.up_proj.*\(32, 16\).*\(16, 32\)",
    ),
    "wrong dtype": (lambda t: {**t, EXPERT: t[EXPERT].bfloat16()}, r"experts\.3\.up_proj.*bfloat16.*float32"),
    "missing expert": (
        lambda t: {name: tensor for name, tensor in t.items() if name != EXPERT},
        rf"1 tensors are missing, the first '{EXPERT}'",
    ),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_bad_update_changes_nothing(store: WeightStore, tensors: Tensors, kind: str) -> None:
    change, message = BAD_UPDATES[kind]
    before = store.checksums()
    store.begin()
    with pytest.raises(WeightSyncError, match=message):  # noqa: PT012 (either call may find it)
        store.stage(change({name: tensor + 1 for name, tensor in tensors.items()}).items(), "1")
        store.commit()
    assert store.version == "0"
    assert store.checksums() == before


def test_calls_out_of_order_are_refused(store: WeightStore, tensors: Tensors) -> None:
    with pytest.raises(WeightSyncError, match="begin_weight_update"):
        store.stage(tensors.items(), "1")
    with pytest.raises(WeightSyncError, match="begin_weight_update"):
        store.commit()
    store.begin()
    store.stage(tensors.items(), None)
    with pytest.raises(WeightSyncError, match="no weight_version"):
        store.commit()


def test_a_new_begin_drops_what_was_staged(store: WeightStore, tensors: Tensors) -> None:
    store.begin()
    store.stage(tensors.items(), "1")
    store.begin()
    with pytest.raises(WeightSyncError, match=f"{len(tensors)} tensors are missing"):
        store.commit()


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    store = WeightStore(model, tensors, "0")
    store.begin()
    store.stage([(name, torch.full_like(tensor, 0.5)) for name, tensor in tensors.items()], "1")
    store.commit()
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    assert head.weight.eq(0.5).all()


def test_a_family_with_other_expert_names_is_refused(model: torch.nn.Module, tensors: Tensors) -> None:
    renamed = [name.replace("gate_proj", "w1") for name in tensors]
    with pytest.raises(ModelError, match=r"gate_proj.*not supported"):
        WeightStore(model, renamed, "0")
