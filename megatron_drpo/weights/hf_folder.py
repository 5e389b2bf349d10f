"""Hugging Face model folders: config.json, tokenizer and safetensors, read lazily and written in a stream.

No Megatron and no transformers here. The index of a sharded folder:
https://huggingface.co/docs/transformers/big_models#sharded-checkpoints.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.safetensors_header import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder without any of these has no tokenizer."""

COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""What `HfWriter` takes over from its source folder, as glob patterns."""

MAX_SHARD_BYTES = 2 * 10**9
"""Of a weights file, by default."""

T = TypeVar("T", bool, int, float, str)


class HfConfig:
    """Typed access to a config.json; a missing or mistyped key is a ModelError naming file and key."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        """
        Args:
            values: the parsed JSON object.
            source: the file it came from, for messages.
        """
        self._values = values
        self.source = source

    def has(self, *keys: str) -> bool:
        """Whether all keys are present; JSON null counts as absent, as in transformers."""
        return all(self._values.get(key) is not None for key in keys)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`; an absent one is `default`, or an error without a default."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.source}: {key!r} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.source}: {key!r} is {value!r}, expected {kind.__name__}")
        return value

    def get_ints(self, key: str) -> list[int]:
        """The list of integers at `key`; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise ModelError(f"{self.source}: {key!r} is {value!r}, expected a list of integers")
        return value

    def value(self, key: str) -> object:
        """Whatever JSON value `key` has; None when absent."""
        return self._values.get(key)

    def section(self, key: str) -> "HfConfig":
        """The JSON object at `key`."""
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {key!r} is {value!r}, expected an object")
        return HfConfig(value, f"{self.source}: {key}")


class HfFolder:
    """A complete HF folder opened for reading.

    Opening reads config.json, the index and the header of every shard; tensor bytes are read on demand.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ModelError: the folder cannot be used; names every problem found.
        """
        self.path = Path(path)
        problems, config, tensors = _scan(self.path)
        if problems:
            raise ModelError("\n".join(problems))
        self.config = config
        self._tensors = tensors
        self._open_shards: dict[str, Any] = {}

    def keys(self) -> KeysView[str]:
        """Names of all tensors, in file order."""
        return self._tensors.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and shard of a tensor, from the headers alone."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: no tensor {name!r}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._shard_of(name).get_tensor(name)

    def get_slice(self, name: str, *index: slice) -> torch.Tensor:
        """The part of a tensor selected by one slice per leading dimension; only its bytes are read."""
        return self._shard_of(name).get_slice(name)[index]

    def _shard_of(self, name: str) -> Any:
        shard = self.info(name).shard
        if shard not in self._open_shards:
            self._open_shards[shard] = safe_open(self.path / shard, framework="pt", device="cpu")
        return self._open_shards[shard]


def check_hf_folder(path: str | Path) -> list[str]:
    """Everything that makes a folder unusable, one sentence each; empty when it is complete.

    Finds a missing or unreadable config.json, no weights, missing and truncated shards, and tensors that
    the index lists but their shard lacks. Reads headers only.
    """
    return _scan(Path(path))[0]


# ------------------------------------------------------------------------------------------- scanning

_Scan = tuple[list[str], HfConfig, dict[str, TensorInfo]]


def _scan(path: Path) -> _Scan:
    empty = HfConfig({}, str(path / "config.json"))
    if not path.is_dir():
        return [f"{path}: no such folder; give a Hugging Face model folder"], empty, {}
    problems: list[str] = []
    config = empty
    try:
        config = read_hf_config(path)
    except ModelError as error:
        problems.append(str(error))
    try:
        listed = _listed_shards(path)
    except ModelError as error:
        return [*problems, str(error)], config, {}
    tensors: dict[str, TensorInfo] = {}
    for shard, names in listed.items():
        try:
            found = read_header(path / shard)
        except ModelError as error:
            problems.append(str(error))
            continue
        problems.extend(
            f"{path / shard}: tensor {name!r} is listed in {INDEX_FILE} but absent here"
            for name in names
            if name not in found
        )
        tensors.update(found)
    return problems, config, tensors


def read_hf_config(path: Path) -> HfConfig:
    """config.json of a folder; ModelError if it is missing or no JSON object."""
    file = path / "config.json"
    return HfConfig(_read_json_object(file), str(file))


def _listed_shards(path: Path) -> dict[str, list[str]]:
    """Shard file -> the tensors that the index says it has (none listed for a single file)."""
    if (path / SINGLE_FILE).is_file():  # takes precedence, as in transformers
        return {SINGLE_FILE: []}
    if (path / INDEX_FILE).is_file():
        weight_map = _read_json_object(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path / INDEX_FILE}: no 'weight_map'")
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise ModelError(f"{path / INDEX_FILE}: the file of tensor {name!r} is {shard!r}")
            shards.setdefault(shard, []).append(name)
        return shards
    raise ModelError(f"{path}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_json_object(file: Path) -> dict[str, object]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return values


# -------------------------------------------------------------------------------------------- writing


class HfWriter:
    """Writes an HF folder tensor by tensor, holding at most one shard in memory.

    Everything goes into a hidden sibling folder that gets the final name when the `with` block ends well, so
    the final name never holds half a model, whatever happens. One file if all fits into one shard,
    otherwise numbered shards and an index.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source: str | Path,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            path: the folder to create.
            source: the HF folder whose config and tokenizer files are copied; its `dtype` becomes the
                one that most bytes have here.
            max_shard_bytes: a shard is closed before it would exceed this; one larger tensor stays alone.
            metadata: further string pairs for the header of each file.
            overwrite: replace an existing folder, at the end.
        """
        self.path = Path(path)
        self._source = Path(source)
        self._max_shard_bytes = max_shard_bytes
        self._metadata = {"format": "pt", **(metadata or {})}
        self._overwrite = overwrite
        self._folder = self.path.with_name(f".{self.path.name}.partial")
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._dtype_bytes: Counter[torch.dtype] = Counter()

    def __enter__(self) -> Self:
        if self.path.exists() and not self._overwrite:
            raise ModelError(f"{self.path}: exists already; remove it or choose another folder")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        copy_config_files(self._source, self._folder)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of any device; its present values are copied."""
        if name in self._names:
            raise ModelError(f"{self.path}: tensor {name!r} was already written")
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._write_shard()
        self._names.add(name)
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._dtype_bytes[tensor.dtype] += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_shard()
                self._name_shards()
                update_config(self._folder, self._dtype_bytes.most_common(1)[0][0])
                replace_folder(self._folder, self.path)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}.safetensors"

    def _write_shard(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, self._shard_path(len(self._shards)), metadata=self._metadata)
        self._total_bytes += self._pending_bytes
        self._pending.clear()
        self._pending_bytes = 0

    def _name_shards(self) -> None:
        """Final file names hold the number of shards, which is known only now."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = shard_file(number, count)
            self._shard_path(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_index(self._folder, weight_map, self._total_bytes)


def copy_config_files(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer from one HF folder to another (`COPIED_FILES`)."""
    for pattern in COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def shard_file(number: int, count: int) -> str:
    """Name of the weights file `number` (from 1) of `count`."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a sharded folder; a single file needs none."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def update_config(
    folder: Path, dtype: torch.dtype, quantization_config: Mapping[str, object] | None = None
) -> None:
    """Have a folder's config.json say what its weights are now: their dtype, and how they are quantised."""
    file = folder / "config.json"
    values = json.loads(file.read_text("utf-8"))
    new = {key: value for key, value in values.items() if key != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in values else "dtype"  # before and since transformers 5
    if key in new:
        new[key] = str(dtype).removeprefix("torch.")
    if quantization_config is not None:
        new["quantization_config"] = dict(quantization_config)
    if new != values:
        file.write_text(json.dumps(new, indent=2) + "\n", "utf-8")


def replace_folder(new: Path, path: Path) -> None:
    """Give a finished folder its final name; one that had it before goes only then."""
    replaced = replaced_path(path)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    new.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def replaced_path(path: Path) -> Path:
    """Where `replace_folder` has the old folder for a moment; a kill can leave it there."""
    return path.with_name(f".{path.name}.replaced")
