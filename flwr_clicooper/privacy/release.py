"""What is done to activations before they leave: clip each record, then add Gaussian noise.

The noise comes from generators that the operating system's entropy seeds anew for each
call, so it follows from nothing that anybody else has: not from the run's public seed, not
from PyTorch's or NumPy's global generators, not from the noise of another call. Values and
noise are floating-point numbers; attacks on the last bits of them (Mironov, 2012) are not
covered.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_clicooper.errors import DataError, OptionError

RECORD, ELEMENT = "record", "element"
_ENTROPY_BITS = 256
_BLOCK = 2**18
"""Numbers that one generator draws; blocks are drawn side by side."""
_MARGIN = 1.0 - 2.0**-20
"""Clipped norms stay below the bound after rounding, too."""


@dataclass(frozen=True)
class GaussianRelease:
    """The Gaussian mechanism for a batch of records.

    Attributes
    ----------
    unit : str
        ``record``: each record is scaled to an L2 norm of at most ``clip``, so replacing
        one moves the release by at most ``2 * clip``. ``element``: each coordinate is cut
        to ``[-clip, clip]``, and what is protected is one coordinate of one record.
    clip : float
        The bound, above 0.
    sigma : float
        Standard deviation of the noise on each coordinate, at least 0.
    """

    unit: str
    clip: float
    sigma: float

    def __post_init__(self) -> None:
        if self.unit not in (RECORD, ELEMENT):
            raise OptionError(f"privacy-unit is {self.unit!r}; allowed are record and element")
        if not 0 < self.clip < float("inf") or not 0 <= self.sigma < float("inf"):
            raise OptionError(
                f"clip is {self.clip} and sigma {self.sigma}; allowed are a finite clip above "
                "0 and a finite sigma of at least 0"
            )

    @property
    def sensitivity(self) -> float:
        """How far replacing one unit can move a release, in L2 norm."""
        return 2.0 * self.clip

    def record_sensitivity(self, elements: int) -> float:
        """Return how far replacing a record of so many elements can move a release."""
        return self.sensitivity * (elements**0.5 if self.unit == ELEMENT else 1.0)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return a batch clipped and noised, in its dtype or, for integers, float32.

        Parameters
        ----------
        batch : Tensor
            ``[records, ...]``, on the CPU; it is not modified.

        Raises
        ------
        DataError
            The batch has no record dimension, is complex, or is not finite.
        """
        clipped = self.clipped(batch)
        if self.sigma:
            add_noise(clipped, self.sigma)
        return clipped.to(batch.dtype) if batch.is_floating_point() else clipped

    def clipped(self, batch: Tensor) -> Tensor:
        """Return a clipped copy of a batch, float32 or float64, without noise."""
        if batch.ndim == 0 or batch.is_complex():
            raise DataError(
                f"a release takes real tensors of records; this one is "
                f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
            )
        wide = batch.dtype == torch.float64
        values = batch.detach().to(torch.float64 if wide else torch.float32)
        rows = values.flatten(1) if values.ndim > 1 else values[:, None]
        if self.unit == ELEMENT:
            _check_finite(rows.aminmax() if rows.numel() else ())
            return rows.clamp(-self.clip, self.clip).reshape(batch.shape)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        _check_finite((norms,))
        # A record of norm zero stays as it is.
        scale = (self.clip * _MARGIN / norms.clamp_min(1e-300)).clamp_max(1.0)
        # A factor below the smallest normal number would lose digits, and with them the
        # bound; its root does not.
        root = scale.sqrt().to(rows.dtype)[:, None]
        tiny = bool((scale < torch.finfo(rows.dtype).tiny).any())
        factor = scale.to(rows.dtype)[:, None]
        clipped: Tensor = rows * root * root if tiny else rows * factor
        return clipped.reshape(batch.shape)


def add_noise(tensor: Tensor, sigma: float) -> None:
    """Add Gaussian noise to a contiguous float32 or float64 CPU tensor in place."""
    flat: NDArray[np.floating] = tensor.view(-1).numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda block: _add_to(block, sigma), _blocks(flat)):
            pass


def _blocks(flat: NDArray[np.floating]) -> Iterator[NDArray[np.floating]]:
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]


def _add_to(block: NDArray[np.floating], sigma: float) -> None:
    seed = np.random.SeedSequence(secrets.randbits(_ENTROPY_BITS))
    generator = np.random.Generator(np.random.Philox(seed))
    noise = generator.standard_normal(len(block), dtype=block.dtype.type)
    noise *= sigma
    block += noise


def _check_finite(extremes: tuple[Tensor, ...]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in extremes):
        raise DataError("a record to release holds NaN or infinity")
