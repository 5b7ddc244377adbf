"""What all parties agree on: who has which columns, the batches, the privacy budget."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_clicooper.datasets import uci_adult
from flwr_clicooper.privacy.accounting import composed, epsilon_of, mu_for

HOLDERS = (
    ("age", "marital-status", "relationship", "race", "sex", "native-country"),
    ("workclass", "education", "occupation", "capital-gain", "capital-loss", "hours-per-week"),
)
EMBEDDING, BATCH, EPOCHS = 2, 512, 2  # each epoch releases each record again
DELTA, EMBEDDINGS_EPSILON, UPDATES_EPSILON = 1e-5, 7.5, 2.0


@cache
def features(holder: int, records: int) -> list[Tensor]:
    """Return a holder's columns in fixed parts: training batches, then all held-out rows."""
    data, columns = uci_adult(), HOLDERS[holder]
    train, held_out = (
        torch.cat([column(data, x, name) for name in columns], dim=1)
        for x in ("x_train", "x_test")
    )
    return [*torch.split(train[: records or None], BATCH), held_out]


def labels(records: int) -> list[Tensor]:
    """Return the labels of the same parts."""
    data = uci_adult()
    train, held_out = (torch.from_numpy(data[y]).float() for y in ("y_train", "y_test"))
    return [*torch.split(train[: records or None], BATCH), held_out]


def column(data: dict[str, NDArray[Any]], x: str, name: str) -> Tensor:
    """Return a column: categories one-hot, numbers scaled by public constants.

    A mean of the private data would move every row when one record changes.
    """
    values = torch.from_numpy(data[x][:, list(data["columns"]).index(name)]).long()
    if f"cat_{name}" in data:
        return torch.nn.functional.one_hot(values, len(data[f"cat_{name}"])).float()
    return (values.log1p() / 10 if name.startswith("capital") else values / 50 - 1)[:, None]


def epsilon_together(holders: int) -> float:
    """Return the epsilon of embeddings and encoder steps, for a person at so many holders."""
    of_one = [mu_for(EMBEDDINGS_EPSILON, DELTA), mu_for(UPDATES_EPSILON, DELTA)]
    return epsilon_of(DELTA, composed(of_one * holders))
