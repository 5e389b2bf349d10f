"""What trainer and servers must have alike to be in one NCCL communicator (weight_sync.path=distributed)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_drpo.config.schema import Config, Mode, PlatformName, RolloutEngineName, WeightSyncPath
from megatron_drpo.fleet.build import starts_fleet
from megatron_drpo.fleet.nccl_environment import NVLS_FLAG, SYMMETRIC_FLAG, build_nccl_environment
from megatron_drpo.weight_sync import nccl_version
from megatron_drpo.weight_sync.path import Failures, Server

_SCRIPT = Path(nccl_version.__file__)
_ASK_S = 120.0
"""For an interpreter to import torch from a cold disk."""
_MISMATCH = re.compile(r"Mismatched NCCL version detected : rank \d+ version (\d+) rank \d+ version (\d+)")
"""NCCL's words; the second version is the speaker's.
https://github.com/NVIDIA/nccl/blob/master/src/init.cc, initTransportsRank
"""


def find_unlike(servers: Sequence[Server], environ: Mapping[str, str]) -> Failures:
    """The servers whose arguments set the two variables otherwise than they are here."""
    failures: Failures = {}
    for server in servers:
        flags = {"enable_symm_mem": SYMMETRIC_FLAG, "enable_nccl_nvls": NVLS_FLAG}
        arguments = [flag for name, flag in flags.items() if server.info.arguments.get(name)]
        wanted = build_nccl_environment(arguments, environ)
        unlike = {name: value for name, value in wanted.items() if environ.get(name, "0") != value}
        if unlike:
            told = " ".join(f"{name}={value}" for name, value in unlike.items())
            failures[server.endpoint] = (
                f"{server.endpoint}: was started with {' '.join(arguments)}, which sets {told}: start the "
                "trainer's ranks with the same in their environment, or the server without"
            )
    return failures


@dataclass(frozen=True, slots=True)
class Nccl:
    """Of one environment."""

    version: int
    """As NCCL counts."""
    cuda: str | None
    """Of its torch."""


def find_own() -> Nccl | None:
    """None where torch has none."""
    version = nccl_version.loaded_version()
    return None if version is None else Nccl(version, nccl_version.cuda_version())


def find_other(python: str) -> Nccl | str:
    """Of the environment of an interpreter; a sentence if it cannot say."""
    silent = "it could not be asked for its version of NCCL: "
    command = [python, "-P", str(_SCRIPT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{silent}{error}"
    try:
        told = json.loads(done.stdout)
        version, cuda = told["nccl"], told["cuda"]
    except (ValueError, KeyError, TypeError):
        return silent + (done.stderr.strip() or "no output").splitlines()[-1]
    return "its torch has no NCCL" if version is None else Nccl(version, cuda)


def check_nccl(config: Config) -> list[str]:
    """Whether the servers that the run starts can be in one communicator with the trainer; asks their
    interpreter, which takes some seconds."""
    on_cpu = config.platform is PlatformName.cpu or (
        config.platform is PlatformName.auto and not torch.cuda.is_available()
    )
    uses_nccl = config.weight_sync.path is WeightSyncPath.distributed and not on_cpu
    python = config.rollout.sglang.python
    is_ours = starts_fleet(config) and config.rollout.engine is RolloutEngineName.sglang
    if config.train.mode is not Mode.rl or not uses_nccl or not is_ours or not Path(python).is_file():
        return []
    own, other = find_own(), find_other(python)
    key = f"weight_sync.path=distributed with rollout.sglang.python={python}"
    if own is None:
        return [f"{key}: the trainer's torch, {torch.__version__}, has no NCCL"]
    if isinstance(other, str):
        return [f"{key}: {other}"]
    return [] if own.version == other.version else [f"{key}: {_advise(own, other)}"]


def explain(error: RuntimeError) -> str:
    """What torch.distributed says of a failure here, with what to install where NCCL's versions differ."""
    found = _MISMATCH.search(str(error))
    if found is None:
        return str(error)
    other, own = map(int, found.groups())
    return f"{error}. {_advise(Nccl(own, nccl_version.cuda_version()), Nccl(other, None))}"


def _advise(own: Nccl, other: Nccl) -> str:
    """The older side takes the newer one's: NCCL stays compatible with torch builds for older ones."""
    older, newer = sorted((own, other), key=lambda side: side.version)
    where = "the trainer's" if older is own else "the servers'"
    package = f"nvidia-nccl-cu{(older.cuda or '12').partition('.')[0]}=={_name(newer.version)}"
    if older.cuda is None:
        package += " (cu13 if its torch is built for CUDA 13)"
    return (
        f"the servers have NCCL {_name(other.version)}, the trainer has {_name(own.version)}, and NCCL "
        f"refuses ranks of different versions: pip install {package} in {where} environment, or take "
        "weight_sync.path=tensor or disk"
    )


def _name(version: int) -> str:
    return f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
