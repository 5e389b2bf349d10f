"""From the lines of a prompt file to rendered, tokenised prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from megatron_drpo.config import DataConfig, Mode, OnBadLine, OnLongPrompt
from megatron_drpo.data.jsonl import BadLine, PromptLine, describe_bad_line, read_lines
from megatron_drpo.errors import DataError
from megatron_drpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """The usable prompts of a file, in its order, and how many lines are not among them."""

    prompts: list[Prompt]
    num_bad_lines: int
    """Skipped because they are broken (`data.on_bad_line=skip`)."""
    num_long_prompts: int
    """Dropped because they exceed `data.max_prompt_tokens` (`data.on_long_prompt=drop`)."""


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    *,
    needs_answer: bool = False,
) -> PromptFile:
    """Read, render and tokenise a prompt file.

    `messages`, and with `data.apply_chat_template` also `prompt`, go through the tokenizer's chat template,
    which writes special tokens itself; other prompts are tokenised with the tokenizer's default special
    tokens.

    Args:
        needs_answer: whether a line without an `answer` is broken.

    Raises:
        DataError: the file cannot be read or has no usable prompt; a line is broken or a prompt too long,
            and the configuration says to stop; a chat template is needed and the tokenizer has none.
    """
    try:
        lines = list(read_lines(path, mode, needs_answer=needs_answer))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    results = _tokenise([_render(path, line, config, tokenizer) for line in lines], tokenizer)
    bad_lines = [result for result in results if isinstance(result, BadLine)]
    prompts = [result for result in results if isinstance(result, Prompt)]
    long_prompts = [prompt for prompt in prompts if len(prompt.token_ids) > config.max_prompt_tokens]
    if bad_lines and config.on_bad_line is OnBadLine.error:
        raise DataError(f"{describe_bad_line(path, bad_lines[0])} (data.on_bad_line=skip skips such lines)")
    if long_prompts and config.on_long_prompt is OnLongPrompt.error:
        first = long_prompts[0]
        raise DataError(
            f"{path} line {first.id + 1}: the prompt has {len(first.token_ids)} tokens, more than "
            f"data.max_prompt_tokens={config.max_prompt_tokens} (data.on_long_prompt=drop drops such prompts)"
        )
    if len(long_prompts) == len(prompts):
        raise DataError(
            f"{path}: no usable prompt: {len(bad_lines)} lines are broken, {len(long_prompts)} prompts are "
            f"longer than data.max_prompt_tokens={config.max_prompt_tokens}"
        )
    return PromptFile(
        prompts=[prompt for prompt in prompts if len(prompt.token_ids) <= config.max_prompt_tokens],
        num_bad_lines=len(bad_lines),
        num_long_prompts=len(long_prompts),
    )


@dataclass(frozen=True, slots=True)
class _Rendered:
    line: PromptLine
    text: str
    templated: bool


def _render(
    path: str | Path, line: PromptLine | BadLine, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> _Rendered | BadLine:
    """The text the policy sees."""
    if isinstance(line, BadLine):
        return line
    if line.prompt is not None and not config.apply_chat_template:
        return _Rendered(line, line.prompt, templated=False)
    if tokenizer.chat_template is None:
        reason = "`messages`" if line.prompt is None else "data.apply_chat_template=true"
        raise DataError(
            f"{path} line {line.index + 1}: {reason} needs a chat template, and the tokenizer in "
            f"{tokenizer.name_or_path!r} has none; give `prompt` text with data.apply_chat_template=false"
        )
    messages = line.messages or [{"role": "user", "content": line.prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return BadLine(index=line.index, problem=f"expected messages the chat template accepts: {error}")
    return _Rendered(line, cast(str, text), templated=True)


def _tokenise(
    results: list[_Rendered | BadLine], tokenizer: PreTrainedTokenizerBase
) -> list[Prompt | BadLine]:
    """Rendered lines to prompts, in at most two calls: chat templates write special tokens themselves."""
    token_ids: dict[int, list[int]] = {}
    for templated in (False, True):
        batch = [r for r in results if isinstance(r, _Rendered) and r.templated is templated]
        if batch:
            encoded = tokenizer(
                [rendered.text for rendered in batch],
                add_special_tokens=not templated,
                return_attention_mask=False,
                verbose=False,  # no warning about long prompts: they are counted
            )
            token_ids.update(zip([r.line.index for r in batch], encoded["input_ids"], strict=True))
    return [_to_prompt(r, token_ids[r.line.index]) if isinstance(r, _Rendered) else r for r in results]


def _to_prompt(rendered: _Rendered, token_ids: list[int]) -> Prompt | BadLine:
    line = rendered.line
    if not token_ids:
        return BadLine(index=line.index, problem="expected a prompt of at least one token, found none")
    return Prompt(
        id=line.index,
        text=rendered.text,
        token_ids=tuple(token_ids),
        answer=line.answer,
        response=line.response,
        metadata=line.metadata,
    )
