"""The model's tokenizer and the tokens that end its responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_drpo.errors import ModelError


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except Exception as error:  # of a damaged file the libraries raise whatever they meet
        raise ModelError(f"{model_path}: no tokenizer can be loaded: {error}") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def read_stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ends of a response: `eos_token_id` of generation_config.json, of config.json, and the tokenizer's.

    Raises:
        ModelError: none of them names one; responses would never end.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        if file.is_file():
            value = json.loads(file.read_text()).get("eos_token_id")
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ModelError(
            f"{model_path}: no eos_token_id in generation_config.json, config.json or the tokenizer"
        )
    return sorted(found)
