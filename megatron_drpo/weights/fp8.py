"""The one FP8 block quantiser: e4m3 weights with one fp32 scale per block of 128 x 128, as in checkpoints.

Format of DeepSeek-V3 (arXiv 2412.19437, section 3.3) and the Qwen3-FP8 models, which SGLang and transformers
read: beside `X.weight` [R, C] in float8_e4m3fn lies `X.weight_scale_inv` [ceil(R / 128), ceil(C / 128)], and
the weight is their product, block by block. Blocks at the lower and right edge may be partial.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_drpo.errors import ModelError

BLOCK = 128
"""Rows and columns of a block."""

HF_SCALE_SUFFIX = "_scale_inv"
"""The scales of `X.weight` are called `X.weight_scale_inv`."""

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max  # 448

# A smaller scale would be subnormal, which GPUs flush to 0. Blocks that would have one, such as zero blocks,
# get this one, with an absolute error of at most 2^-136.
_MIN_SCALE = torch.finfo(torch.float32).tiny

# q, k, v, o, gate, up and down; DeepSeek's kv_a_proj_with_mqa too.
_QUANTIZED = re.compile(r"\.\w+_proj(?:_with_mqa)?\.weight")


def quantize_blockwise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to FP8; per block, its largest magnitude becomes 448, the largest of e4m3.

    A value differs from its dequantised one by at most 2^-4 of itself (half a step of a 3-bit mantissa), or,
    below 2^-6 / 448 of its block's maximum, by 2^-10 / 448 of that maximum. Takes fp32 copies of 128 rows.

    Args:
        weight: [R, C], any floating dtype; values are taken as fp32.

    Returns:
        weight_fp8: [R, C] float8_e4m3fn.
        scale_inv: [ceil(R / 128), ceil(C / 128)] fp32, normal numbers; 2^-126 for a block of zeros.

    Raises:
        ModelError: the matrix holds NaN or infinite values (their tensor is the caller's to name).
    """
    num_rows, num_columns = weight.shape
    weight_fp8 = torch.empty_like(weight, dtype=_FP8, memory_format=torch.contiguous_format)
    scale_inv = torch.empty(
        _num_blocks(num_rows), _num_blocks(num_columns), dtype=torch.float32, device=weight.device
    )
    for block, rows in _row_blocks(0, num_rows):
        values = weight[rows].to(torch.float32)
        # Of columns first: contiguous, and only a vector has to be padded to whole blocks.
        maxima = values.abs().amax(dim=0)
        maxima = torch.nn.functional.pad(maxima, (0, -num_columns % BLOCK)).view(-1, BLOCK).amax(dim=1)
        scale_inv[block] = maxima.div_(_FP8_MAX).clamp_(min=_MIN_SCALE)
        # At most 448 (1 + 2^-23), which rounds to 448: there is nothing to clamp.
        weight_fp8[rows] = (values / _spread(scale_inv[block], 0, num_columns)).to(_FP8)
    if not scale_inv.isfinite().all():  # a maximum keeps NaN and inf
        raise ModelError("NaN or infinite values cannot be quantised to FP8")
    return weight_fp8, scale_inv


def dequantize_blockwise(
    weight_fp8: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """The matrix, or a rectangle of it: each value times the scale of its block, in fp32, then rounded.

    Args:
        weight_fp8: [r, c] float8_e4m3fn, the rectangle.
        scale_inv: the whole matrix's scales, fp32 (or bf16, as Qwen3-FP8 has them).
        dtype: of the result.
        first_row, first_column: where in the whole matrix the rectangle begins; any number.

    Returns:
        [r, c] `dtype`.

    Raises:
        ModelError: another dtype than e4m3, the scales cover too few blocks, or a result is not finite.
    """
    if weight_fp8.dtype != _FP8:
        raise ModelError(f"expected FP8 values in float8_e4m3fn, found {weight_fp8.dtype}")
    num_rows, num_columns = weight_fp8.shape
    needed = [_num_blocks(first_row + num_rows), _num_blocks(first_column + num_columns)]
    if scale_inv.dim() != 2 or scale_inv.shape[0] < needed[0] or scale_inv.shape[1] < needed[1]:
        raise ModelError(f"expected FP8 scales of at least {needed} blocks, found {list(scale_inv.shape)}")
    result = torch.empty_like(weight_fp8, dtype=dtype, memory_format=torch.contiguous_format)
    is_finite = torch.ones((), dtype=torch.bool, device=result.device)
    for block, rows in _row_blocks(first_row, num_rows):
        scales = _spread(scale_inv[block].to(torch.float32), first_column, num_columns)
        result[rows] = _to_float32(weight_fp8[rows]).mul_(scales)
        is_finite &= result[rows].abs().amax().isfinite()
    if not is_finite:
        raise ModelError(f"FP8 values or scales are NaN or infinite, or too large for {dtype}")
    return result


def is_quantized(hf_name: str, shape: tuple[int, ...]) -> bool:
    """Whether a quantised folder holds this tensor in FP8.

    It does for the projections of attention, dense MLPs and experts. Not for embeddings, the LM head, norms,
    biases, and routers (`mlp.gate.weight`), whose rounding would change which experts are chosen.
    """
    return len(shape) == 2 and _QUANTIZED.search(hf_name) is not None


def quantization_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`quantization_config` of the config.json of a quantised folder.

    Args:
        shapes: HF name -> shape of all tensors of the model, scales left out. Its linear modules that are
            not quantised are listed one by one, as in Qwen3-30B-A3B-FP8: SGLang compares whole names.
    """
    kept = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and not is_quantized(name, shape) and "embed" not in name and "lm_head" not in name
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *kept],  # a tied head is a module too
    }


def check_quantization_config(section: object, source: str) -> None:
    """Accept exactly the format of this module.

    Args:
        section: `quantization_config` of a config.json, parsed.
        source: that file, for the message.

    Raises:
        ModelError: another method, value format, block size or activation scheme; names it.
    """
    if not isinstance(section, Mapping):
        raise ModelError(f"{source}: 'quantization_config' is {section!r}, expected an object")
    # transformers writes no `fmt`: e4m3 is the only one it knows.
    found = {
        "quant_method": section.get("quant_method"),
        "fmt": section.get("fmt", "e4m3"),
        "weight_block_size": section.get("weight_block_size"),
        "activation_scheme": section.get("activation_scheme", "dynamic"),
    }
    for key, expected in quantization_config({}).items():
        if key in found and found[key] != expected:
            raise ModelError(
                f"{source}: quantization_config.{key} = {found[key]!r} is not supported, only {expected!r}: "
                "give a folder in bf16, or in FP8 with blocks of 128 x 128"
            )


def _to_float32(weight_fp8: torch.Tensor) -> torch.Tensor:
    """`weight_fp8.to(torch.float32)` by way of fp16: on a CPU, torch's own cast takes one value at a time.

    Sign, exponent and mantissa of e4m3, put where fp16 has them, differ from it in the exponent's bias alone,
    by 8, subnormal numbers included.
    """
    bits = weight_fp8.contiguous().view(torch.int8).to(torch.int16)
    values = (bits << 7).bitwise_and_(~0x4000).view(torch.float16).to(torch.float32).mul_(2.0**8)
    return values.masked_fill_(values.abs() > _FP8_MAX, torch.nan)  # fp16 has a number there


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def _row_blocks(first_row: int, num_rows: int) -> Iterator[tuple[int, slice]]:
    """(block, rows) for a run of rows that begins at `first_row` of the matrix; rows count from the run."""
    row = 0
    while row < num_rows:
        block = (first_row + row) // BLOCK
        stop = min((block + 1) * BLOCK - first_row, num_rows)
        yield block, slice(row, stop)
        row = stop


def _spread(scales: torch.Tensor, first_column: int, num_columns: int) -> torch.Tensor:
    """[num_columns]: the scale of every column from `first_column` on."""
    return scales.repeat_interleave(BLOCK)[first_column : first_column + num_columns]
