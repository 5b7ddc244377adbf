"""Class scores: a short vector per record that survives heavy noise.

A classifier of the head's features is fitted to noisy sums over all records (`statistics`),
which spends a part of the budget. What is then released of each record, with the rest of
it, is only how that classifier scores it. The noise needed does not grow with the number of
features, and there are few coordinates to drown.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper.errors import OptionError
from flwr_clicooper.privacy.statistics import (
    COUNTS,
    INTERCEPT,
    Batches,
    Budget,
    class_counts,
    collect,
    fit_cloud,
    fit_weights,
    normalise,
)

SENSITIVITY = math.sqrt(2.0)
"""How far two vectors of probabilities can be apart, in L2 norm."""
FIT_SHARE = 0.5
"""Part of mu squared that fitting spends."""


class ClassScores(nn.Module):
    """Centred class probabilities of features, float32 ``[n, classes]``, of norm below 1.

    It looks at one record at a time. Its buffers are zero until those of `fit_class_scores`
    are loaded.

    Parameters
    ----------
    features : int
        Size of the head's output.
    classes : int
        Number of classes.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.zeros(features, features))
        self.register_buffer("weights", torch.zeros(features + 1, classes))
        self.mean: Tensor
        self.whitening: Tensor
        self.weights: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores of features ``[n, d]``."""
        rows = normalise(features).float() / math.sqrt(len(self.mean))
        moved = functional.normalize((rows - self.mean) @ self.whitening)
        inputs = functional.pad(moved, (0, 1), value=INTERCEPT)
        return (inputs @ self.weights).softmax(dim=1) - 1.0 / self.weights.shape[1]


def fit_class_scores(batches: Batches, classes: int, mu: float) -> dict[str, Tensor]:
    """Return the buffers of `ClassScores`, fitted with Gaussian differential privacy.

    Parameters
    ----------
    batches : callable
        Gives the records as pairs of features, real ``[b, d]``, and classes, int64 ``[b]``.
    classes : int
        Number of classes, at least 2.
    mu : float
        What fitting may spend; it covers features and labels of one record.

    Raises
    ------
    OptionError, DataError
        As `synthetic.release_synthetic`.
    """
    if classes < 2 or not 0 < mu < math.inf:
        raise OptionError(
            f"classes is {classes} and mu is {mu}; allowed are at least 2 classes and a "
            "finite mu above 0"
        )
    rows, labels = collect(batches, classes)
    budget = Budget(mu)
    counts = budget.spend(COUNTS, class_counts(labels, classes), math.sqrt(2.0))
    cloud = fit_cloud(rows, budget)
    weights = fit_weights(cloud.whitened(rows), labels, counts, budget)
    return {
        "mean": cloud.mean.float(),
        "whitening": (cloud.axes * cloud.scale).float(),
        "weights": weights.float(),
    }
