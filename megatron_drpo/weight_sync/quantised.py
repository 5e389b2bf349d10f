"""Servers with quantised weights are refused: they take what the trainer sends wrongly, in silence.

Such a server copies a bf16 tensor into e4m3 (or packed integers) and goes on with the scales it has, which
belong to other weights. All servers do it alike, so their checksums agree with each other. Quantised
key-value caches are another matter: they hold no weights.

Where SGLang says so: `quantization` and its kin in /server_info, `quantization_config` in the config.json of
the folder it serves.
https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/configs/model_config.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megatron_drpo.config.schema import Config, RolloutEngineName
from megatron_drpo.errors import ModelError, WeightSyncError
from megatron_drpo.fleet.build import starts_fleet
from megatron_drpo.weight_sync.client import ServerInfo
from megatron_drpo.weights.hf_folder import read_hf_config

_ARGUMENTS = ("quantization", "modelopt_quant", "torchao_config", "rl_quant_profile")
"""Of sglang.launch_server, as /server_info names them."""
_NONE = ("", "unquant")
"""Values that quantise nothing."""
_CONFIG_KEYS = ("quantization_config", "compression_config")
_MODELOPT_FILE = "hf_quant_config.json"
_MODEL_FLAGS = ("--model-path", "--model")
_WHY = "which would take the trainer's weights with scales of others"
_CONVERT = (
    "give a folder with bf16 weights; `python -m conversion.hf_to_megatron` and `python -m "
    "conversion.megatron_to_hf` make one of an FP8 folder"
)


def check_quantisation(config: Config) -> list[str]:
    """Why servers would have quantised weights, as sentences that say what to do."""
    rollout, folder = config.rollout, config.policy.model_path
    problems = []
    if starts_fleet(config) and rollout.engine is RolloutEngineName.sglang:
        arguments = rollout.sglang.arguments
        for name in _ARGUMENTS:
            flag = f"--{name.replace('_', '-')}"
            value = _flag_value(arguments, flag)
            if value is not None and value not in _NONE:
                problems.append(
                    f"rollout.sglang.arguments: {flag} {value} asks for a server with quantised weights, "
                    f"{_WHY}; leave it out"
                )
        other = next(filter(None, (_flag_value(arguments, flag) for flag in _MODEL_FLAGS)), None)
        if other is not None and (what := find_quantisation(other)):
            problems.append(
                f"rollout.sglang.arguments: {what}: servers would have quantised weights, {_WHY}; {_CONVERT}"
            )
    if what := find_quantisation(folder):
        problems.append(
            f"policy.model_path: {what}: servers would have quantised weights, {_WHY}; {_CONVERT}"
        )
    return problems


def refuse_quantised(info: ServerInfo, endpoint: str) -> None:
    """Nothing if the server holds weights as they are sent.

    Raises:
        WeightSyncError: it does not; says what it told of itself, and how to start it instead.
    """
    for name in _ARGUMENTS:
        value = info.arguments.get(name)
        if value is not None and value not in _NONE:
            raise WeightSyncError(
                f"{endpoint}/server_info: {name} is {value!r}: a server with quantised weights, {_WHY}; "
                f"start it without --{name.replace('_', '-')}"
            )
    folder = info.arguments.get("model_path")
    if isinstance(folder, str) and (what := find_quantisation(folder)):
        raise WeightSyncError(f"{endpoint}: serves {what}: its weights are quantised, {_WHY}; {_CONVERT}")


def find_quantisation(folder: str | Path) -> str:
    """The file of an HF folder that says its weights are quantised, and what it says; empty if none does, or
    if the folder cannot be read here."""
    folder = Path(folder)
    try:
        config = read_hf_config(folder)
    except (ModelError, OSError):
        return ""
    for key in _CONFIG_KEYS:
        section = config.value(key)
        if section is not None:
            method = section.get("quant_method") if isinstance(section, dict) else None
            return f"{folder / 'config.json'} has {key}" + (f" ({method})" if method else "")
    return f"{folder / _MODELOPT_FILE} exists" if (folder / _MODELOPT_FILE).is_file() else ""


def _flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, given as `--flag value` or `--flag=value`."""
    found = None
    for argument, following in pairwise([*arguments, ""]):
        name, is_joined, value = argument.partition("=")
        if name == flag:
            found = value if is_joined else following
    return found
