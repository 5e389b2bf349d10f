"""From YAML files and the command line to a checked `Config`, and back to YAML."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import io
import os
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from functools import cache, reduce
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_drpo.config.limits import Section, cut, shown
from megatron_drpo.config.schema import Config
from megatron_drpo.errors import ConfigError

OTHER_NAMES = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "batch_size": "rollout.num_prompts_per_step",
    "cp": "parallel.context_parallel_size",
    "dataset": "data.train_path",
    "dp": "parallel.data_parallel_size",
    "ep": "parallel.expert_parallel_size",
    "epsilon_high": "algorithm.loss.clip_high",
    "epsilon_low": "algorithm.loss.clip_low",
    "etp": "parallel.expert_tensor_parallel_size",
    "evaluation": "eval",
    "generation": "rollout",
    "global_batch_size": "rollout.num_prompts_per_step",
    "grad_clip": "optimizer.clip_grad",
    "group_size": "rollout.num_samples_per_prompt",
    "kl_coef": "algorithm.kl.coef",
    "learning_rate": "optimizer.lr",
    "logging": "metrics",
    "max_completion_length": "rollout.max_response_tokens",
    "max_grad_norm": "optimizer.clip_grad",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_steps": "train.num_steps",
    "max_tokens": "rollout.max_response_tokens",
    "micro_batch_size": "policy.max_tokens_per_micro_batch",
    "model": "policy.model_path",
    "model_name": "policy.model_path",
    "model_name_or_path": "policy.model_path",
    "n_samples": "rollout.num_samples_per_prompt",
    "num_generations": "rollout.num_samples_per_prompt",
    "output_dir": "run_dir",
    "pp": "parallel.pipeline_parallel_size",
    "precision": "policy.dtype",
    "resume_from": "checkpoint.load_path",
    "reward_function": "reward.name",
    "sampling": "rollout",
    "save_interval": "checkpoint.save_every_steps",
    "save_steps": "checkpoint.save_every_steps",
    "steps": "train.num_steps",
    "tp": "parallel.tensor_parallel_size",
    "train_file": "data.train_path",
    "vpp": "parallel.virtual_pipeline_parallel_size",
    "warmup_steps": "optimizer.num_warmup_updates",
    "wd": "optimizer.weight_decay",
}
"""What other programs call a key -> the key."""


def load_config(argv: list[str]) -> Config:
    """Merge defaults < the YAML's `base:` < the YAML of `config=run.yaml` < `key.sub=value` arguments.

    Raises:
        ConfigError: all problems at once: unknown keys (with the nearest known one), wrong types,
            broken rules.
    """
    config, problems = read_config(argv)
    if problems:
        raise ConfigError(*problems)
    return config


def read_config(argv: list[str]) -> tuple[Config, list[str]]:
    """What `load_config` returns or complains of: the values that could be read, and every problem.

    Raises:
        ConfigError: a file or an argument cannot be read at all.
    """
    overrides = _parse_arguments(argv)
    files = _yaml_layers(_file_name("config", overrides.pop("config")), ()) if "config" in overrides else []
    layers = [*files, ("command line", overrides)]
    merged = copy.deepcopy(_defaults())
    problems: list[str] = []
    for source, layer in layers:
        for key, value in _leaves(layer):
            problem = _set(merged, key, value)
            if problem:
                problems.append(f"{problem} (in {source})")
    config = Config.__new__(Config)  # without __post_init__, which raises
    for f in dataclasses.fields(Config):
        try:
            value = merged[f.name]
            setattr(config, f.name, OmegaConf.to_object(value) if isinstance(value, DictConfig) else value)
        except OmegaConfBaseException as error:
            raise ConfigError(*problems, f"{error.full_key}: {_first_line(error)}") from None
        except RecursionError:
            raise ConfigError(*problems, f"{f.name}: a value in ${{...}} leads back to itself") from None
    misfits = _misfits(config)
    if misfits:  # a section cannot be asked about a value of another kind
        raise ConfigError(*problems, *misfits)
    config.expand_paths()
    return config, [*problems, *config.problems()]


def to_yaml(config: Config) -> str:
    """The resolved configuration, loadable again as `config=`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _parse_arguments(argv: list[str]) -> dict[str, Any]:
    for argument in argv:
        if "=" not in argument or argument.startswith("-"):
            raise ConfigError(
                f"argument {argument!r}: expected key.sub=value, for example train.num_steps=10"
            )
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(argv)))
    except _UNREADABLE as error:
        raise ConfigError(f"command line: {_first_line(error)}") from None


_UNREADABLE = (OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError, RecursionError)
"""What the parsers raise for text that is no YAML, is nested too deeply or holds an overlong integer."""


def _file_name(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}={shown(value)}: expected the path of a YAML file")
    return value


def _yaml_layers(name: str, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    path = Path(name)
    try:
        path = Path(os.path.expanduser(name))  # a null character is a ValueError
        text = path.read_bytes().decode("utf-8-sig")
        resolved = path.resolve()
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except FileNotFoundError:
        raise ConfigError(f"config={path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config={cut(name)}: cannot be read: {reason}") from None
    if resolved in seen:
        raise ConfigError(f"config={path}: its `base:` leads back to itself")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except _UNREADABLE as error:
        raise ConfigError(f"config={path}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config={path}: expected a mapping of keys, found {type(loaded).__name__}")
    layer = cast(dict[str, Any], loaded)
    base = layer.pop("base", None)
    below: list[tuple[str, dict[str, Any]]] = []
    if base is not None:
        name = os.path.expanduser(_file_name(f"config={path}: base", base))
        below = _yaml_layers(str(path.parent / name), (*seen, resolved))
    return [*below, (str(path), layer)]


@cache
def _defaults() -> DictConfig:
    """Never changed: a copy is made five times faster than another."""
    return OmegaConf.structured(Config)


@cache
def declared_types(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Key -> declared type, of sections too."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        found[f"{prefix}{name}"] = kind
        if _is_section(kind):
            found |= declared_types(kind, f"{prefix}{name}.")
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below sections; dict-typed fields and lists are leaves."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and _is_section(declared_types().get(key)):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _set(config: DictConfig, key: str, value: Any) -> str | None:
    """Set one leaf; the problem in words if that cannot be."""
    declared = declared_types().get(key)
    if declared is None:
        near = _suggest(key, is_section=isinstance(value, dict))
        return f"{cut(key)}: unknown key" + (f"; did you mean {near}?" if near else "")
    if _is_section(declared):
        inside = next(name for name in declared_types() if name.startswith(f"{key}."))
        return f"{key}={shown(value)}: {key} is a section; set its keys, for example {inside}=..."
    try:
        OmegaConf.update(config, key, value, merge=isinstance(value, dict))
    except (OmegaConfBaseException, OverflowError, TypeError, ValueError):
        return f"{key}={shown(value)}: expected {_in_words(declared)}"
    return None


def _misfits(config: Config) -> list[str]:
    """Lists and mappings that are something else: of what ${...} refers to, OmegaConf checks plain values
    alone."""
    problems = []
    for key, declared in declared_types().items():
        kind = typing.get_origin(declared)
        value = reduce(getattr, key.split("."), config) if kind in (list, dict) else None
        if kind in (list, dict) and not isinstance(value, kind):
            problems.append(f"{key}={shown(value)}: expected {_in_words(declared)}")
    return problems


def _suggest(key: str, *, is_section: bool) -> str | None:
    """The known key that is meant most likely, if any."""
    known = [name for name, kind in declared_types().items() if _is_section(kind) is is_section]
    last = key.rpartition(".")[2].lower().replace("-", "_")
    if last in OTHER_NAMES:
        return OTHER_NAMES[last]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, elsewhere or known, n=1, cutoff=0.0 if elsewhere else 0.6)
    return near[0] if near else None


def _in_words(declared: Any) -> str:
    """Of a declared type, what can be written."""
    if isinstance(declared, types.UnionType):
        return " or ".join(_in_words(kind) for kind in typing.get_args(declared))
    if isinstance(declared, type) and issubclass(declared, StrEnum):
        return f"one of {', '.join(declared)}"
    if typing.get_origin(declared) is list:
        elements = "whole numbers, " if typing.get_args(declared) == (int,) else ""
        return f"a list{' of ' if elements else ', '}{elements}in brackets: [...]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(declared, "null" if declared is type(None) else "a mapping, in braces: {name: value}")


def _first_line(error: Exception) -> str:
    return cut(next(iter(str(error).splitlines()), type(error).__name__))
