"""From the lines of a prompt file to rendered, tokenised prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from megatron_drpo.config.schema import DataConfig, Mode, OnBadLine, OnLongPrompt
from megatron_drpo.data.jsonl import BadLine, PromptLine, describe_bad_line, read_lines
from megatron_drpo.errors import DataError
from megatron_drpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROBLEMS_SHOWN = 5

FindAnswerProblems = Callable[[Sequence[str]], dict[str, str]]
"""Those of some ground truths that the reward can do nothing with, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """The usable prompts of a file, in its order, and how many lines are not among them."""

    prompts: list[Prompt]
    bad_lines: list[BadLine]
    """Skipped because they are broken (`data.on_bad_line=skip`)."""
    num_long_prompts: int
    """Dropped because they exceed `data.max_prompt_tokens` (`data.on_long_prompt=drop`)."""

    @property
    def left_out(self) -> str | None:
        """How many lines are not used and why, in words; None if all are."""
        parts = []
        if self.bad_lines:
            first = self.bad_lines[0]
            which = f"the first is line {first.index + 1}: {first.problem}"
            parts.append(f"{len(self.bad_lines)} broken lines are skipped, {which}")
        if self.num_long_prompts:
            parts.append(f"{self.num_long_prompts} prompts over data.max_prompt_tokens are dropped")
        return "; ".join(parts) or None


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    *,
    needs_answer: bool = False,
    vocab_size: int | None = None,
    find_answer_problems: FindAnswerProblems | None = None,
) -> PromptFile:
    """Read, render and tokenise a prompt file.

    `messages`, and with `data.apply_chat_template` also `prompt`, go through the tokenizer's chat template,
    which writes special tokens itself, with the line's `tools` and `chat_template_kwargs` or those of the
    configuration; other prompts are tokenised with the tokenizer's default special tokens, a beginning of
    sequence that they write themselves counted.

    Args:
        needs_answer: whether a line without an `answer` is broken.
        vocab_size: of the model; a line with a token that it does not have is broken. None: not looked at.
        find_answer_problems: a line with such an answer is broken. None: not looked at.

    Raises:
        DataError: the file cannot be read or has no usable prompt; a line is broken or a prompt too long,
            and the configuration says to stop; a chat template is needed and the tokenizer has none.
    """
    try:
        lines = _read_lines(path, mode, needs_answer, find_answer_problems)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    rendered = [_render(path, line, config, tokenizer) for line in lines]
    results = _tokenise(rendered, tokenizer, mode, vocab_size)
    problems = _find_problems(path, config, results)
    if problems:
        if config.on_bad_line is OnBadLine.error and any(isinstance(result, BadLine) for result in results):
            problems.append("data.on_bad_line=skip skips broken lines")
        raise DataError("\n".join(problems))
    prompts = [result for result in results if isinstance(result, Prompt)]
    kept = [prompt for prompt in prompts if not _is_long(prompt, config)]
    return PromptFile(
        prompts=kept,
        bad_lines=[result for result in results if isinstance(result, BadLine)],
        num_long_prompts=len(prompts) - len(kept),
    )


def check_prompt_file(
    path: str | Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    mode: Mode,
    *,
    needs_answer: bool = False,
    vocab_size: int | None = None,
    room: int | None = None,
    find_answer_problems: FindAnswerProblems | None = None,
) -> list[str]:
    """Why `load_prompts` would refuse a file, or a server one of its prompts; one sentence each.

    Without a tokenizer prompts are neither rendered nor tokenised: what only that can tell is not told. Other
    arguments as for `load_prompts`.

    Args:
        room: tokens that a prompt may have beside its response.
    """
    if not Path(path).is_file():
        return [f"{path}: no such file; expected a JSONL file of prompts"]
    try:
        lines = _read_lines(path, mode, needs_answer, find_answer_problems)
        if tokenizer is None:
            return _find_problems(path, config, lines)
        rendered = [_render(path, line, config, tokenizer) for line in lines]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    except DataError as error:
        return [str(error)]
    results = _tokenise(rendered, tokenizer, mode, vocab_size)
    longest = max(
        (result for result in results if isinstance(result, Prompt) and not _is_long(result, config)),
        key=lambda prompt: len(prompt.token_ids),
        default=None,
    )
    problems = _find_problems(path, config, results)
    if room is not None and longest is not None and len(longest.token_ids) > room:
        problems.append(
            f"{path} line {longest.id + 1}: the prompt has {len(longest.token_ids)} tokens, but "
            f"rollout.max_response_tokens leaves room for {room}; ask for shorter responses, or leave such "
            f"prompts out with data.max_prompt_tokens={room}"
        )
    return problems


def _read_lines(
    path: str | Path, mode: Mode, needs_answer: bool, find_answer_problems: FindAnswerProblems | None
) -> list[PromptLine | BadLine]:
    """Every line that is not blank, its ground truth looked at."""
    lines = list(read_lines(path, mode, needs_answer=needs_answer))
    if find_answer_problems is None:
        return lines
    answers = [line.answer for line in lines if isinstance(line, PromptLine) and line.answer is not None]
    problems = find_answer_problems(answers)
    return [
        BadLine(index=line.index, problem=problems[line.answer])
        if isinstance(line, PromptLine) and line.answer in problems
        else line
        for line in lines
    ]


def _find_problems(
    path: str | Path, config: DataConfig, results: Sequence[Prompt | PromptLine | BadLine]
) -> list[str]:
    """Why a run must not start with these lines, one sentence each."""
    if not results:
        return [f"{path}: the file is empty; expected one JSON object per line"]
    bad_lines = [result for result in results if isinstance(result, BadLine)]
    long_prompts = [result for result in results if isinstance(result, Prompt) and _is_long(result, config)]
    names_bad_lines = bool(bad_lines) and config.on_bad_line is OnBadLine.error
    problems = []
    if len(bad_lines) + len(long_prompts) == len(results) and not names_bad_lines:
        problems.append(
            f"{path}: no usable prompt: {len(bad_lines)} lines are broken, {len(long_prompts)} prompts are "
            f"longer than data.max_prompt_tokens={config.max_prompt_tokens}"
        )
    if problems or names_bad_lines:
        problems += [describe_bad_line(path, line) for line in bad_lines[:MAX_PROBLEMS_SHOWN]]
        if len(bad_lines) > MAX_PROBLEMS_SHOWN:
            problems.append(
                f"{path}: {len(bad_lines)} of {len(results)} lines are broken; the first are listed above"
            )
    if long_prompts and config.on_long_prompt is OnLongPrompt.error:
        first = long_prompts[0]
        problems.append(
            f"{path} line {first.id + 1}: the prompt has {len(first.token_ids)} tokens, more than "
            f"data.max_prompt_tokens={config.max_prompt_tokens} (data.on_long_prompt=drop drops such prompts)"
        )
    return problems


def _is_long(prompt: Prompt, config: DataConfig) -> bool:
    return len(prompt.token_ids) > config.max_prompt_tokens


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
        unused = _template_input(line, config)
        if unused is not None:
            problem = f"expected `messages`, or data.apply_chat_template=true, for {unused}: found plain text"
            return BadLine(index=line.index, problem=problem)
        return _Rendered(line, line.prompt, templated=False)
    if tokenizer.chat_template is None:
        reason = "`messages`" if line.prompt is None else "data.apply_chat_template=true"
        raise DataError(
            f"{path} line {line.index + 1}: {reason} needs a chat template, and the tokenizer in "
            f"{tokenizer.name_or_path!r} has none; give `prompt` text with data.apply_chat_template=false"
        )
    messages: list[dict[str, Any]] = line.messages or [{"role": "user", "content": line.prompt}]
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    tools: list[Any] | None = config.tools if line.tools is None else line.tools
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools or None,  # templates ask whether there are any, in both ways
            tokenize=False,
            add_generation_prompt=True,
            **{**config.chat_template_kwargs, **line.chat_template_kwargs},
        )
    except Exception as error:  # noqa: BLE001  a template is a program, which may raise anything
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        return BadLine(index=line.index, problem=f"expected messages the chat template accepts: {reason}")
    return _Rendered(line, cast(str, text), templated=True)


def _template_input(line: PromptLine, config: DataConfig) -> str | None:
    """The name of something that only a chat template can make use of; None if there is nothing."""
    given: dict[str, object] = {
        "`tools`": line.tools,
        "`chat_template_kwargs`": line.chat_template_kwargs,
        "data.system_prompt": config.system_prompt,
        "data.tools": config.tools,
        "data.chat_template_kwargs": config.chat_template_kwargs,
    }
    return next((name for name, value in given.items() if value), None)


def _tokenise(
    results: list[_Rendered | BadLine],
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    vocab_size: int | None,
) -> list[Prompt | BadLine]:
    """Rendered lines to prompts, in a few calls: chat templates write special tokens themselves."""
    rendered = [result for result in results if isinstance(result, _Rendered)]
    tokens: dict[int, list[int] | str] = {}
    for templated in (False, True):
        batch = [r for r in rendered if r.templated is templated]
        encoded = _encode([r.text for r in batch], tokenizer, add_special_tokens=not templated)
        for r, outcome in zip(batch, encoded, strict=True):
            checked = _check_tokens("prompt", outcome, vocab_size)
            if not isinstance(checked, str):
                checked = _without_second_bos(r.text, checked, tokenizer)
            tokens[r.line.index] = checked
    if mode is Mode.sft:
        encoded = _encode([r.line.response or "" for r in rendered], tokenizer, add_special_tokens=False)
        for r, outcome in zip(rendered, encoded, strict=True):
            checked = _check_tokens("response", outcome, vocab_size)
            if isinstance(checked, str):
                tokens[r.line.index] = checked
    return [r if isinstance(r, BadLine) else _to_prompt(r, tokens[r.line.index]) for r in results]


def _without_second_bos(text: str, token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the beginning-of-sequence token that the tokenizer puts before the text's own."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if not bos or not text.startswith(bos):
        return token_ids
    num_written = 1
    while text.startswith(bos, num_written * len(bos)):
        num_written += 1
    return token_ids[1:] if token_ids[: num_written + 1] == [bos_id] * (num_written + 1) else token_ids


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> list[list[int] | str]:
    """Of each text the token ids, or why there are none."""
    if not texts:
        return []
    options: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "verbose": False,  # no warning about long prompts: they are counted
    }
    try:
        return tokenizer(texts, **options)["input_ids"]
    except Exception as error:  # noqa: BLE001  one text is to blame, and the tokenizer does not say which
        if len(texts) == 1:
            return [f"{type(error).__name__}: {error}"]
    outcomes: list[list[int] | str] = []
    for text in texts:
        outcomes += _encode([text], tokenizer, add_special_tokens=add_special_tokens)
    return outcomes


def _check_tokens(what: str, encoded: list[int] | str, vocab_size: int | None) -> list[int] | str:
    """The token ids of a text, or why it cannot be used."""
    if isinstance(encoded, str):
        return f"expected a {what} that the tokenizer accepts: {encoded}"
    if not encoded:
        return f"expected a {what} of at least one token, found none"
    if vocab_size is not None and max(encoded) >= vocab_size:
        found = f"a {what} with the id {max(encoded)}"
        return f"expected token ids in 0..{vocab_size - 1}, found {found}: the tokenizer is another model's"
    return encoded


def _to_prompt(rendered: _Rendered, tokens: list[int] | str) -> Prompt | BadLine:
    line = rendered.line
    if isinstance(tokens, str):
        return BadLine(index=line.index, problem=tokens)
    return Prompt(
        id=line.index,
        text=rendered.text,
        token_ids=tuple(tokens),
        answer=line.answer,
        response=line.response,
        metadata=line.metadata,
    )
