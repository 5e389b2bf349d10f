"""Convert a Megatron torch_dist checkpoint into a Hugging Face folder: no GPU, little memory, resumable.

    python -m conversion.megatron_to_hf checkpoints/qwen3-30b models/qwen3-30b
    python -m conversion.megatron_to_hf runs/math models/math --hf models/Qwen3-30B-A3B
    python -m conversion.megatron_to_hf runs/math models/math-fp8 --hf models/Qwen3-30B-A3B --fp8-blockwise

SOURCE is a checkpoint of any parallel layout: one that hf_to_megatron made, Megatron-LM's, or a run folder of
the trainer. Optimizer state is left out. Whatever interrupts it, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.command import (
    DTYPES,
    add_run_arguments,
    build_parser,
    convert_or_plan,
    positive,
    run_command,
)
from conversion.to_hf import ToHf, ToHfOptions
from megatron_drpo.weights.hf_folder import MAX_SHARD_BYTES


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command line; the exit status."""
    parser = build_parser(__doc__)
    parser.add_argument("source", type=Path, help="torch_dist checkpoint, or a folder of them")
    parser.add_argument("target", type=Path, help="Hugging Face folder to create")
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="its config.json and tokenizer; default: of the model that SOURCE was converted from",
    )
    parser.add_argument(
        "--fp8-blockwise",
        action="store_true",
        help="e4m3 weights with a scale per 128 x 128 block, as SGLang reads them",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=positive,
        default=MAX_SHARD_BYTES // 10**9,
        help="of a weights file; larger is slower: workers wait for each other; default: %(default)s",
    )
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    options = ToHfOptions(
        dtype=DTYPES.get(arguments.dtype),
        fp8_blockwise=arguments.fp8_blockwise,
        max_shard_bytes=arguments.max_shard_gb * 10**9,
        unit_bytes=arguments.unit_mib * 2**20,
    )

    return run_command(
        lambda: convert_or_plan(ToHf(arguments.source, arguments.hf, options), arguments), is_resumable=True
    )


if __name__ == "__main__":
    sys.exit(main())
