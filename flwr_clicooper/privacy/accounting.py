"""How much noise a guarantee needs, and which guarantee noise gives.

Every mechanism here adds Gaussian noise. One release with sensitivity ``s`` and standard
deviation ``sigma`` is exactly ``mu``-Gaussian differentially private with ``mu = s / sigma``
(Dong, Roth and Su, 2019), several releases compose to the root of the sum of their squares,
and the analytic formula of Balle and Wang (2018) turns ``mu`` into (epsilon, delta). Nothing
is sampled: batches are parts of a public order, so nothing is gained from it either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.special import log_ndtr

from flwr_clicooper.errors import OptionError

_MU_RANGE = (1e-9, 1e4)
_EPSILON_MAX = 1e6
_TOLERANCE = 1e-12


def delta_of(epsilon: float, mu: float) -> float:
    """Return the smallest delta at an epsilon (Balle and Wang, 2018, theorem 8).

    Parameters
    ----------
    epsilon : float
        At least 0.
    mu : float
        Sensitivity over standard deviation, above 0.
    """
    _check("epsilon", epsilon, epsilon >= 0, "at least 0")
    _check("mu", mu, mu > 0, "above 0")
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(0.0, second - first)))


def mu_for(epsilon: float, delta: float) -> float:
    """Return the largest ``mu`` that is (epsilon, delta)-differentially private.

    Raises
    ------
    OptionError
        Epsilon is not above 0, or delta is not between 0 and 1.
    """
    _check("epsilon", epsilon, epsilon > 0, "above 0")
    _check("delta", delta, 0 < delta < 1, "between 0 and 1")
    low, high = _MU_RANGE
    found: float = brentq(lambda mu: delta_of(epsilon, mu) - delta, low, high, xtol=_TOLERANCE)
    # Of the two ends of the last interval take the private one.
    while delta_of(epsilon, found) > delta:
        found *= 1 - 1e-12
    return found


def epsilon_of(delta: float, mu: float) -> float:
    """Return the smallest epsilon at a delta.

    Raises
    ------
    OptionError
        Delta is not between 0 and 1, or ``mu`` is not above 0.
    """
    _check("delta", delta, 0 < delta < 1, "between 0 and 1")
    _check("mu", mu, mu > 0, "above 0")
    if delta_of(0.0, mu) <= delta:
        return 0.0
    found: float = brentq(
        lambda epsilon: delta_of(epsilon, mu) - delta, 0.0, _EPSILON_MAX, xtol=_TOLERANCE
    )
    while delta_of(found, mu) > delta:
        found *= 1 + 1e-12
    return found


def composed(mus: Sequence[float]) -> float:
    """Return the ``mu`` of several releases about the same record together."""
    return math.hypot(*mus)


def noise_for(epsilon: float, delta: float, sensitivity: float, releases: int = 1) -> float:
    """Return the standard deviation that several equal releases need together.

    Parameters
    ----------
    epsilon, delta : float
        What all releases about one record may cost together.
    sensitivity : float
        How far one record can move a release, in L2 norm.
    releases : int
        How often each record is released.

    Raises
    ------
    OptionError
        A value is out of its range.
    """
    _check("sensitivity", sensitivity, sensitivity > 0, "above 0")
    _check("releases", releases, releases >= 1, "at least 1")
    return sensitivity * math.sqrt(releases) / mu_for(epsilon, delta)


def _check(name: str, value: float, right: bool, allowed: str) -> None:
    if not right or not math.isfinite(value):
        raise OptionError(f"{name} is {value}; allowed is a number {allowed}")
