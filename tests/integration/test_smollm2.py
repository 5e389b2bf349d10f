"""A pretrained model, SmolLM2-135M-Instruct, on layouts that only its 9 heads and 30 layers allow."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conversion.run import run_conversion
from conversion.to_hf import ToHf, ToHfOptions
from conversion.to_megatron import ToMegatron, ToMegatronOptions
from megatron_drpo.batching.packing import pack
from megatron_drpo.config.schema import (
    Config,
    DataConfig,
    Dtype,
    LogprobBackend,
    ParallelConfig,
    PlatformName,
    PolicyConfig,
)
from megatron_drpo.data.tokenizer import load_tokenizer, read_stop_token_ids
from megatron_drpo.errors import ModelError
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import build_platform
from megatron_drpo.types import MicroBatch, TrainSequence
from megatron_drpo.weights.hf_folder import HfFolder

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(400)]

PP2 = ParallelConfig(pipeline_parallel_size=2)
PP3 = ParallelConfig(pipeline_parallel_size=3)
TP3 = ParallelConfig(tensor_parallel_size=3)
TP3_SP = ParallelConfig(tensor_parallel_size=3, sequence_parallel=True)

CHATS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 7 + 5?", "To add 7 and 5, you simply add them together: 7 + 5 = 12."),
    (
        "Write a haiku about rivers.",
        "Silver thread of rain,\nit carries the mountain down\nto the patient sea.\n\n(Syllables: 5, 7, 5.)",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tools/smollm2.py makes, in fp32."""
    pytest.importorskip("gguf")
    from tools.smollm2 import find_gguf, write_folder

    scratch = tmp_path_factory.mktemp("smollm2")
    try:
        gguf = find_gguf(scratch)
    except ModelError as error:
        pytest.skip(str(error))
    write_folder(gguf, scratch / "model")
    return scratch / "model"


@pytest.fixture(scope="module")
def converted(smollm2: Path) -> Path:
    """The same as a torch_dist checkpoint."""
    target = smollm2.with_name("megatron")
    run_conversion(ToMegatron(smollm2, ToMegatronOptions()), target)
    return target


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> transformers.LlamaForCausalLM:
    """The model in transformers."""
    return transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def chat_ids(smollm2: Path, question: str) -> torch.Tensor:
    """[1, L]: up to where the assistant speaks."""
    tokenizer = load_tokenizer(str(smollm2))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return torch.tensor([tokenizer(text)["input_ids"]])


def test_the_folder_is_complete(smollm2: Path) -> None:
    """Published numbers: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json."""
    config = HfFolder(smollm2).config
    arch = get_family(config).architecture(config)
    assert (arch.num_layers, arch.num_attention_heads, arch.num_query_groups) == (30, 9, 3)
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size) == (576, 1536, 49152)
    assert (arch.rope_theta, arch.norm_eps, arch.tie_word_embeddings) == (1e5, 1e-5, True)
    assert not config.has("quantization_config")
    tokenizer = load_tokenizer(str(smollm2))
    assert read_stop_token_ids(str(smollm2), tokenizer) == [2]
    assert tokenizer.decode([2]) == "<|im_end|>"
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    # A digit is a token, and takes no space before it along.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  57")["input_ids"]) == ["a", "ĠĠ", "5", "7"]


def test_it_speaks_english(smollm2: Path, reference: Any) -> None:
    """Greedily, in answer to a question, and it ends its answer."""
    prompt = chat_ids(smollm2, CHATS[0][0])
    generated = reference.generate(prompt, max_new_tokens=20, do_sample=False)
    answer = load_tokenizer(str(smollm2)).decode(generated[0, prompt.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_round_trip(smollm2: Path, converted: Path, tmp_path: Path) -> None:
    """HF -> Megatron -> HF, bit for bit."""
    run_conversion(ToHf(converted, None, ToHfOptions()), tmp_path / "back")
    original, back = HfFolder(smollm2), HfFolder(tmp_path / "back")
    assert original.keys() == back.keys()
    for name in original:
        assert torch.equal(back.get(name).view(torch.int32), original.get(name).view(torch.int32)), name
    assert load_tokenizer(str(tmp_path / "back")).chat_template == load_tokenizer(str(smollm2)).chat_template


def make_batch(smollm2: Path) -> MicroBatch:
    """The chats, packed; the answers are the responses."""
    tokenizer = load_tokenizer(str(smollm2))
    sequences = []
    for number, (question, answer) in enumerate(CHATS):
        prompt = chat_ids(smollm2, question)[0]
        response = torch.tensor(tokenizer(answer + "<|im_end|>")["input_ids"])
        zeros = torch.zeros(len(response))
        sequences.append(
            TrainSequence(
                id=number,
                token_ids=torch.cat([prompt, response]),
                prompt_length=len(prompt),
                advantages=zeros,
                rollout_logprobs=zeros,
                loss_mask=torch.ones(len(response), dtype=torch.bool),
            )
        )
    return pack(sequences, [s.advantages for s in sequences], pad_to_multiple=6)


@torch.no_grad()
def differences(
    path: Path, checkpoint: Path, parallel: ParallelConfig, batch: MicroBatch, expected: Path
) -> tuple[float, float]:
    """Largest absolute difference to `expected` of this rank's logits and of the op's logprobs; 0 before the
    last stage."""
    from conversion.check_megatron import LogitsForward
    from megatron_drpo.policy.forward import ForwardSettings, LogprobForward
    from megatron_drpo.policy.kernels import build_row_kernels
    from megatron_drpo.policy.logprobs import LogprobSettings
    from megatron_drpo.policy.model import build_model_chunks, build_transformer_config
    from megatron_drpo.policy.parallel import check_layout, initialise_parallel
    from megatron_drpo.policy.schedule import run_schedule
    from megatron_drpo.weights.load_megatron import load_megatron_weights

    platform = build_platform(PlatformName.cpu)
    state = initialise_parallel(parallel, "gloo", platform.prepare(0))
    folder = HfFolder(path)
    family = get_family(folder.config)
    arch = family.architecture(folder.config)
    assert check_layout(parallel, arch) == []
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(path), dtype=Dtype.fp32),
        parallel=parallel,
    )
    chunks = build_model_chunks(
        build_transformer_config(config, arch, platform), arch, platform, state.device
    )
    load_megatron_weights(chunks, checkpoint, family.mapping(arch))
    settings = ForwardSettings(
        logprobs=LogprobSettings(
            vocab_size=arch.vocab_size,
            group=state.tensor_group,
            buffer_bytes=2**20,
            kernels=build_row_kernels(LogprobBackend.torch, state.device),
        ),
        temperature=1.0,
        sequence_parallel=parallel.sequence_parallel,
        one_pass=False,
    )
    arguments: dict[str, Any] = {"forward_only": True, "collect_non_loss_data": True}
    forward = LogitsForward(sequence_parallel=parallel.sequence_parallel)
    logits = run_schedule(forward, chunks, [batch], state.device, **arguments)
    logprobs = run_schedule(LogprobForward(settings), chunks, [batch], state.device, **arguments)
    if not state.is_last_stage:
        return 0.0, 0.0
    wanted_TV = torch.load(expected)
    rows_N = batch.loss_mask_T.nonzero()[:, 0]
    wanted_N = wanted_TV.log_softmax(-1)[rows_N, batch.labels_T[rows_N]]
    found_TV = logits[0][: len(wanted_TV), : arch.vocab_size]
    return (
        (found_TV - wanted_TV).abs().max().item(),
        (logprobs[0][rows_N] - wanted_N).abs().max().item(),
    )


def differences_of_all(
    path: Path, checkpoint: Path, layouts: list[ParallelConfig], batch: MicroBatch, expected: Path
) -> list[tuple[float, float]]:
    return [differences(path, checkpoint, parallel, batch, expected) for parallel in layouts]


@pytest.mark.parametrize("layouts", [[PP2], [TP3, TP3_SP, PP3]], ids=["two ranks", "three ranks"])
def test_logits_and_logprobs_are_those_of_transformers(
    smollm2: Path,
    converted: Path,
    reference: transformers.LlamaForCausalLM,
    run_distributed: Callable[..., list[Any]],
    tmp_path: Path,
    layouts: list[ParallelConfig],
) -> None:
    """Of the converted checkpoint, in fp32, each sequence as if it were alone.

    Measured: 7e-5 for logits, 2e-5 for logprobs.
    """
    batch = make_batch(smollm2)
    bounds = batch.cu_seqlens.tolist()
    sequences = [batch.token_ids_T[start:stop] for start, stop in itertools.pairwise(bounds)]
    with torch.no_grad():
        expected = torch.cat([reference(s[None]).logits[0] for s in sequences[: len(CHATS)]])
    assert expected.abs().max() > 20
    torch.save(expected, tmp_path / "expected.pt")
    ranks = run_distributed(
        differences_of_all,
        layouts[0].world_size,
        smollm2,
        converted,
        layouts,
        batch,
        tmp_path / "expected.pt",
        timeout_s=300.0,
    )
    for index, layout in enumerate(layouts):
        logits, logprobs = (max(values) for values in zip(*(rank[index] for rank in ranks), strict=True))
        assert 0 < logits < 1e-3, layout
        assert 0 < logprobs < 1e-3, layout
