"""The one rule for folders whose config.json ties the output matrix to the embedding and that hold both.

An equal copy is fine: nobody needs it. Another matrix is an error everywhere, and not loaded untied:
transformers would serve it untied and SGLang would leave it out, so that the trainer and its servers would
have different models.
"""

from __future__ import annotations

from typing import BinaryIO

import torch

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfFolder

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_CHUNK_ELEMENTS = 2**22


def check_tied_head(folder: HfFolder) -> str | None:
    """Compare the values of the two matrices, up to the first difference.

    They are read from the files in chunks of 4 million values, not through memory maps.

    Returns:
        The name of the output matrix, a copy to be left out; None if there is none, or it is not tied.

    Raises:
        ModelError: the output matrix is not the embedding.
    """
    if not folder.config.get("tie_word_embeddings", bool, False):
        return None
    if HEAD not in folder or EMBEDDING not in folder:
        return None
    if folder.shape(HEAD) != folder.shape(EMBEDDING) or not _are_equal(folder):
        head, embedding = (folder.path / folder.info(name).shard for name in (HEAD, EMBEDDING))
        raise ModelError(
            f"{folder.path}: config.json says tie_word_embeddings, but {HEAD!r} (in {head}) is not "
            f"{EMBEDDING!r} (in {embedding}). If the model has an output matrix of its own, set "
            f'"tie_word_embeddings": false in config.json; if not, remove {HEAD!r} from its file'
        )
    return HEAD


def _are_equal(folder: HfFolder) -> bool:
    head, embedding = folder.info(HEAD), folder.info(EMBEDDING)
    left = torch.Size(head.shape).numel()
    with (folder.path / head.shard).open("rb") as one, (folder.path / embedding.shard).open("rb") as other:
        one.seek(head.offset)
        other.seek(embedding.offset)
        while left > 0:
            count = min(left, _CHUNK_ELEMENTS)
            first, second = _read(one, head.dtype, count), _read(other, embedding.dtype, count)
            if not _have_equal_values(first, second):
                return False
            left -= count
    return True


def _read(stream: BinaryIO, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(stream.read(count * dtype.itemsize)), dtype=dtype)


def _have_equal_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bits, so that NaN is equal to itself, or equal values, whatever the dtypes."""
    if first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
        return True
    return torch.equal(first.double(), second.double())
