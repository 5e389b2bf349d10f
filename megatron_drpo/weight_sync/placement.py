"""Where the rollout servers are, which ways of weight sync reach them there, and which one is taken.

What each way needs:

- tensor, from a CPU: HTTP alone. From a GPU it sends CUDA IPC handles of global rank 0's memory, which only
  processes on that machine can open, and only those that see that GPU. SGLang opens them outside any `try`: a
  server that cannot ends, with all its processes.
- distributed: servers of SGLang that reach `weight_sync.host`. NCCL refuses two ranks of one GPU in a group.
- disk: a folder that the servers can read.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch

from megatron_drpo.config.schema import Config, Placement, PlatformName, RolloutEngineName, WeightSyncPath
from megatron_drpo.errors import RolloutError
from megatron_drpo.fleet.build import starts_fleet
from megatron_drpo.fleet.state import ServerState, read_fleet
from megatron_drpo.weight_sync.rank_environment import find_expandable_segments

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_NEVER_SHARED = {"tmpfs", "ramfs", "overlay"}
"""File systems that exist on one machine, or in one container, alone."""
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"}
"""Of a disk of this machine, which may yet be exported to others."""
_NUM_NAMED = 3
"""Servers that a message names."""


@dataclass(frozen=True, slots=True)
class ServerPlaces:
    """What decides which ways of weight sync there are."""

    on_gpu: bool
    """The policy's weights are on a GPU."""
    is_embedded: bool
    """The run starts this project's own servers, which are on the CPU."""
    on_ray: bool
    """They may be on any node, and see their own GPUs alone."""
    is_colocated: bool
    """They share the trainer's GPUs."""
    elsewhere: tuple[str, ...] = ()
    """Endpoints that are not on this machine."""
    blind: tuple[str, ...] = ()
    """Endpoints on this machine that do not see global rank 0's GPU."""

    @property
    def out_of_reach(self) -> bool:
        """Whether a server cannot open the handles of global rank 0's memory."""
        return self.on_ray or bool(self.elsewhere or self.blind)


def find_places(config: Config) -> ServerPlaces:
    """What the configuration says, and this machine, which is global rank 0's. No server and no name service
    is asked."""
    rollout = config.rollout
    has_gpu = torch.cuda.is_available()
    on_gpu = config.platform is PlatformName.cuda or (config.platform is PlatformName.auto and has_gpu)
    fleet = _fleet_servers(rollout.fleet_file)
    endpoints = rollout.endpoints or [server.endpoint for server in fleet]
    elsewhere = tuple(url for url in endpoints if not is_on_this_machine(url))
    blind = tuple(s.endpoint for s in fleet if s.endpoint not in elsewhere and not _sees_first_gpu(s))
    return ServerPlaces(
        on_gpu=on_gpu,
        is_embedded=starts_fleet(config) and rollout.engine is RolloutEngineName.embedded,
        on_ray=not endpoints and rollout.fleet.placement is Placement.ray,
        is_colocated=rollout.colocated,
        elsewhere=elsewhere,
        blind=blind if on_gpu else (),
    )


def choose_path(config: Config, places: ServerPlaces | None = None) -> WeightSyncPath:
    """`weight_sync.path`, or what `auto` means where the servers are."""
    if config.weight_sync.path is not WeightSyncPath.auto:
        return config.weight_sync.path
    places = places or find_places(config)
    if not places.on_gpu:
        return WeightSyncPath.tensor
    if places.is_embedded:
        return WeightSyncPath.disk
    if places.out_of_reach:
        return WeightSyncPath.disk if places.is_colocated else WeightSyncPath.distributed
    return WeightSyncPath.tensor


def check_path(config: Config) -> list[str]:
    """Why weights cannot reach the servers this way, as sentences that say what to do instead."""
    places = find_places(config)
    path = choose_path(config, places)
    if path is WeightSyncPath.tensor:
        return _check_tensor(places)
    if path is WeightSyncPath.distributed:
        return _check_distributed(config, places)
    return _check_disk(config, places)


def warn_path(config: Config) -> list[str]:
    """What may keep weights from the servers, as sentences."""
    places = find_places(config)
    kind = file_system(config.run_dir)
    if choose_path(config, places) is not WeightSyncPath.disk or kind not in _LOCAL or not _others(places):
        return []
    return [
        f"weight_sync.path=disk: run_dir={config.run_dir} is on a disk of this machine ({kind}); "
        f"{_others(places)} must find it under the same path"
    ]


def is_on_this_machine(url: str) -> bool:
    """Whether a URL's host is an address or the name of this machine."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # told elsewhere
        return True
    own_name = socket.gethostname().lower()
    if host in ("localhost", own_name, own_name.partition(".")[0]):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    own = {a.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for a in addresses}
    return address.is_loopback or str(address) in own


def file_system(path: str | Path) -> str:
    """The kind of file system that a path is on, or will be: ext4, nfs4 ...; empty if that is not known."""
    place = Path(path).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (place, *place.parents) if folder in mounts), "")


def _check_tensor(places: ServerPlaces) -> list[str]:
    key = "weight_sync.path=tensor: from a GPU it sends handles of the GPU's memory, "
    if not places.on_gpu:
        return []
    if places.is_embedded:
        return [f"{key}which the embedded server on the CPU cannot open; take weight_sync.path=disk"]
    problems = []
    if places.on_ray:
        problems.append("servers on a Ray cluster may be on other machines, and see their own GPUs alone")
    if places.elsewhere:
        problems.append(f"{_names(places.elsewhere)} cannot open them: not on this machine")
    if places.blind:
        problems.append(
            f"{_names(places.blind)} cannot open them, for its {_VISIBLE_GPUS} leaves out the GPU of global "
            "rank 0"
        )
    other = "disk" if places.is_colocated else "distributed (with weight_sync.host) or disk"
    problems = [f"{key}but {problem}; take weight_sync.path={other}" for problem in problems]
    if setting := find_expandable_segments(os.environ):
        problems.append(
            f"{key}and under {setting} most containers keep other processes from opening it: run without "
            f"that variable, or take weight_sync.path={other}"
        )
    return problems


def _check_distributed(config: Config, places: ServerPlaces) -> list[str]:
    key, host = "weight_sync.path=distributed", config.weight_sync.host
    problems = []
    if places.is_embedded:
        problems.append(f"{key} needs rollout.engine=sglang: the embedded server joins no broadcast")
    if places.on_gpu and places.is_colocated:
        problems.append(
            f"{key}: rollout.colocated=True has servers on the GPU of global rank 0, and NCCL refuses two "
            f"ranks of one GPU; take weight_sync.path={'disk' if places.out_of_reach else 'tensor'}"
        )
    if host in ("0.0.0.0", "::", "[::]"):
        problems.append(
            f"weight_sync.host={host}: is no address to connect to; give that of the first trainer rank's "
            "machine, as servers reach it"
        )
    elif is_loopback(host) and _others(places):
        problems.append(
            f"weight_sync.host={host}: {key} has {_others(places)} connect to it; give the address of the "
            "first trainer rank's machine, as servers reach it"
        )
    return problems


def _check_disk(config: Config, places: ServerPlaces) -> list[str]:
    kind = file_system(config.run_dir)
    if kind not in _NEVER_SHARED or not _others(places):
        return []
    return [
        f"weight_sync.path=disk: run_dir={config.run_dir} is on a file system of one machine alone ({kind}): "
        f"{_others(places)} cannot read it; put it on one that the machines share"
    ]


def is_loopback(host: str) -> bool:
    """Whether a host is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _others(places: ServerPlaces) -> str:
    """The servers that are, or may be, on other machines; empty if there are none."""
    return _names(places.elsewhere) or ("servers on a Ray cluster" if places.on_ray else "")


def _names(endpoints: tuple[str, ...]) -> str:
    more = len(endpoints) - _NUM_NAMED
    return ", ".join(endpoints[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _fleet_servers(fleet_file: str | None) -> list[ServerState]:
    """Of a fleet that runs; without it, the run's own settings say where its servers are."""
    if fleet_file is None:
        return []
    try:
        return [server for server in read_fleet(fleet_file).servers if server.endpoint]
    except RolloutError:  # told when the run starts
        return []


def _sees_first_gpu(server: ServerState) -> bool:
    """Whether a server on this machine was started where global rank 0's GPU is visible. Unless that is known
    not to be so, it is."""
    try:
        seen = psutil.Process(server.pid).environ().get(_VISIBLE_GPUS)
    except psutil.Error:
        return True
    own = (os.environ.get(_VISIBLE_GPUS) or "0").split(",")[0].strip()
    if seen is None or not own.isdigit():
        return True
    others = [name.strip() for name in seen.split(",")]
    return own in others or not all(name.isdigit() for name in others)
