"""Statistics of all records with Gaussian noise, and the linear classifier that follows.

The rows are the head's normalised features. Four statistics get noise, each once:

1. *counts* of the classes;
2. the *mean* feature;
3. the *second moment* of the centred features, which says how they spread;
4. *residual sums*: for each class, the sum of the features weighted by what a linear
   classifier still gets wrong about them. Several rounds of them, each with the classifier
   that the noisy sums before it gave, are its training.

These are sums over all records, which drown the noise where covariances of each class
would not.

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

COUNTS, _MEAN, _MOMENT, _RESIDUALS = "counts", "mean", "second moment", "residual sums"
_SHARES = {COUNTS: 0.01, _MEAN: 0.04, _MOMENT: 0.10, _RESIDUALS: 0.85}
"""Parts of mu squared. The labels' side is what noise hurts."""
ROUNDS = 45
"""How often residual sums are released."""
_RESIDUAL_MAX = 0.5
"""A record that is clearly wrong would give up to 1.4 and counts for less; noise is halved."""
_MOMENTUM = 0.6
_STEP, _STEP_MAX = 1 / 50, 1000.0
"""A step is this times mu times the records: the less signal, the shorter."""
_DECAY = 0.75
"""Weights are pulled back by this over mu times the records: the less signal, the more."""
INTERCEPT = 0.1
_SPREAD_MIN = 0.1
_WHITEN_MIN = 0.3
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


def residual_sums(inputs: Tensor, labels: Tensor, weights: Tensor, radius: float) -> Tensor:
    """Return the sum of input times (probability - truth), clipped to a radius ``R``.

    ``[d, classes]``, the gradient of the logistic loss. Of each record input times residual
    is a matrix of rank 1, whose Frobenius norm is the product of their norms; it is cut to
    at most ``R``. Two such contributions are exchanged, so replacing one record moves the
    sum by at most ``2 R``, whatever the weights are.
    """
    total = torch.zeros_like(weights)
    for block, told in zip(_doubles(inputs), torch.split(labels, _BLOCK), strict=True):
        residuals = (block @ weights).softmax(dim=1)
        residuals -= functional.one_hot(told, weights.shape[1])
        norms = block.norm(dim=1) * residuals.norm(dim=1)
        residuals *= (radius / norms.clamp_min(radius))[:, None]
        total.addmm_(block.T, residuals)
    return total


# -- noise -----------------------------------------------------------------------------------


class Budget:
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
class Cloud:
    """A Gaussian in the space of unit rows.

    ``variances`` float64 ``[d]`` along the columns of ``axes`` ``[d, d]``; ``least`` is the
    variance that whitening takes a smaller one for.
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor
    least: float

    @property
    def scale(self) -> Tensor:
        """What whitening multiplies each axis by."""
        return self.variances.clamp_min(self.least).rsqrt()

    def whitened(self, rows: Tensor) -> Tensor:
        """Return the classifier's inputs ``[n, d + 1]``: equal spread, norm 1, intercept."""
        moved = (rows - self.mean.float()) @ (self.axes * self.scale).float()
        return functional.pad(functional.normalize(moved), (0, 1), value=INTERCEPT)

    def draw(self, records: int) -> Tensor:
        """Return unit rows, float32, by the secure source of randomness."""
        rows = torch.zeros(records, len(self.mean))
        add_noise(rows, 1.0)
        rows = rows @ (self.axes * self.variances.sqrt()).T.float() + self.mean.float()
        return functional.normalize(rows)


def fit_cloud(rows: Tensor, budget: Budget) -> Cloud:
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
    return Cloud(mean, variances, axes, max(edge, _WHITEN_MIN * typical))


def fit_weights(inputs: Tensor, labels: Tensor, counts: Tensor, budget: Budget) -> Tensor:
    """Release residual sums, and descend along each; float64 ``[d + 1, classes]``."""
    count = len(inputs)
    charge = budget.charge(_RESIDUALS, 2.0 * _RESIDUAL_MAX, ROUNDS)
    weights = torch.zeros(inputs.shape[1], len(counts), dtype=torch.float64)
    weights[-1] = (counts.clamp_min(1.0) / count).log() / INTERCEPT
    signal = budget.mu * count
    step, decay = min(_STEP_MAX, _STEP * signal), _DECAY / signal
    start, speed = weights, torch.zeros_like(weights)
    for turn in range(ROUNDS):
        told = noisy(residual_sums(inputs, labels, weights, _RESIDUAL_MAX), charge.sigma)
        speed = _MOMENTUM * speed + told / count + decay * (weights - start)
        weights = weights - step * (1.0 - turn / ROUNDS) * speed
    return weights


# -- what comes in ---------------------------------------------------------------------------


def collect(batches: Batches, classes: int) -> tuple[Tensor, Tensor]:
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
