"""UCI Adult (Becker and Kohavi, 1996; CC BY 4.0): who earns over 50,000 dollars a year.

The embedded file has the original split of 32,561 training and 16,281 held-out people.
Changed from the original: categories are numbers, with their names beside them.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EMBEDDED = "uci_adult.npz"


def uci_adult() -> dict[str, NDArray[Any]]:
    """Return the people and what they earn.

    Returns
    -------
    dict
        ``x_train`` and ``x_test``, int32 ``[n, 14]``; ``y_train`` and ``y_test``, uint8
        ``[n]``, 1 for over 50,000 dollars; ``columns``, the names of the 14 columns;
        ``cat_<column>`` for each column of categories, their names by number.
    """
    with as_file(files(__package__) / _EMBEDDED) as path, np.load(path) as arrays:
        return dict(arrays)
