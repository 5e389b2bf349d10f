"""Do the servers have the weights that were sent? Compared by checksum, once an update has ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch

from megatron_drpo.weight_sync.checksum import HfChecksums
from megatron_drpo.weight_sync.client import ServerInfo
from megatron_drpo.weight_sync.path import Failures, Server, attempt
from megatron_drpo.weight_sync.served_layout import Layout, ServedChecksums, known_layout
from megatron_drpo.weights.hf_folder import HfConfig

Checksums = list[dict[str, str]]
"""Per tensor-parallel rank: by parameter name."""
_Kind = tuple[str, int, str, str]


class Verification:
    """Of one update. Sees every tensor that is to be sent; then compares with what the servers say.

    A server whose layout is known must have exactly the checksums computed here. Where it is only assumed
    (GPUs), that holds for every sort of parameters (the same name in all layers) of which one has its
    checksum, or had it after an earlier update; the others lie otherwise. The servers of one kind (the same
    tensor-parallel size, device, dtype and quantisation) with parameters that lie otherwise must agree with
    each other, and with what their kind had after an earlier update to the same version.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: HfConfig,
        agreed: Mapping[_Kind, Checksums] | None = None,
        known: set[tuple[_Kind, str]] | None = None,
    ) -> None:
        """
        Args:
            config: of the model.
            agreed: `agreed` of the verification of an earlier update to the same version.
            known: sorts of parameters that had their checksums after any earlier update; grows.
        """
        self._known = set() if known is None else known
        self._layouts = {server.endpoint: _layout(server.info, config) for server in servers}
        self._expected: dict[Layout | None, ServedChecksums | HfChecksums] = {}
        for server in servers:
            layout = self._layouts[server.endpoint]
            if server.info.is_embedded:
                self._expected[None] = HfChecksums()
            elif layout is not None:
                self._expected[layout] = ServedChecksums(layout)
        self.agreed: dict[_Kind, Checksums] = dict(agreed or {})
        """What the servers of each kind whose layout is not known have."""
        self.unknown: list[str] = []
        """Servers that could be compared with each other only, in part at least; complete after `compare`."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor, on any device, as the policy gives it."""
        for expected in self._expected.values():
            expected.add(name, tensor)

    async def compare(self, servers: Sequence[Server]) -> Failures:
        """Ask the servers for their checksums; those that have other weights fail."""
        found: dict[str, Checksums] = {}

        async def ask(server: Server) -> None:
            found[server.endpoint] = await server.client.weights_checksums()

        failures = await attempt(servers, ask)
        expected = {key: value.checksums() for key, value in self._expected.items()}
        peers = []
        for server in servers:
            if server.endpoint in failures:
                continue
            has, wanted = found[server.endpoint], expected.get(self._layouts[server.endpoint])
            if not server.info.is_embedded and (wanted is None or not _same_names(has, wanted)):
                peers.append(server)
                continue
            assert wanted is not None
            unknown = self._unknown_sorts(server, has, wanted)
            reason = _difference(has, wanted, unknown)
            if reason is not None:
                failures[server.endpoint] = f"{server.endpoint}: {reason}"
            elif unknown:
                peers.append(server)
        self.unknown = [server.endpoint for server in peers]
        return failures | self._disagreements(peers, found)

    def _unknown_sorts(self, server: Server, has: Checksums, wanted: Checksums) -> set[str]:
        """Sorts of parameters that lie otherwise in this server than is assumed here."""
        layout, kind = self._layouts[server.endpoint], _kind(server.info)
        if layout is None or layout.is_certain:
            return set()
        ranks = zip(has, wanted, strict=True)
        equal = {_sort(name) for found, own in ranks for name in own if found[name] == own[name]}
        self._known |= {(kind, sort) for sort in equal}
        sorts = {_sort(name) for own in wanted for name in own}
        return {sort for sort in sorts if (kind, sort) not in self._known}

    def _disagreements(self, servers: Sequence[Server], found: Mapping[str, Checksums]) -> Failures:
        failures: Failures = {}
        for kind in {_kind(server.info) for server in servers}:
            peers = [server for server in servers if _kind(server.info) == kind]
            votes = Counter(repr(found[server.endpoint]) for server in peers)
            (most, count), *others = votes.most_common()
            if kind in self.agreed:
                most = repr(self.agreed[kind])
            elif others and others[0][1] == count:
                most = ""  # no majority: nobody knows who is right
            for server in peers:
                if repr(found[server.endpoint]) == most:
                    self.agreed[kind] = found[server.endpoint]
                else:
                    failures[server.endpoint] = (
                        f"{server.endpoint}: its weights' checksums differ from those of the other servers "
                        f"of its kind (tp {server.info.tp_size}, {server.info.device}, {server.info.dtype})"
                    )
        return failures


def _layout(info: ServerInfo, config: HfConfig) -> Layout | None:
    return None if info.is_embedded else known_layout(info, config)


def _kind(info: ServerInfo) -> _Kind:
    return (info.device, info.tp_size, info.dtype, str(info.arguments.get("quantization")))


def _same_names(found: Checksums, expected: Checksums) -> bool:
    return [has.keys() for has in found] == [wanted.keys() for wanted in expected]


def _sort(name: str) -> str:
    """A parameter's name, the same in all layers."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _difference(found: Checksums, expected: Checksums, unknown: Collection[str]) -> str | None:
    """The first parameter that differs, but for sorts that are not known; None if all are equal."""
    for rank, (has, wanted) in enumerate(zip(found, expected, strict=True)):
        for name in sorted(has.keys() | wanted.keys()):
            if has.get(name) != wanted.get(name) and _sort(name) not in unknown:
                return (
                    f"rank {rank}: {name} has checksum {has.get(name, '(none)')}, "
                    f"the trainer's is {wanted.get(name, '(none)')}"
                )
    return None
