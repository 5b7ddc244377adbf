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
from collections.abc import Iterator, Sequence
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
        return self.joint((batch,))[0]

    def joint(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Return batches of the same records, released as one.

        A record is its row over all batches: ``clip`` bounds the norm of that whole row,
        so `sensitivity` is that of all batches together, not of each.

        Parameters
        ----------
        batches : sequence of Tensor
            At least one, each ``[records, ...]``; row ``i`` of each belongs to record ``i``.

        Raises
        ------
        DataError
            As for one batch, or there is no batch, or they differ in their number of
            records.
        """
        released = self._released(batches, self.sigma)
        return [
            values.to(batch.dtype) if batch.is_floating_point() else values
            for values, batch in zip(released, batches, strict=True)
        ]

    def clipped(self, batch: Tensor) -> Tensor:
        """Return a clipped copy of a batch, float32 or float64, without noise."""
        return self._released((batch,), 0.0)[0]

    def _released(self, batches: Sequence[Tensor], sigma: float) -> list[Tensor]:
        rows = [_rows(batch) for batch in batches]
        sizes = [len(values) for values in rows]
        if len(set(sizes)) != 1:
            raise DataError(
                f"batches of {sizes} records came; a joint release takes at least one batch, "
                "and all of the same records"
            )
        out = [
            torch.empty_like(values, memory_format=torch.contiguous_format) for values in rows
        ]
        # Clipped and noised block by block, while the block is in the processor's cache.
        step = max(1, _BLOCK // max(1, sum(values.shape[1] for values in rows)))
        starts = range(0, sizes[0], step)

        def release(start: int) -> None:
            here = slice(start, start + step)
            self._clip([v[here] for v in rows], [v[here] for v in out])
            for values in out:
                if sigma:
                    _add_to(values[here].reshape(-1).numpy(), sigma)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(release, starts):
                pass
        return [v.reshape(batch.shape) for v, batch in zip(out, batches, strict=True)]

    def _clip(self, rows: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write clipped rows."""
        if self.unit == RECORD:
            scale = self._scale(rows)
        for values, place in zip(rows, out, strict=True):
            place.copy_(self._cut(values) if self.unit == ELEMENT else _scaled(values, scale))

    def _cut(self, rows: Tensor) -> Tensor:
        _check_finite(rows.aminmax() if rows.numel() else ())
        return rows.clamp(-self.clip, self.clip)

    def _scale(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the factor, at most 1, of each record."""
        norm, *others = (torch.linalg.vector_norm(v, dim=1, dtype=torch.float64) for v in rows)
        for other in others:
            norm = torch.hypot(norm, other)
        _check_finite((norm,))
        # A record of norm zero stays as it is.
        scale: Tensor = (self.clip * _MARGIN / norm.clamp_min(1e-300)).clamp_max(1.0)
        return scale


def _rows(batch: Tensor) -> Tensor:
    """Return a batch as float32 or float64 ``[records, elements]``."""
    if batch.ndim == 0 or batch.is_complex():
        raise DataError(
            f"a release takes real tensors of records; this one is "
            f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
        )
    wide = batch.dtype == torch.float64
    values = batch.detach().to(torch.float64 if wide else torch.float32)
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    # A factor below the smallest normal number would lose digits, and with them the
    # bound; its root does not.
    root = scale.sqrt().to(rows.dtype)[:, None]
    tiny = bool((scale < torch.finfo(rows.dtype).tiny).any())
    scaled: Tensor = rows * root * root if tiny else rows * scale.to(rows.dtype)[:, None]
    return scaled


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
