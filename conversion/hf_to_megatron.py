"""Convert a Hugging Face folder into a Megatron torch_dist checkpoint: no GPU, little memory, resumable.

    python -m conversion.hf_to_megatron models/Qwen3-30B-A3B checkpoints/qwen3-30b

Whatever interrupts it, the same command goes on where it stopped.
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
from conversion.to_megatron import ToMegatron, ToMegatronOptions
from megatron_drpo.weights.torch_dist_keys import KeyLayout


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command line; the exit status."""
    parser = build_parser(__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.add_argument(
        "--layout", type=KeyLayout, choices=list(KeyLayout), help="of keys; default: Megatron's own"
    )
    parser.add_argument(
        "--vocab-multiple",
        type=positive,
        default=128,
        help="pad the vocabulary to a multiple; Megatron-LM wants 128 x its tensor parallel size",
    )
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    options = ToMegatronOptions(
        layout=arguments.layout,
        dtype=DTYPES.get(arguments.dtype),
        vocab_multiple=arguments.vocab_multiple,
        unit_bytes=arguments.unit_mib * 2**20,
    )

    return run_command(
        lambda: convert_or_plan(ToMegatron(arguments.source, options), arguments), is_resumable=True
    )


if __name__ == "__main__":
    sys.exit(main())
