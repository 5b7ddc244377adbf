"""Who trains on which records when: the public, seeded order of a run.

Owner and trainers compute the same order from the same seed, so that nobody has to
send it. Nothing here is secret and nothing here is used for privacy noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a micro-batch stands.

    Attributes
    ----------
    round, step, microbatch : int
        Round from 1; optimizer step within the round and micro-batch within the
        step, from 0.
    """

    round: int
    step: int
    microbatch: int

    def __str__(self) -> str:
        return f"round {self.round}, step {self.step}, micro-batch {self.microbatch}"


@dataclass(frozen=True)
class BatchPlan:
    """Cuts a data set into rounds, batches and micro-batches.

    Parameters
    ----------
    records : int
        Records in the training set.
    batch_size, microbatches : int
        Records per optimizer step, and parts that a batch is cut into. The last
        batch of a round is smaller when the sizes do not divide (PyTorch's
        ``drop_last=False``).
    seed : int
        The run's public seed.
    shuffle : bool
        Whether each round has an order of its own.
    """

    records: int
    batch_size: int
    microbatches: int
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        """Optimizer steps per round."""
        return -(-self.records // self.batch_size)

    def batch_records(self, step: int) -> int:
        """Return the number of records in the batch of ``step``."""
        return min(self.batch_size, self.records - step * self.batch_size)

    def parts(self, step: int) -> int:
        """Return the number of micro-batches of ``step``."""
        return min(self.microbatches, self.batch_records(step))

    @property
    def smallest_part(self) -> int:
        """Records in the smallest micro-batch of a round."""
        steps = (0, self.steps - 1)
        return min(self.batch_records(step) // self.parts(step) for step in steps)

    def weight(self, at: Position) -> float:
        """Return the share of its batch that a micro-batch has."""
        return len(self.indices(at)) / self.batch_records(at.step)

    def has(self, at: Position) -> bool:
        """Return whether a position exists."""
        step_exists = at.round >= 1 and 0 <= at.step < self.steps
        return step_exists and 0 <= at.microbatch < self.parts(at.step)

    def progress(self, at: Position, rounds: int) -> float:
        """Return the share of a run's optimizer steps that come before a position."""
        return ((at.round - 1) * self.steps + at.step) / (rounds * self.steps)

    def indices(self, at: Position) -> NDArray[np.int64]:
        """Return the record indices of one micro-batch, int64, shape ``[n]``."""
        order = _epoch_order(self.records, self.seed, at.round, self.shuffle)
        start = at.step * self.batch_size
        batch = order[start : start + self.batch_size]
        return np.array_split(batch, self.parts(at.step))[at.microbatch]

    def positions(self, round_: int) -> Iterator[Position]:
        """Yield every micro-batch of a round in order."""
        for step in range(self.steps):
            for microbatch in range(self.parts(step)):
                yield Position(round_, step, microbatch)


@lru_cache(maxsize=4)
def _epoch_order(records: int, seed: int, round_: int, shuffle: bool) -> NDArray[np.int64]:
    if not shuffle:
        return np.arange(records, dtype=np.int64)
    generator = np.random.default_rng(derive_seed(seed, "order", round_))
    return generator.permutation(records).astype(np.int64, copy=False)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, the same on every machine.

    Parameters
    ----------
    seed : int
        The run's public seed.
    *purpose : str or int
        What the seed is for, for example ``"forward", segment, round, step``.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
