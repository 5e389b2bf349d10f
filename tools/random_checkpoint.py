"""An HF folder of Qwen3-30B-A3B's shape with random bf16 weights, to time conversion and loading on.

    python tools/random_checkpoint.py FOLDER --layers 8     # 11 GB; all 48 layers: 61 GB

No model is built; memory holds two shards (`--shard-bytes`). Weights lie in +-[2^-7, 2^-5), norms in [1, 2):
finite, and of such size that the model runs. No two tensors are alike, to a hash or to a filesystem.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_drpo.models.registry import get_family
from megatron_drpo.weights.hf_folder import HfConfig, HfWriter

# Four bf16 numbers at once, each of sign (1 bit), exponent (8) and mantissa (7): the random bits that stay,
# and those that are set.
MATRIX_BITS = (0x80FF_80FF_80FF_80FF, 0x3C00_3C00_3C00_3C00)
NORM_BITS = (0x007F_007F_007F_007F, 0x3F80_3F80_3F80_3F80)


def random_bf16(shape: tuple[int, ...], source: np.random.SFC64) -> torch.Tensor:
    """A norm's weights if the shape has one dimension, else a matrix's."""
    num_elements = math.prod(shape)
    kept, constant = NORM_BITS if len(shape) == 1 else MATRIX_BITS
    words = source.random_raw(-(-num_elements // 4))
    words &= np.uint64(kept)
    words |= np.uint64(constant)
    return torch.from_numpy(words.view(np.int16)[:num_elements]).view(torch.bfloat16).view(shape)


def qwen3_moe_config(arguments: argparse.Namespace) -> dict[str, object]:
    """config.json; what no option changes is Qwen3-30B-A3B's."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": arguments.head_dim,
        "hidden_act": "silu",
        "hidden_size": arguments.hidden_size,
        "intermediate_size": 3 * arguments.hidden_size,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": arguments.expert_size,
        "norm_topk_prob": True,
        "num_attention_heads": arguments.heads,
        "num_experts": arguments.experts,
        "num_experts_per_tok": arguments.experts_per_token,
        "num_hidden_layers": arguments.layers,
        "num_key_value_heads": arguments.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": arguments.tied,
        "use_sliding_window": False,
        "vocab_size": arguments.vocab_size,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--expert-size", type=int, default=768, help="width of one expert")
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--tied", action="store_true", help="the embedding is the output matrix as well")
    parser.add_argument("--shard-bytes", type=int, default=10**9, help="of one safetensors file, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    config = qwen3_moe_config(arguments)
    parsed = HfConfig(config, "config.json")
    family = get_family(parsed)
    shapes = family.mapping(family.architecture(parsed)).hf_shapes
    source = np.random.SFC64(arguments.seed)
    num_bytes, told, start = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as described:
        (Path(described) / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        with HfWriter(
            arguments.folder,
            source=described,
            max_shard_bytes=arguments.shard_bytes,
            overwrite=arguments.overwrite,
        ) as writer:
            for name, shape in shapes.items():
                tensor = random_bf16(shape, source)
                writer.add(name, tensor)
                num_bytes += tensor.nbytes
                if num_bytes >= told + 5e9:
                    told = num_bytes
                    print(f"{num_bytes / 1e9:.0f} GB, {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"{arguments.folder}: {len(shapes):,} tensors, {num_bytes / 1e9:.1f} GB, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
