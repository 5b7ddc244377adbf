"""Synthetic records: what the owner releases in their place is drawn from noisy statistics.

The owner computes four statistics of the head's normalised features, adds Gaussian noise to
each once, and draws rows from a model that follows from these alone. The rows, and all that
is ever trained on them, are post-processing, so no epoch costs anything.

1. *counts* of the classes;
2. the *mean* feature;
3. the *second moment* of the centred features, which says how they spread;
4. *residual sums*: for each class, the sum of the features weighted by what a linear
   classifier still gets wrong about them. Several rounds of them, each with the classifier
   that the noisy sums before it gave, are its training.

A row is drawn from the Gaussian with mean 2 and spread 3, its label is the classifier's, and
of each class as many are kept as its noisy count asks for. Sums over all records stand out
from the noise where a covariance per class does not, and a label that a classifier gives
need not follow from the shape of its class.

Adjacency is replacing one record; how many there are is public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flwr_clicooper.errors import DataError, OptionError
from flwr_clicooper.privacy.release import add_noise

MAX_FEATURES = 512
"""Above it the noise on the second moment drowns what it says."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

_COUNTS, _MEAN, _MOMENT, _RESIDUALS = "counts", "mean", "second moment", "residual sums"
_SHARES = {_COUNTS: 0.01, _MEAN: 0.04, _MOMENT: 0.10, _RESIDUALS: 0.85}
"""Parts of mu squared. The labels' side is what noise hurts."""
_ROUNDS = 30
_MOMENTUM = 0.9
_STEP, _STEP_MAX = 1 / 300, 160.0
"""A step is this times mu times the records: the less signal, the shorter."""
_INTERCEPT = 0.1
_SPREAD_MIN = 0.1
_WHITEN_MIN = 0.3
_DRAWN = 2
"""Rows drawn per row that is kept, to have enough of rare classes."""
_BLOCK = 8192
_MARGIN = 1.0 - 2.0**-20
"""Normalised norms stay below the bound after rounding, too."""


@dataclass(frozen=True)
class Charge:
    """What one statistic costs.

    Attributes
    ----------
    name : str
        Which statistic.
    sensitivity : float
        How far replacing one record can move one release of it, in L2 norm.
    sigma : float
        Standard deviation of the noise on each coordinate.
    releases : int
        How often it is released, each time with new noise.
    """

    name: str
    sensitivity: float
    sigma: float
    releases: int = 1

    @property
    def mu(self) -> float:
        """Its Gaussian differential privacy, all releases together."""
        return self.sensitivity / self.sigma * math.sqrt(self.releases)


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


def normalise(features: Tensor) -> Tensor:
    """Scale each record to an L2 norm of the root of its size; zero stays zero.

    It looks at one record at a time and keeps no state, so it is part of the model: what is
    released and what the delivered model sees go through the same function.

    Parameters
    ----------
    features : Tensor
        Real, ``[n, ...]``.

    Returns
    -------
    Tensor
        The same shape, float64 for float64 and else float32. Norms are never above
        ``sqrt(d)`` for ``d`` elements per record, and below it only by rounding.
    """
    rows = features.double().flatten(1)
    if rows.numel() == 0:
        return features.double() if features.dtype == torch.float64 else features.float()
    # Elements of at most 1 first: squares of very large or small ones would be lost.
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    bound = math.sqrt(rows.shape[1]) * _MARGIN
    scaled: Tensor = (rows * (bound / norms.clamp_min(1.0))).reshape(features.shape)
    return scaled if features.dtype == torch.float64 else scaled.float()


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
    rows, labels = _collect(batches, classes)
    return _release(rows, labels, classes, records, mu)


def _release(
    rows: Tensor, labels: Tensor, classes: int, records: int, mu: float
) -> SyntheticRelease:
    """Return the release of rows of norm at most 1; an infinite mu adds no noise."""
    budget = _Budget(mu)
    counts = budget.spend(_COUNTS, class_counts(labels, classes), math.sqrt(2.0))
    cloud = _fit_cloud(rows, budget)
    inputs = cloud.whitened(rows)
    weights = _fit_weights(inputs, labels, counts, budget)
    drawn = cloud.draw(_DRAWN * records)
    told = (cloud.whitened(drawn).double() @ weights).argmax(dim=1)
    kept = _in_proportion(told, counts, records)
    return SyntheticRelease(normalise(drawn[kept]), told[kept], tuple(budget.charges))


# -- the statistics, before noise; how far replacing one record can move each ----------------


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Return the records per class: one leaves a count and enters another, ``sqrt(2)``."""
    return torch.bincount(labels, minlength=classes).double()


def feature_sum(rows: Tensor) -> Tensor:
    """Return the sum of rows of norm at most 1: at most opposite ones are exchanged, 2."""
    return sum((block.sum(0) for block in _doubles(rows)), torch.zeros(()))


def second_moment(rows: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Return the sum of the outer products of centred rows, clipped to a radius ``R``.

    In Frobenius norm ``||uu' - vv'||^2 = |u|^4 + |v|^4 - 2 (u.v)^2 <= 2 R^4``, so replacing
    one record moves it by at most ``sqrt(2) R^2``.
    """
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in _doubles(rows):
        moved = block - centre
        norms = moved.norm(dim=1, keepdim=True)
        moved *= (radius / norms.clamp_min(radius)).clamp_max(1.0)
        total.addmm_(moved.T, moved)
    return total


def residual_sums(inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of input times (probability - truth), each record's clipped to norm 1.

    ``[d, classes]``, the gradient of the logistic loss. Two contributions of norm at most 1
    are exchanged, so replacing one record moves it by at most 2.
    """
    total = torch.zeros_like(weights)
    for block, told in zip(_doubles(inputs), torch.split(labels, _BLOCK), strict=True):
        residuals = (block @ weights).softmax(dim=1)
        residuals -= functional.one_hot(told, weights.shape[1])
        norms = block.norm(dim=1) * residuals.norm(dim=1)
        residuals /= norms.clamp_min(1.0)[:, None]
        total.addmm_(block.T, residuals)
    return total


# -- noise -----------------------------------------------------------------------------------


class _Budget:
    """Adds noise, and writes down what that cost."""

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.charges: list[Charge] = []

    def spend(self, name: str, value: Tensor, sensitivity: float) -> Tensor:
        """Return a statistic with its noise."""
        return noisy(value, self.charge(name, sensitivity).sigma)

    def charge(self, name: str, sensitivity: float, releases: int = 1) -> Charge:
        """Write down a statistic's share."""
        mu = self.mu * math.sqrt(_SHARES[name])
        charge = Charge(name, sensitivity, sensitivity * math.sqrt(releases) / mu, releases)
        self.charges.append(charge)
        return charge


def noisy(value: Tensor, sigma: float) -> Tensor:
    """Return a float64 statistic plus noise on each coordinate."""
    noise = torch.zeros(value.shape, dtype=torch.float64)
    if sigma:
        add_noise(noise, sigma)
    return value + noise


def noisy_symmetric(value: Tensor, sigma: float) -> Tensor:
    """Return a symmetric matrix plus symmetric noise.

    Its coordinates, in which the Euclidean norm is the Frobenius norm, are the diagonal and
    ``sqrt(2)`` times what is above it. Noise ``sigma`` on these is ``sigma / sqrt(2)`` on an
    element off the diagonal.
    """
    noise = noisy(torch.zeros_like(value), sigma)
    above = noise.triu(1) / math.sqrt(2.0)
    return value + above + above.T + noise.diagonal().diag()


# -- from here on everything follows from noisy statistics -----------------------------------


@dataclass(frozen=True)
class _Cloud:
    """A Gaussian in the space of unit rows.

    ``variances`` float64 ``[d]`` along the columns of ``axes`` ``[d, d]``; ``least`` is the
    variance that whitening takes a smaller one for.
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor
    least: float

    def whitened(self, rows: Tensor) -> Tensor:
        """Return the classifier's inputs ``[n, d + 1]``: equal spread, norm 1, intercept."""
        scale = self.variances.clamp_min(self.least).rsqrt()
        moved = (rows - self.mean.float()) @ (self.axes * scale).float()
        return functional.pad(functional.normalize(moved), (0, 1), value=_INTERCEPT)

    def draw(self, records: int) -> Tensor:
        """Return unit rows, float32, by the secure source of randomness."""
        rows = torch.zeros(records, len(self.mean))
        add_noise(rows, 1.0)
        rows = rows @ (self.axes * self.variances.sqrt()).T.float() + self.mean.float()
        return functional.normalize(rows)


def _fit_cloud(rows: Tensor, budget: _Budget) -> _Cloud:
    """Release the mean and the second moment."""
    count, width = rows.shape
    mean = budget.spend(_MEAN, feature_sum(rows), 2.0) / count
    error = budget.charges[-1].sigma / count
    # Unit rows with this mean lie at this distance from it, on average.
    inside = 1.0 - float(mean @ mean) + width * error**2
    radius = math.sqrt(min(1.0, max(0.1, inside)))
    mean = mean / mean.norm().clamp_min(1.0)
    charge = budget.charge(_MOMENT, math.sqrt(2.0) * radius**2)
    moment = noisy_symmetric(second_moment(rows, mean, radius), charge.sigma) / count
    variances, axes = torch.linalg.eigh(moment)
    typical = radius**2 / width
    variances = variances.clamp_min(_SPREAD_MIN * typical)
    variances *= radius**2 / variances.sum()
    # The largest eigenvalue that noise alone would have.
    edge = math.sqrt(2.0 * width) * charge.sigma / count
    return _Cloud(mean, variances, axes, max(edge, _WHITEN_MIN * typical))


def _fit_weights(inputs: Tensor, labels: Tensor, counts: Tensor, budget: _Budget) -> Tensor:
    """Release residual sums, and descend along each; float64 ``[d + 1, classes]``."""
    count = len(inputs)
    charge = budget.charge(_RESIDUALS, 2.0, _ROUNDS)
    weights = torch.zeros(inputs.shape[1], len(counts), dtype=torch.float64)
    weights[-1] = (counts.clamp_min(1.0) / count).log() / _INTERCEPT
    step, speed = min(_STEP_MAX, _STEP * budget.mu * count), torch.zeros_like(weights)
    for turn in range(_ROUNDS):
        told = noisy(residual_sums(inputs, labels, weights), charge.sigma)
        speed = _MOMENTUM * speed + told / count
        weights = weights - step * (1.0 - turn / _ROUNDS) * speed
    return weights


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


# -- what comes in ---------------------------------------------------------------------------


def _collect(batches: Batches, classes: int) -> tuple[Tensor, Tensor]:
    """Return all records, features scaled to norm 1, float32, and labels."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for features, told in batches():
        _check_batch(features, told, classes)
        if rows and features.shape[1] != rows[0].shape[1]:
            raise DataError(
                f"a batch has {features.shape[1]} features, the first {rows[0].shape[1]}"
            )
        unit = normalise(features.detach().cpu()) / math.sqrt(features.shape[1])
        rows.append(unit.float())
        labels.append(told.cpu())
    if not sum(map(len, rows)):
        raise DataError("there are no records to release statistics of")
    return torch.cat(rows), torch.cat(labels)


def _check_batch(features: Tensor, labels: Tensor, classes: int) -> None:
    if features.ndim != 2 or features.shape[1] == 0 or features.is_complex():
        raise DataError(
            f"features have shape {list(features.shape)}; allowed is [records, d], real: "
            "the head must end flat"
        )
    if features.shape[1] > MAX_FEATURES:
        raise OptionError(
            f"the head gives {features.shape[1]} features; at most {MAX_FEATURES} can be "
            "released as statistics: pool or project them in the head"
        )
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise DataError(
            f"labels are {str(labels.dtype).removeprefix('torch.')}{list(labels.shape)} for "
            f"{len(features)} records; allowed is one int64 class per record"
        )
    if labels.numel() and bool((labels.amin() < 0) | (labels.amax() >= classes)):
        raise DataError(f"a label is out of range; allowed are 0 to {classes - 1}")
    if not bool(torch.isfinite(features).all()):
        raise DataError("a record to release statistics of holds NaN or infinity")


def _doubles(rows: Tensor) -> Iterable[Tensor]:
    return (block.double() for block in torch.split(rows, _BLOCK))
