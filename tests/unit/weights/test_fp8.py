"""Block quantisation against a float64 reference that goes block by block, and against transformers."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.fp8 import (
    BLOCK,
    check_quantization_config,
    dequantize_blockwise,
    is_quantized,
    quantization_config,
    quantize_blockwise,
)

E4M3 = torch.float8_e4m3fn
BYTES = torch.arange(256).to(torch.uint8).view(E4M3)
SHAPES = [(1, 1), (1, 300), (128, 128), (127, 129), (129, 127), (256, 384), (300, 1), (391, 517)]


def e4m3_value(byte: int) -> float:
    """By the definition of the format: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


E4M3_VALUES = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)


def blocks(shape: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[slice, slice]]]:
    """(index of the block, its rows and columns)."""
    return [
        ((i, j), (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)))
        for i, j in itertools.product(range((shape[0] + 127) // 128), range((shape[1] + 127) // 128))
    ]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers; magnitudes differ between blocks and columns, so that a wrong scale is seen."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.exp(2 * torch.randn(shape[1], generator=generator))
    for _, block in blocks(shape):
        weight[block] *= float(torch.exp(3 * torch.randn((), generator=generator)))
    return weight.to(dtype)


def reference_dequantize(weight_fp8: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    values = E4M3_VALUES[weight_fp8.view(torch.uint8).long()]
    for index, block in blocks((weight_fp8.shape[0], weight_fp8.shape[1])):
        values[block] *= scale_inv[index].double()
    return values


def assert_nearest(weight: torch.Tensor, weight_fp8: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """No e4m3 value is nearer to w / scale than the chosen one, but for fp32's rounding of that quotient."""
    table = E4M3_VALUES[E4M3_VALUES.isfinite()].unique()
    for index, block in blocks((weight.shape[0], weight.shape[1])):
        scaled = weight[block].double() / scale_inv[index].double()
        chosen = E4M3_VALUES[weight_fp8[block].view(torch.uint8).long()]
        upper = torch.searchsorted(table, scaled.contiguous()).clamp(1, len(table) - 1)
        best = torch.minimum((table[upper] - scaled).abs(), (scaled - table[upper - 1]).abs())
        assert bool(((chosen - scaled).abs() <= best + 2**-23 * scaled.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype).clamp(-6e4, 6e4)
    weight_fp8, scale_inv = quantize_blockwise(weight)
    assert (weight_fp8.dtype, weight_fp8.shape, scale_inv.dtype) == (E4M3, weight.shape, torch.float32)
    assert scale_inv.shape == ((shape[0] + 127) // 128, (shape[1] + 127) // 128)
    for index, block in blocks(shape):
        expected = weight[block].double().abs().max() / 448
        assert scale_inv[index] == expected.float()
        assert weight_fp8[block].float().abs().max() == 448
    assert_nearest(weight, weight_fp8, scale_inv)
    exact = reference_dequantize(weight_fp8, scale_inv)
    for out in (torch.float32, torch.bfloat16):
        found = dequantize_blockwise(weight_fp8, scale_inv, out)
        assert found.dtype == out
        assert torch.equal(found, exact.float().to(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_round_trip_error(dtype: torch.dtype, seed: int) -> None:
    """Half a step of a 3-bit mantissa, 2^-4 of the value; below e4m3's smallest normal, half its last."""
    weight = matrix((391, 517), dtype, seed)
    weight_fp8, scale_inv = quantize_blockwise(weight)
    found = dequantize_blockwise(weight_fp8, scale_inv, torch.float32)
    for _, block in blocks((391, 517)):
        exact = weight[block].double()
        error = (found[block].double() - exact).abs()
        bound = torch.maximum(2**-4 * exact.abs(), 2**-10 / 448 * exact.abs().max()) * (1 + 1e-6)
        assert bool((error <= bound).all())
        assert error.max() <= 2**-4 * exact.abs().max()
        assert (error / exact.abs()).median() > 0.01, "the bound is not far away"


@given(
    rows=st.integers(1, 270),
    columns=st.integers(1, 270),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-118, 100),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_runs_and_repetition(rows: int, columns: int, seed: int, exponent: int, data: st.DataObject) -> None:
    """Any rectangle dequantises as in the whole; quantising the result again changes no bit."""
    weight = matrix((rows, columns), seed=seed).clamp(-1e6, 1e6) * 2.0**exponent
    weight_fp8, scale_inv = quantize_blockwise(weight)
    whole = dequantize_blockwise(weight_fp8, scale_inv, torch.float32)
    row = data.draw(st.integers(0, rows - 1))
    num_rows = data.draw(st.integers(1, rows - row))
    column = data.draw(st.integers(0, columns - 1))
    num_columns = data.draw(st.integers(1, columns - column))
    rectangle = (slice(row, row + num_rows), slice(column, column + num_columns))
    part = dequantize_blockwise(
        weight_fp8[rectangle], scale_inv, torch.float32, first_row=row, first_column=column
    )
    assert torch.equal(part, whole[rectangle])
    again_fp8, again_scale = quantize_blockwise(whole)
    assert torch.equal(again_scale, scale_inv)
    assert torch.equal(again_fp8.view(torch.uint8), weight_fp8.view(torch.uint8))


@pytest.mark.parametrize(("first", "last"), [(0, 391), (1, 2), (127, 129), (5, 391), (128, 256), (200, 390)])
def test_row_runs(first: int, last: int) -> None:
    weight_fp8, scale_inv = quantize_blockwise(matrix((391, 130)))
    expected = reference_dequantize(weight_fp8, scale_inv)[first:last].float()
    found = dequantize_blockwise(weight_fp8[first:last], scale_inv, torch.float32, first_row=first)
    assert torch.equal(found, expected)


def test_zero_blocks() -> None:
    """Their scale divides and multiplies without harm, also where subnormal numbers are flushed to zero."""
    weight = torch.zeros(256, 200)
    weight[130, 150] = 3.0
    weight_fp8, scale_inv = quantize_blockwise(weight)
    assert scale_inv.tolist() == [[2.0**-126, 2.0**-126], [2.0**-126, torch.tensor(3.0 / 448).item()]]
    assert torch.equal(dequantize_blockwise(weight_fp8, scale_inv, torch.float32), weight)
    assert bool((weight_fp8.view(torch.uint8) == 0).sum() == weight.numel() - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values(dtype: torch.dtype) -> None:
    """One block of the largest numbers, one of the smallest normal ones, one of subnormal ones."""
    finfo = torch.finfo(dtype)
    subnormal = 2.0**-133  # bf16's and fp32's exponents end alike, at 2^-126
    weight = torch.zeros(2, 384, dtype=dtype)
    weight[0, :3] = torch.tensor([finfo.max, -finfo.max, finfo.max / 3])
    weight[0, 128:131] = torch.tensor([finfo.tiny, -finfo.tiny, finfo.tiny / 2])
    weight[0, 256:258] = torch.tensor([subnormal, -3 * subnormal])
    weight_fp8, scale_inv = quantize_blockwise(weight)
    assert bool((scale_inv.isfinite() & (scale_inv >= 2.0**-126)).all())
    found = dequantize_blockwise(weight_fp8, scale_inv, dtype)
    assert found[0, :2].tolist() == [finfo.max, -finfo.max]
    assert float(found[0, 2]) == pytest.approx(finfo.max / 3, rel=2**-4)
    error = (found[:, 128:].double() - weight[:, 128:].double()).abs()
    assert error.max() <= 2.0**-136
    again = quantize_blockwise(found)
    assert torch.equal(again[1], scale_inv)
    assert torch.equal(again[0].view(torch.uint8), weight_fp8.view(torch.uint8))


def test_every_fp8_value() -> None:
    finite = BYTES[E4M3_VALUES.isfinite()][None]
    found = dequantize_blockwise(finite, torch.ones(1, 2), torch.float32)
    assert torch.equal(found[0].double(), E4M3_VALUES[E4M3_VALUES.isfinite()])
    assert torch.equal(found.signbit(), finite.float().signbit()), "-0 stays -0"
    for byte in (0x7F, 0xFF):
        with pytest.raises(ModelError, match="NaN"):
            dequantize_blockwise(BYTES[None, byte : byte + 1], torch.ones(1, 1), torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [(0, 0), (150, 299), (129, 5)])
def test_non_finite_values_are_refused(value: float, dtype: torch.dtype, where: tuple[int, int]) -> None:
    weight = matrix((151, 300), dtype)
    weight[where] = value
    with pytest.raises(ModelError, match=r"^NaN or infinite values cannot be quantised to FP8$"):
        quantize_blockwise(weight)


def test_what_cannot_be_dequantised_is_refused() -> None:
    weight_fp8, scale_inv = quantize_blockwise(matrix((200, 300)))
    with pytest.raises(ModelError, match=r"at least \[2, 3\] blocks, found \[1, 3\]"):
        dequantize_blockwise(weight_fp8, scale_inv[:1], torch.float32)
    with pytest.raises(ModelError, match=r"at least \[3, 3\] blocks, found \[2, 3\]"):
        dequantize_blockwise(weight_fp8, scale_inv, torch.float32, first_row=57)
    with pytest.raises(ModelError, match=r"at least \[2, 3\] blocks, found \[6\]"):
        dequantize_blockwise(weight_fp8, scale_inv.flatten(), torch.float32)
    with pytest.raises(ModelError, match=r"found torch\.float8_e5m2"):
        dequantize_blockwise(weight_fp8.to(torch.float8_e5m2), scale_inv, torch.float32)
    with pytest.raises(ModelError, match=r"too large for torch\.float16"):
        dequantize_blockwise(weight_fp8, torch.full_like(scale_inv, 2.0**10), torch.float16)
    with pytest.raises(ModelError, match="NaN or infinite"):
        dequantize_blockwise(weight_fp8, scale_inv / 0, torch.bfloat16)


def test_input_may_be_strided_and_is_not_changed() -> None:
    weight = matrix((300, 260))
    before = weight.clone()
    transposed = quantize_blockwise(weight.T)
    plain = quantize_blockwise(weight.T.contiguous())
    assert torch.equal(transposed[0].view(torch.uint8), plain[0].view(torch.uint8))
    assert torch.equal(transposed[1], plain[1])
    columns = dequantize_blockwise(transposed[0][:, ::2], transposed[1], torch.float32)
    assert columns.shape == (260, 150)
    assert torch.equal(weight, before)


@pytest.mark.distributed
def test_memory_is_bounded(run_distributed: Callable[..., list[Any]]) -> None:
    """Beside a matrix of 64 MiB and its result, no more than some rows of blocks."""
    ((quantising, dequantising),) = run_distributed(peaks, 1)
    mib = 2**20
    assert quantising < 32 * mib + 24 * mib
    assert dequantising < 64 * mib + 24 * mib


def peaks() -> tuple[int, int]:
    """Growth of the process's peak memory by either direction, in bytes."""
    quantize_blockwise(torch.ones(256, 256))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    weight = torch.ones(16384, 2048, dtype=torch.bfloat16)
    start = peak()
    weight_fp8, scale_inv = quantize_blockwise(weight)
    middle = peak()
    dequantize_blockwise(weight_fp8, scale_inv, torch.bfloat16)
    return middle - start, peak() - middle


# ------------------------------------------------------------------------------------- transformers


def test_transformers_reads_the_same_numbers() -> None:
    """It wants whole blocks, or one partial block in a dimension."""
    for shape in ((256, 384), (128, 128), (32, 64)):
        weight_fp8, scale_inv = quantize_blockwise(matrix(shape))
        theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight_fp8, scale_inv, torch.bfloat16)
        assert torch.equal(theirs, dequantize_blockwise(weight_fp8, scale_inv, torch.bfloat16))


NAMES = {
    "model.embed_tokens.weight": (512, 256),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.q_proj.bias": (256,),
    "model.layers.0.self_attn.k_proj.weight": (128, 256),
    "model.layers.0.self_attn.o_proj.weight": (256, 256),
    "model.layers.0.self_attn.q_norm.weight": (64,),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 256),
    "model.layers.0.mlp.gate_proj.weight": (512, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
    "model.layers.1.mlp.gate.weight": (8, 256),
    "model.layers.1.mlp.gate.e_score_correction_bias": (8,),
    "model.layers.1.mlp.shared_expert_gate.weight": (1, 256),
    "model.layers.1.mlp.shared_expert.up_proj.weight": (128, 256),
    "model.layers.1.mlp.experts.7.down_proj.weight": (256, 128),
    "model.norm.weight": (256,),
    "lm_head.weight": (512, 256),
}
QUANTIZED = {
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.shared_expert.up_proj.weight",
    "model.layers.1.mlp.experts.7.down_proj.weight",
}


def test_what_is_quantised() -> None:
    assert {name for name, shape in NAMES.items() if is_quantized(name, shape)} == QUANTIZED


def test_config_of_a_quantised_folder() -> None:
    config = quantization_config(NAMES)
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [
            "lm_head",
            "model.layers.1.mlp.gate",
            "model.layers.1.mlp.shared_expert_gate",
        ],
    }
    check_quantization_config(config, "config.json")


def test_transformers_quantises_the_same_modules() -> None:
    """Of a model with the linear layers above, it makes FP8 layers of those that the folder has in FP8."""
    model = torch.nn.Module()
    for name, shape in NAMES.items():
        # transformers takes a module called `experts` for one with fused weights.
        module, kind = name.replace(".experts.", ".each_expert.").rsplit(".", 1)
        if kind == "weight" and len(shape) == 2 and "embed" not in name:
            parent = model
            for part in module.split(".")[:-1]:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(module.split(".")[-1], torch.nn.Linear(shape[1], shape[0], bias=False))
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} - {
        name.replace(".experts.", ".each_expert.").removesuffix(".weight") for name in QUANTIZED
    }
    config = FineGrainedFP8Config(**quantization_config(NAMES))
    replace_with_fp8_linear(model, config.modules_to_not_convert, config, pre_quantized=True)
    left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert left == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method = 'gptq' is not supported, only 'fp8'"),
        ({"quant_method": None}, "quant_method = None is not supported"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported, only 'e4m3'"),
        (
            {"weight_block_size": [1, 32]},
            r"weight_block_size = \[1, 32\] is not supported, only \[128, 128\]",
        ),
        ({"weight_block_size": None}, "weight_block_size = None is not supported"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static' is not supported, only 'dynamic'"),
    ],
)
def test_other_formats_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        check_quantization_config(quantization_config({}) | changes, "model/config.json")
    assert str(error.value).startswith("model/config.json: ")


def test_configs_that_are_read() -> None:
    """transformers' own, and one that is no object."""
    check_quantization_config(FineGrainedFP8Config().to_dict() | {"weight_block_size": [128, 128]}, "here")
    with pytest.raises(ModelError, match="here: 'quantization_config' is 'fp8', expected an object"):
        check_quantization_config("fp8", "here")
