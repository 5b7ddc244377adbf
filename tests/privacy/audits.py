"""What a distinguishing game says of epsilon."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

FALSE_ALARM = 1e-6


def lower_bound(
    seen_one: NDArray[np.floating],
    seen_other: NDArray[np.floating],
    grid: NDArray[np.floating],
    delta: float,
) -> float:
    """Return a lower bound of epsilon from what was seen under each of two neighbours.

    The attacker guesses at the best threshold of a grid. Bounds on its error rates (Clopper
    and Pearson, over the whole grid) give epsilon (Kairouz et al.).
    """
    best, games = 0.0, len(seen_one)
    alpha = FALSE_ALARM / (2 * len(grid))
    for threshold in grid:
        right, wrong = int((seen_one > threshold).sum()), int((seen_other > threshold).sum())
        at_least = beta.ppf(alpha, right, games - right + 1) if right else 0.0
        at_most = beta.ppf(1 - alpha, wrong + 1, games - wrong) if wrong < games else 1.0
        if at_least > delta:
            best = max(best, math.log((at_least - delta) / at_most))
    return best
