"""HF -> Megatron -> HF, bit for bit, and what Megatron itself makes of the checkpoints in between."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conversion import hf_to_megatron
from conversion.run import run_conversion
from conversion.to_hf import ToHf, ToHfOptions
from conversion.to_megatron import ToMegatron, ToMegatronOptions
from conversion.torch_dist_reader import TorchDistReader
from megatron_drpo.config.schema import ParallelConfig
from megatron_drpo.errors import CheckpointError, ConversionError, ModelError
from megatron_drpo.weights.fp8 import dequantize_blockwise, quantize_blockwise
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.torch_dist_keys import KeyLayout
from tools.tiny_model import write_tiny_moe

HOMOGENEOUS = ["dense_tied", "qwen2", "qwen2_tied", "llama", "llama_tied", "moe", "moe_bf16"]
MIXED = ["moe_mixed", "moe_sparse_step_tied"]
CASES = [(name, layout) for name in HOMOGENEOUS for layout in KeyLayout]
CASES += [(name, KeyLayout.per_layer) for name in MIXED]

LAYOUTS = {
    "tp2": ParallelConfig(tensor_parallel_size=2),
    "tp2sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "pp2": ParallelConfig(pipeline_parallel_size=2),
    "pp2vpp2": ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
    "ep2": ParallelConfig(expert_parallel_size=2, data_parallel_size=2),
}


def to_megatron(source: Path, target: Path, **options: Any) -> Path:
    run_conversion(ToMegatron(source, ToMegatronOptions(**options)), target, num_workers=1)
    return target


def to_hf(source: Path, target: Path, config_folder: Path | None = None, **options: Any) -> Path:
    run_conversion(ToHf(source, config_folder, ToHfOptions(**options)), target, num_workers=1)
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_round_trip(name: str, layout: KeyLayout, hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A vocabulary of 101, padded to 128 and trimmed again; config and tokenizer come along."""
    source = hf_model(name)
    checkpoint = to_megatron(source, tmp_path / "megatron", layout=layout)
    back = to_hf(checkpoint, tmp_path / "back")
    assert_same_bits(tensors_of(back), tensors_of(source))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((back / file).read_text()) == json.loads((source / file).read_text())
    reader = TorchDistReader(checkpoint)
    assert reader.tensors["embedding.word_embeddings.weight"].shape == (128, 64)
    assert not reader.read("embedding.word_embeddings.weight", (101, 0), (27, 64)).any()
    infix = "3." if layout is KeyLayout.per_layer else ""
    router = f"decoder.layers.{infix}mlp.router.weight"
    assert (router in reader.tensors) == name.startswith("moe")


def test_every_output_is_the_same_again(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever the number of workers."""
    checkpoints = [tmp_path / "one", tmp_path / "two"]
    for number, target in enumerate(checkpoints, 1):
        conversion = ToMegatron(hf_model("moe"), ToMegatronOptions(unit_bytes=100_000))
        run_conversion(conversion, target, num_workers=number)
    paths = [path for path in checkpoints[0].rglob("*") if path.is_file()]
    files = sorted(str(path.relative_to(checkpoints[0])) for path in paths)
    assert len(files) > 10
    same, different, absent = filecmp.cmpfiles(checkpoints[0], checkpoints[1], files, shallow=False)
    assert (same, different, absent) == (files, [], [])


@pytest.mark.timeout(60)
def test_a_process_that_has_used_threads_can_convert(tmp_path: Path) -> None:
    """Workers are forked, and OpenMP does not survive that: a cast in them would hang."""
    write_tiny_moe(tmp_path / "hf", num_layers=1, hidden_size=512)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.zeros(2**20).add_(1)
        target = to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=torch.bfloat16)
    finally:
        torch.set_num_threads(num_threads)
    assert TorchDistReader(target).tensors["output_layer.weight"].dtype == torch.bfloat16


def test_large_tensors_are_cut_and_files_sharded(
    hf_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a few rows; four files with an index that transformers reads."""
    monkeypatch.setattr("conversion.plan.PIECE_ELEMENTS", 500)
    source = hf_model("moe_mixed")
    checkpoint = to_megatron(source, tmp_path / "megatron")
    assert len(TorchDistReader(checkpoint).tensors["embedding.word_embeddings.weight"].chunks) == 19
    back = to_hf(checkpoint, tmp_path / "back", max_shard_bytes=300_000)
    assert_same_bits(tensors_of(back), tensors_of(source))
    files = {file.name for file in back.glob("*.safetensors")}
    assert files == {f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)}
    assert len(files) > 3
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(source).values())
    expected = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(back).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_casts(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """In either direction; config.json says so."""
    source = tensors_of(hf_model("moe"))
    checkpoint = to_megatron(hf_model("moe"), tmp_path / "bf16", dtype=torch.bfloat16)
    kept = to_hf(checkpoint, tmp_path / "kept")
    assert_same_bits(tensors_of(kept), {name: t.to(torch.bfloat16) for name, t in source.items()})
    assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16"
    half = to_hf(checkpoint, tmp_path / "half", dtype=torch.float16)
    rounded = {name: t.to(torch.bfloat16).to(torch.float16) for name, t in source.items()}
    assert_same_bits(tensors_of(half), rounded)
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"


def test_other_padding_of_the_vocabulary(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    for multiple, rows in [(1, 101), (384, 384)]:
        checkpoint = to_megatron(hf_model("llama"), tmp_path / f"by {multiple}", vocab_multiple=multiple)
        tensors = TorchDistReader(checkpoint).tensors
        assert tensors["output_layer.weight"].shape == tensors["embedding.word_embeddings.weight"].shape
        assert tensors["output_layer.weight"].shape == (rows, 64)
        back = to_hf(checkpoint, tmp_path / f"back {multiple}")
        assert_same_bits(tensors_of(back), tensors_of(hf_model("llama")))


def test_fp8(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Projections in e4m3 with their scales, the rest as it was; read again, it is as the quantiser says."""
    source = tensors_of(hf_model("moe_bf16"))
    checkpoint = to_megatron(hf_model("moe_bf16"), tmp_path / "megatron")
    quantised = to_hf(checkpoint, tmp_path / "fp8", fp8_blockwise=True)
    found = tensors_of(quantised)
    projections = {name for name in source if name.endswith("_proj.weight")}
    assert {name for name, t in found.items() if t.dtype == torch.float8_e4m3fn} == projections
    expected = {name: t for name, t in source.items() if name not in projections}
    dequantised = dict(expected)
    for name in projections:
        expected[name], expected[name + "_scale_inv"] = quantize_blockwise(source[name])
        dequantised[name] = dequantize_blockwise(
            expected[name], expected[name + "_scale_inv"], torch.bfloat16
        )
    assert_same_bits(found, expected)
    section = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert section["weight_block_size"] == [128, 128]
    assert "model.layers.0.mlp.gate" in section["modules_to_not_convert"]
    again = to_hf(to_megatron(quantised, tmp_path / "again"), tmp_path / "back")
    assert_same_bits(tensors_of(again), dequantised)
    config = json.loads((again / "config.json").read_text())
    assert config == json.loads((hf_model("moe_bf16") / "config.json").read_text())


def test_scales_of_another_shape(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """They would be taken for those of other blocks."""
    checkpoint = to_megatron(hf_model("qwen2"), tmp_path / "megatron")
    folder = to_hf(checkpoint, tmp_path / "fp8", fp8_blockwise=True)
    (folder / "conversion.json").unlink()
    tensors = tensors_of(folder)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    for scale in (tensors[name].repeat(1, 2), tensors[name].reshape(())):
        save_file({**tensors, name: scale.contiguous()}, folder / "model.safetensors")
        with pytest.raises(ModelError, match=rf"'{name}': expected shape \[1, 1\], found"):
            to_megatron(folder, tmp_path / "again")


def test_tied_models_with_a_copy_of_the_embedding(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The copy is left out; another matrix in its place is refused."""
    source = tmp_path / "source"
    megatron = to_megatron(hf_model("qwen2_tied"), tmp_path / "plain")
    to_hf(megatron, source)
    (source / "conversion.json").unlink()
    tensors = tensors_of(source)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, source / "model.safetensors")
    back = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "back")
    assert_same_bits(tensors_of(back), tensors)
    save_file({**tensors, "lm_head.weight": embedding + 1}, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"'lm_head\.weight' .+ is not 'model\.embed_tokens\.weight'"):
        to_megatron(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_refused(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="dense and MoE layers are mixed"):
        to_megatron(hf_model("moe_mixed"), tmp_path / "x", layout=KeyLayout.stacked)
    checkpoint = to_megatron(hf_model("moe"), tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=r"tensor 'decoder.layers.mlp.linear_fc1.weight' is missing"):
        to_hf(checkpoint, tmp_path / "x", config_folder=hf_model("dense"))
    with pytest.raises(ConversionError, match="is or holds"):
        to_hf(checkpoint, checkpoint)
    with pytest.raises(ConversionError, match="is or holds"):
        to_hf(checkpoint, tmp_path)
    with pytest.raises(ConversionError, match="already"):
        to_hf(checkpoint, hf_model("dense"))
    assert not (tmp_path / "x").exists()


def check_in_megatron(checkpoint: Path, source: Path, layouts: list[ParallelConfig]) -> list[list[str]]:
    """Problems per layout; on rank 0."""
    from conversion.check_megatron import compare_with_loader, compare_with_model

    if layouts[0].world_size == 1:
        return [compare_with_loader(checkpoint, source)]
    return [compare_with_model(checkpoint, source, layout) for layout in layouts]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "layout", "parallel"),
    [
        ("moe", KeyLayout.stacked, ["tp2sp", "pp2", "pp2vpp2", "ep2"]),
        ("moe", KeyLayout.per_layer, ["tp2sp", "pp2", "pp2vpp2", "ep2"]),
        ("moe_mixed", KeyLayout.per_layer, ["tp2sp", "pp2", "pp2vpp2", "ep2"]),
        ("moe_bf16", KeyLayout.stacked, ["ep2"]),
        ("qwen2_tied", KeyLayout.stacked, ["tp2", "pp2"]),
        ("llama", KeyLayout.per_layer, ["tp2", "pp2vpp2"]),
    ],
)
def test_megatron_loads_it(
    name: str,
    layout: KeyLayout,
    parallel: list[str],
    hf_model: Callable[[str], Path],
    run_distributed: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    """Megatron's own loader tensor by tensor on one rank; strictly into models on two."""
    checkpoint = to_megatron(hf_model(name), tmp_path / "megatron", layout=layout)
    place = TorchDistReader(checkpoint).path, hf_model(name)
    assert run_distributed(check_in_megatron, 1, *place, [ParallelConfig()])[0] == [[]]
    layouts = [LAYOUTS[name] for name in parallel]
    assert run_distributed(check_in_megatron, 2, *place, layouts)[0] == [[] for _ in layouts]


def save_training_checkpoint(source: Path, target: Path) -> None:
    """Weights and optimizer state of the trainer, one update later, on two ranks."""
    from megatron.core import dist_checkpointing

    from megatron_drpo.config.schema import Config, DataConfig, Dtype, PlatformName, PolicyConfig
    from megatron_drpo.platform.base import build_platform
    from megatron_drpo.policy.parallel import initialise_parallel
    from megatron_drpo.policy.policy import Policy

    parallel = LAYOUTS["ep2"]
    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(source), dtype=Dtype.fp32),
        parallel=parallel,
    )
    policy = Policy(config, platform, state)
    dist_checkpointing.save(policy.sharded_state(is_loading=False), str(target))
    policy.exporter.save(target.parent / "exported", source=source)


@pytest.mark.distributed
def test_a_checkpoint_of_the_trainer(
    hf_model: Callable[[str], Path], run_distributed: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Exported without its optimizer state, it is what the trainer's own exporter writes."""
    checkpoint = tmp_path / "step_000001"
    checkpoint.mkdir()
    run_distributed(save_training_checkpoint, 2, hf_model("moe"), checkpoint)
    reader = TorchDistReader(checkpoint)
    assert any(key.startswith("optimizer.state.exp_avg.") for key in reader.tensors)
    with pytest.raises(ConversionError, match=r"no config\.json there: give .* with --hf"):
        to_hf(checkpoint, tmp_path / "back")
    back = to_hf(checkpoint, tmp_path / "back", config_folder=hf_model("moe"))
    assert_same_bits(tensors_of(back), tensors_of(tmp_path / "exported"))
    assert HfFolder(back).keys() == HfFolder(hf_model("moe")).keys()


def test_casts_that_would_make_values_infinite(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """1e6 is beyond fp16, in either direction."""
    source = to_hf(to_megatron(hf_model("qwen2"), tmp_path / "plain"), tmp_path / "source")
    (source / "conversion.json").unlink()
    tensors = tensors_of(source)
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"'lm_head\.weight' has values too large for torch\.float16"):
        to_megatron(source, tmp_path / "x", dtype=torch.float16)
    checkpoint = to_megatron(source, tmp_path / "megatron")
    with pytest.raises(ModelError, match=r"'lm_head\.weight' has values too large for torch\.float16"):
        to_hf(checkpoint, tmp_path / "y", dtype=torch.float16)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_paths_with_brackets(
    hf_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes them for markup."""
    target = tmp_path / "a[red]b[/x]"
    assert hf_to_megatron.main([str(hf_model("dense")), str(target), "--dry-run"]) == 0
    assert hf_to_megatron.main([str(hf_model("dense")), str(target)]) == 0
    assert "b[/x] is complete; to check it: python -m conversion.verify '" in capsys.readouterr().out
