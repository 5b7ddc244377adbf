"""What is done to activations before they leave: clip each record, then add Gaussian noise.

The noise is made of the key stream of AES-256 in counter mode, under a key that the
operating system's entropy gives anew for each block and that nobody keeps. So it follows
from nothing that anybody else has: not from the run's public seed, not from PyTorch's or
NumPy's global generators, not from the noise of another block. Values and noise are
floating-point numbers; attacks on the last bits of them (Mironov, 2012) are not covered.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from flwr_clicooper.errors import DataError, OptionError

RECORD, ELEMENT = "record", "element"
_BLOCK = 2**18
"""Numbers that get their noise from one key; blocks are noised side by side."""
_PAIRS = 2**16
"""Pairs of numbers that are drawn at once, so that they stay in the processor's cache."""
_ZEROS = bytes(16 * _PAIRS)
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
            if self.unit == RECORD:
                _write_scaled(values, scale, place)
            else:
                _check_finite(values.aminmax() if values.numel() else ())
                torch.clamp(values, -self.clip, self.clip, out=place)

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


def _write_scaled(rows: Tensor, scale: Tensor, out: Tensor) -> None:
    # A factor below the smallest normal number would lose digits, and with them the
    # bound; its root does not.
    if bool((scale < torch.finfo(rows.dtype).tiny).any()):
        root = scale.sqrt().to(rows.dtype)[:, None]
        torch.mul(rows, root, out=out).mul_(root)
    else:
        torch.mul(rows, scale.to(rows.dtype)[:, None], out=out)


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
    key = algorithms.AES(secrets.token_bytes(32))
    stream = Cipher(key, modes.CTR(bytes(16))).encryptor()  # a new key, so any first count
    for start in range(0, len(block), 2 * _PAIRS):
        part = block[start : start + 2 * _PAIRS]
        noise = _gaussian(stream, -(-len(part) // 2), part.dtype)
        noise *= sigma
        part += noise[: len(part)]


def _gaussian(
    stream: CipherContext, pairs: int, dtype: np.dtype[np.floating]
) -> NDArray[np.floating]:
    """Return independent standard normal numbers by the method of Box and Muller (1958).

    A pair takes 64 bits for its distance from zero, in float64: distances reach 9.4, and
    are told apart down to 1e-8. It takes 32 bits for its angle, for float64 numbers 64.
    """
    turn = np.dtype(np.int64 if dtype == np.float64 else np.int32)
    size = (8 + turn.itemsize) * pairs
    bits = np.empty(size + 16, np.uint8)  # the cipher asks for a block to spare
    stream.update_into(memoryview(_ZEROS)[:size], bits.data)
    uniform = bits[: 8 * pairs].view(np.uint64).astype(np.float64)
    uniform += 1.0  # of 1 to 2**64, never 0
    uniform *= 2.0**-64
    distance = np.log(uniform, out=uniform).astype(dtype)
    distance *= -2.0
    np.sqrt(distance, out=distance)
    angle = bits[8 * pairs : size].view(turn).astype(dtype)
    angle += 0.5  # between two steps, where no sine is zero
    angle *= 2.0 * np.pi * 2.0 ** (-8 * turn.itemsize)
    noise = np.empty((2, pairs), dtype)
    np.cos(angle, out=noise[0])
    np.sin(angle, out=noise[1])
    noise *= distance
    return noise.reshape(-1)


def _check_finite(extremes: tuple[Tensor, ...]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in extremes):
        raise DataError("a record to release holds NaN or infinity")
