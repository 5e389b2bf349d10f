"""From YAML files and the command line to a checked `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_drpo.config import Config
from megatron_drpo.errors import ConfigError


def load_config(argv: list[str]) -> Config:
    """Merge defaults < the YAML's `base:` < the YAML of `config=run.yaml` < `key.sub=value` arguments.

    Raises:
        ConfigError: all problems at once: unknown keys (with the nearest known one), wrong types,
            broken rules.
    """
    overrides = _parse_arguments(argv)
    path = overrides.pop("config", None)
    layers = [*(_yaml_layers(Path(str(path)), ()) if path else []), ("command line", overrides)]
    merged = OmegaConf.structured(Config)
    problems: list[str] = []
    for source, layer in layers:
        for key, value in _leaves(layer, Config):
            problem = _set(merged, key, value)
            if problem:
                problems.append(f"{problem} (in {source})")
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    except OmegaConfBaseException as error:
        raise ConfigError(*problems, f"{error.full_key}: {_first_line(error)}") from None
    if problems:
        raise ConfigError(*problems)
    return config


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
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"command line: {_first_line(error)}") from None


def _yaml_layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ConfigError(f"config={path}: no such file")
    if path.resolve() in seen:
        raise ConfigError(f"config={path}: its `base:` leads back to itself")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"config={path}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config={path}: expected a mapping of keys, found {type(loaded).__name__}")
    layer = cast(dict[str, Any], loaded)
    base = layer.pop("base", None)
    below = _yaml_layers(path.parent / str(base), (*seen, path.resolve())) if base else []
    return [*below, (str(path), layer)]


def _leaves(node: dict[str, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below sections; dict-typed fields and lists are leaves."""
    sections = {
        f.name: f.default_factory
        for f in dataclasses.fields(schema)
        if dataclasses.is_dataclass(f.default_factory)
    }
    for name, value in node.items():
        section = sections.get(name)
        if isinstance(value, dict) and section is not None:
            yield from _leaves(value, cast(type, section), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _set(config: DictConfig, key: str, value: Any) -> str | None:
    """Set one leaf; the problem in words if that cannot be."""
    known = [name for name, _ in _leaves(dataclasses.asdict(_unchecked()), Config)]
    if key not in known:
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            return f"{key}={value!r}: {key} is a section; set its keys, for example {inside[0]}=..."
        sections = {name.rpartition(".")[0] for name in known} - {""}
        near = difflib.get_close_matches(key, [*sections, *known] if isinstance(value, dict) else known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    try:
        OmegaConf.update(config, key, value, merge=isinstance(value, dict))
    except OmegaConfBaseException as error:
        return f"{key}={value!r}: {_first_line(error)}"
    return None


def _unchecked() -> Config:
    """The defaults, without the rules: two keys have no default that obeys them."""
    config = Config.__new__(Config)
    for f in dataclasses.fields(Config):
        value = f.default if f.default is not dataclasses.MISSING else cast(Any, f.default_factory)()
        setattr(config, f.name, value)
    return config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
