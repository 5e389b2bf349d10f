"""Seeded batches of prompts, resumable at any point."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_drpo.data.cursor import Cursor
from megatron_drpo.data.seeding import seeded_permutation
from megatron_drpo.errors import CheckpointError
from megatron_drpo.types import Prompt


class PromptSource:
    """An endless stream of prompts, epoch after epoch; each epoch holds every prompt exactly once.

    A prompt counts as done once it is marked as consumed. One that was handed out but not consumed before a
    checkpoint is handed out again after a resume. Batches run over the end of an epoch. Nothing depends on
    the number of ranks: every rank hands out the same batches and takes its share.

    Args:
        prompts: with distinct ids.
        shuffle: order each epoch by `seed` and the epoch's number; otherwise keep the order given.
    """

    def __init__(self, prompts: list[Prompt], *, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._shuffle = shuffle
        self._seed = seed
        self._identity = {
            "num_prompts": len(prompts),
            "prompts_sha256": _sha256(prompts),
            "shuffle": shuffle,
            "seed": seed,
        }
        """What the meaning of a position depends on."""
        self._epoch_order: tuple[int, list[int]] = (-1, [])
        self._start_from(Cursor())

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    @property
    def num_consumed(self) -> int:
        """Prompts consumed since the run began; divided by len(self) it is the number of epochs."""
        return self._cursor.low_water + len(self._cursor.exceptions)

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """The next prompts of the stream. Across the end of an epoch a prompt may occur twice."""
        batch = []
        for _ in range(num_prompts):
            position = next(self._positions)
            prompt = self._prompt_at(position)
            self._outstanding.setdefault(prompt.id, deque()).append(position)
            batch.append(prompt)
        return batch

    def mark_consumed(self, prompt_ids: Iterable[int]) -> None:
        """Mark prompts that were handed out; of an id handed out twice, the older one first.

        Raises:
            KeyError: an id that is not outstanding.
        """
        for prompt_id in prompt_ids:
            positions = self._outstanding[prompt_id]
            self._cursor.consume(positions.popleft())
            if not positions:
                del self._outstanding[prompt_id]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON, with what it takes to refuse it for other prompts."""
        return {
            **self._identity,
            "low_water": self._cursor.low_water,
            "exceptions": sorted(self._cursor.exceptions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to other prompts or another order.
        """
        changes = [
            f"{name} was {state[name]} and is now {value}"
            for name, value in self._identity.items()
            if state[name] != value
        ]
        if changes:
            raise CheckpointError(
                "the prompts are not those of the checkpoint, so its position in them has no meaning: "
                + "; ".join(changes)
                + ". Restore data.train_path, the data options, tokenizer and seed, or start a new run_dir"
            )
        self._start_from(Cursor(state["low_water"], set(state["exceptions"])))

    def _start_from(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._positions = cursor.remaining()
        self._outstanding: dict[int, deque[int]] = {}

    def _prompt_at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        if not self._shuffle:
            return self._prompts[index]
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, seeded_permutation(len(self._prompts), self._seed, epoch))
        return self._prompts[self._epoch_order[1][index]]


class PromptShare:
    """Hands out this replica's prompts of each step: every data_size-th, so that the groups of an update are
    the same set whatever the number of replicas (but for dynamic sampling, which fills each replica's share
    from its own prompts)."""

    def __init__(self, source: PromptSource, num_prompts: int, rank: int, size: int) -> None:
        self.source = source
        self.num_prompts = num_prompts // size
        """Of this replica in one step."""
        self._rank = rank
        self._size = size
        self._handed_out: list[int] = []

    def next(self, num_prompts: int | None = None) -> list[Prompt]:
        """The next prompts of this replica; as many for each of the others.

        Args:
            num_prompts: equal on all replicas, which keeps their cursors equal; a step's share if not given.
        """
        prompts = self.source.next_batch((num_prompts or self.num_prompts) * self._size)
        self._handed_out += [prompt.id for prompt in prompts]
        return prompts[self._rank :: self._size]

    def mark_consumed(self, pending: Sequence[int] = ()) -> None:
        """The step is done: its prompts count.

        Args:
            pending: ids of prompts handed out, to this replica or another, whose groups have not been trained
                yet.
        """
        still = Counter(pending)
        consumed: list[int] = []
        for prompt_id in reversed(self._handed_out):  # of an id handed out twice, the later one is pending
            if still[prompt_id] > 0:
                still[prompt_id] -= 1
            else:
                consumed.append(prompt_id)
        self.source.mark_consumed(reversed(consumed))
        self._handed_out = list(pending)


def _sha256(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.text, prompt.answer, prompt.response)).encode())
    return digest.hexdigest()
