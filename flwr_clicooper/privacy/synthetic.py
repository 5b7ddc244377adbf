"""Synthetic records: what the owner releases in their place is drawn from noisy statistics.

A row is drawn from the Gaussian with the noisy mean and spread, its label is what the noisy
linear classifier says (see `statistics`), and of each class as many are kept as its noisy
count asks for. The rows, and all that is ever trained on them, are post-processing, so no
epoch costs anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_clicooper.errors import OptionError
from flwr_clicooper.privacy.statistics import (
    COUNTS,
    Batches,
    Budget,
    Charge,
    class_counts,
    collect,
    fit_cloud,
    fit_weights,
    normalise,
)

_DRAWN = 2
"""Rows drawn per row that is kept, to have enough of rare classes."""


@dataclass(frozen=True)
class SyntheticRelease:
    """Rows that stand in for the records.

    Attributes
    ----------
    features : Tensor
        Normalised, float32 ``[records, d]``.
    labels : Tensor
        Classes, int64 ``[records]``.
    charges : tuple of Charge
        What was spent; the squares of their ``mu`` sum to the square of what was allowed.
    """

    features: Tensor
    labels: Tensor
    charges: tuple[Charge, ...]


def release_synthetic(
    batches: Batches, classes: int, records: int, mu: float
) -> SyntheticRelease:
    """Return rows drawn from noisy statistics of the records.

    The statistics together are ``mu``-Gaussian differentially private for replacing one
    record, features and label; `accounting.mu_for` gives ``mu`` for (epsilon, delta). Each
    call is a release of its own: two calls cost both.

    Parameters
    ----------
    batches : callable
        Gives the records as pairs of features, real ``[b, d]``, and classes, int64 ``[b]``.
        Called once; all features are kept in memory, ``8 * n * d`` bytes.
    classes : int
        Number of classes, at least 2.
    records : int
        How many rows to draw, at least 1; the number costs nothing.
    mu : float
        What may be spent, above 0.

    Raises
    ------
    OptionError
        A value is out of its range, or there are more than 512 features.
    DataError
        There are no records, features are not finite or not flat, or labels are not
        classes.
    """
    allowed = classes >= 2 and records >= 1 and 0 < mu < math.inf
    if not allowed:
        raise OptionError(
            f"classes is {classes}, records {records} and mu {mu}; allowed are at least 2 "
            "classes, at least 1 record and a finite mu above 0"
        )
    rows, labels = collect(batches, classes)
    return _release(rows, labels, classes, records, mu)


def _release(
    rows: Tensor, labels: Tensor, classes: int, records: int, mu: float
) -> SyntheticRelease:
    """Return the release of rows of norm at most 1; an infinite mu adds no noise."""
    budget = Budget(mu)
    counts = budget.spend(COUNTS, class_counts(labels, classes), math.sqrt(2.0))
    cloud = fit_cloud(rows, budget)
    inputs = cloud.whitened(rows)
    weights = fit_weights(inputs, labels, counts, budget)
    drawn = cloud.draw(_DRAWN * records)
    told = (cloud.whitened(drawn).double() @ weights).argmax(dim=1)
    kept = _in_proportion(told, counts, records)
    return SyntheticRelease(normalise(drawn[kept]), told[kept], tuple(budget.charges))


def _in_proportion(labels: Tensor, counts: Tensor, records: int) -> Tensor:
    """Return places of rows whose classes have the shares of the counts, in order.

    A class of which too few rows came has some twice; one of which none came has none.
    """
    drawn = torch.bincount(labels, minlength=len(counts))
    shares = counts.clamp_min(1.0) * (drawn > 0)
    # Rounded so that the parts sum to the whole.
    ends = (shares.cumsum(0) / shares.sum() * records).round().long()
    wanted = ends.diff(prepend=ends.new_zeros(1))
    kept = [
        torch.nonzero(labels == c)[:, 0][torch.arange(int(n)) % int(drawn[c])]
        for c, n in enumerate(wanted)
        if n > 0
    ]
    return torch.cat(kept).sort().values
