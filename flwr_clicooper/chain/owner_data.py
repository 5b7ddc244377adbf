"""The owner's data sets: fetched the same in every process."""

from __future__ import annotations

import numpy as np
import torch

from flwr_clicooper.chain.delivered import digest
from flwr_clicooper.chain.records import Indices, LabelledSet
from flwr_clicooper.errors import StateError
from flwr_clicooper.split.batches import derive_seed
from flwr_clicooper.split.modules import seeded
from flwr_clicooper.split.specs import Tensors
from flwr_clicooper.task import Config, SplitTask


class OwnerData:
    """Training and held-out set of a task.

    Parameters
    ----------
    task : SplitTask
        Gives them.
    config : mapping
        What the task gets.
    seed : int
        Of what is random in them.
    """

    def __init__(self, task: SplitTask, config: Config, seed: int) -> None:
        self._seed = seed
        with seeded(derive_seed(seed, "datasets")):
            train, test = task.datasets(config)
        self.train, self.test = LabelledSet(train, "training"), LabelledSet(test, "held-out")

    def first(self, part: LabelledSet, records: int = 1) -> tuple[Tensors, torch.Tensor]:
        """Return the first records of a set."""
        with seeded(derive_seed(self._seed, "data", 0)):
            return part.fetch(np.arange(min(records, part.records)))

    def fetch(self, rows: Indices, purpose: tuple[int, ...]) -> tuple[Tensors, torch.Tensor]:
        """Return training records; random augmentation is seeded by what they are for."""
        with seeded(derive_seed(self._seed, "data", *purpose)):
            return self.train.fetch(rows)

    def check_same(self, known: str) -> str:
        """Return a digest of both sets' sizes and of a few records of the training set.

        It tells whether another process has the same data; it stays in the owner's state.

        Parameters
        ----------
        known : str
            The digest at setup, or empty.

        Raises
        ------
        StateError
            The data are others than at setup.
        """
        last = self.train.records - 1
        inputs, labels = self.fetch(np.unique([0, last // 2, last]), (0,))
        found = {str(i): x.contiguous() for i, x in enumerate((*inputs, labels))}
        fingerprint = digest(found | {"sizes": torch.tensor([last, self.test.records])})
        if known and known != fingerprint:
            raise StateError(
                "datasets() gave other data in this process than at setup; it must give the "
                "same each time. Seed what is random in it"
            )
        return fingerprint
