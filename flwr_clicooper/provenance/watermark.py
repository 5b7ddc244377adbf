"""Keyed marks in a segment's weights: 256 bits per round that only the key finds again.

After Uchida et al., "Embedding Watermarks into Deep Neural Networks" (ICMR 2017): bit j is
the sign of ``x_j . w``. Here ``w`` are 16,384 of the segment's weights, which the key chooses
and shares out among the bits, 64 for each, and ``x_j`` has a pseudo-random sign, over
``sqrt(64)``, for each of its 64. No two bits share a weight, so the rows of ``X`` are
orthonormal, and a mark costs next to nothing to set or to find.

A round sets its bits at its first step (`Watermark.top_up`), so that it trains around them;
pushes the weights towards them (`Watermark.push`); and sets them again at its end.

Without the key nothing is known of the signs, so a model that has nothing to do with the key
matches each bit with probability 1/2 at most, independently of the others, whatever its
weights are: matches are Binomial(256, 1/2). A watermark says where weights come from. It
does not prove training.

What is computed is exact, so an audit that has the same weights and the key gets the same
result on every machine: weights are rounded to 19 bits of the largest one, and their sums
and the sums of their squares are whole numbers that float64 holds, in whatever order a
library adds them. What follows is elementwise, and roots: IEEE 754 prescribes each result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.provenance.streams import framed

BITS = 256
ACCEPT = 208
"""Matches from which on a mark counts as found: by chance with a probability of 2^-81."""
LOG2_BOUND = -64.0
"""What chance may reach at most over all comparisons of a claim, as a power of two."""
STRENGTH = 0.02
"""The weight of the hinge loss in the segment's loss."""
EVERY = 10
"""Optimizer steps from one push to the next."""
MARGIN = 1.5
"""By how many standard deviations of the chosen weights a bit must hold; 2 cost accuracy."""
SLACK = 1.02
"""How much further than its margin a bit is set."""
WEIGHTS = 16_384
"""Weights that carry a mark. Segments with fewer get none: it would cost accuracy."""
KEY_BYTES = 32
_ITERATIONS = 20
_EACH = WEIGHTS // BITS


def round_key(
    secret: bytes, chain: bytes, *, run: str, segment: int, round: int, signer: PublicIdentity
) -> bytes:
    """Return the key of one round's watermark, by HKDF-SHA256 (RFC 5869).

    Parameters
    ----------
    secret : bytes
        The trainer's watermark secret, at least 32 bytes.
    chain : bytes
        32 bytes of the statement that carries the key's commitment.
    run : str
        The run's ID.
    segment, round : int
        What the watermark is for: a segment, and the round after that statement.
    signer : PublicIdentity
        The trainer's identity.

    Returns
    -------
    bytes
        32 bytes.

    Raises
    ------
    EvidenceError
        The secret or the chain does not have its length.
    """
    if len(secret) < KEY_BYTES or len(chain) != KEY_BYTES:
        raise EvidenceError(
            f"a watermark secret of {len(secret)} bytes and a chain of {len(chain)}; allowed "
            f"are at least {KEY_BYTES} bytes and {KEY_BYTES}"
        )
    info = framed("clicooper/wm/v1", run, str(segment), str(round), signer.digest.hex())
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=chain, info=info).derive(secret)


def commitment(key: bytes) -> str:
    """Return the SHA-256 of a key in hex, which is published before the key is used."""
    return hashlib.sha256(key).hexdigest()


def markable(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that can carry a mark, sorted.

    These are floating-point tensors of two dimensions or more whose name says ``weight``:
    those of linear layers, convolutions, embeddings, and recurrent layers.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        A segment's parameters and buffers by name.
    """
    return sorted(
        name
        for name, tensor in tensors.items()
        if tensor.ndim >= 2 and tensor.is_floating_point() and "weight" in name.split(".")[-1]
    )


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def too_small(tensors: Mapping[str, Tensor]) -> str:
    """Say in words why tensors are too few for a watermark; empty if they are not."""
    return _too_few(sum(tensors[name].numel() for name in markable(tensors)))


def skip_reason(module: nn.Module) -> str:
    """Say in words why a segment cannot carry a watermark; empty if it can."""
    tensors = _named(module)
    sizes = {name: tensors[name].numel() for name in markable(tensors)}
    learn = sum(size for name, size in sizes.items() if tensors[name].requires_grad)
    if reason := _too_few(learn):
        return reason
    if 2 * learn < sum(sizes.values()):
        return "most of the segment's weights do not learn"
    return ""


class _Place(NamedTuple):
    """The chosen weights of one tensor."""

    name: str
    shape: torch.Size
    at: Tensor
    columns: slice


class Watermark:
    """The marks of one key in segments of one layout; made anew each round.

    Parameters
    ----------
    key : bytes
        32 bytes, see `round_key`.
    tensors : mapping of str to Tensor
        The segment's parameters and buffers, under the names by which they are delivered;
        only names, shapes and dtypes are read.

    Raises
    ------
    EvidenceError
        The key does not have 32 bytes, or the segment has fewer than `WEIGHTS` weights.
    """

    def __init__(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        if len(key) != KEY_BYTES:
            raise EvidenceError(
                f"a watermark key has {len(key)} bytes; allowed are {KEY_BYTES}"
            )
        if reason := too_small(tensors):
            raise EvidenceError(f"no watermark fits: {reason}")
        names = markable(tensors)
        chosen, self._order = _choose(key, sum(tensors[name].numel() for name in names))
        self._places = list(_places(names, tensors, chosen))
        self._signs = _signs(key, b"proj", WEIGHTS).reshape(BITS, _EACH)
        self._bits = _signs(key, b"bits", BITS)

    @torch.no_grad()
    def push(self, module: nn.Module, strength: float = STRENGTH) -> None:
        """Add the gradient of the hinge loss to the gradients of a segment, in place.

        The loss is ``strength * sum_j max(0, tau - b_j x_j . w)`` with ``tau`` `MARGIN`
        standard deviations of the chosen weights as they are now: it follows from key and
        weights alone.

        Parameters
        ----------
        module : nn.Module
            The segment; parameters without a gradient get one.
        strength : float
            The weight of the loss.

        Raises
        ------
        EvidenceError
            The segment is not of this layout, or has weights that are NaN or infinite.
        """
        tensors = _named(module)
        sums, least = self._project(tensors)
        wrong = self._bits * sums < least
        if not wrong.any():
            return
        steps = np.where(wrong, self._bits, 0) * (-strength / math.sqrt(_EACH))
        for weight, at, change in self._changes(tensors, steps):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            _add(weight.grad, at, change)

    @torch.no_grad()
    def top_up(self, module: nn.Module) -> int:
        """Make all bits hold by the least change of the weights that learn.

        For the bits V that do not hold by ``tau`` (as in `push`, of the weights before),
        ``dw = X_V^T (X_V X_V^T)^-1 (1.02 tau b_V - X_V w)``. It is repeated until all hold
        in the weights as their dtype rounds them.

        Parameters
        ----------
        module : nn.Module
            The segment, changed in place.

        Returns
        -------
        int
            Matches afterwards: `BITS`.

        Raises
        ------
        EvidenceError
            The segment is not of this layout, has weights that are NaN or infinite or all
            the same, or its weights cannot hold the bits.
        """
        tensors = _named(module)
        sums, least = self._project(tensors)
        if least == 0.0:
            raise EvidenceError("the watermark cannot be set: all weights are the same")
        movable = np.maximum(self._learning(tensors), 1)
        for _ in range(_ITERATIONS):
            wrong = self._bits * sums < least
            if not wrong.any():
                return BITS
            steps = np.where(wrong, SLACK * least * self._bits - sums, 0.0) / movable
            for weight, at, change in self._changes(tensors, steps):
                _add(weight, at, change)
            sums, _ = self._project(tensors)
        raise EvidenceError(
            f"the watermark cannot be set: {int(wrong.sum())} of {BITS} bits do not hold; the "
            "segment has too few weights that learn, or their dtype is too coarse"
        )

    def matches(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many of the 256 bits some weights carry.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            Weights by name; what else is in it is not read.

        Raises
        ------
        EvidenceError
            A weight is missing, has another shape, or is NaN or infinite.
        """
        sums, _ = self._project(tensors)
        return int((self._bits * sums > 0.0).sum())

    def _project(self, tensors: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], float]:
        """Return ``sqrt(k) x_j . w`` for each j, and ``sqrt(k) tau``, both exact."""
        parts = []
        for name, shape, at, _ in self._places:
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape:
                found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise EvidenceError(f"weight {name!r} is {found}; allowed is {list(shape)}")
            flat = tensor.detach().reshape(-1)
            parts.append(flat[at.to(flat.device)].to("cpu", torch.float32))
        weights, unit = _rounded(torch.cat(parts).numpy())
        sums = (weights[self._order].reshape(BITS, _EACH) * self._signs).sum(axis=1)
        # Not `weights @ weights`: the threads of BLAS would wait for those of PyTorch.
        total, squares = int(weights.sum()), int(np.square(weights).sum())
        deviation = math.sqrt(WEIGHTS * squares - total**2) / WEIGHTS
        return sums * unit, MARGIN * deviation * unit * math.sqrt(_EACH)

    def _learning(self, tensors: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """Return how many of each bit's weights learn, ``[256]``."""
        flags = np.zeros(WEIGHTS, dtype=np.int64)
        for place in self._places:
            flags[place.columns] = tensors[place.name].requires_grad
        counts: NDArray[np.int64] = flags[self._order].reshape(BITS, _EACH).sum(axis=1)
        return counts

    def _changes(
        self, tensors: Mapping[str, Tensor], steps: NDArray[np.float64]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each tensor that learns, where its weights are, and the steps they take."""
        change = np.empty(WEIGHTS)
        change[self._order] = (self._signs * steps[:, None]).reshape(-1)
        for place in self._places:
            if len(place.at) and tensors[place.name].requires_grad:
                yield tensors[place.name], place.at, torch.from_numpy(change[place.columns])


def log2_false_positive(matches: int, tests: int = 1) -> float:
    """Return the probability that chance reaches some matches, as a power of two.

    The tail of Binomial(256, 1/2) in exact integers, times the comparisons (Bonferroni).

    Parameters
    ----------
    matches : int
        0 to 256.
    tests : int
        Comparisons made: keys x suspects, at least 1.
    """
    if not 0 <= matches <= BITS or tests < 1:
        raise EvidenceError(
            f"{matches} matches in {tests} comparisons; allowed are 0 to {BITS} in 1 or more"
        )
    tail = sum(math.comb(BITS, k) for k in range(matches, BITS + 1)) * tests
    return min(0.0, math.log2(tail) - BITS)


def is_accepted(matches: int, tests: int = 1) -> bool:
    """Return whether a mark is there: `ACCEPT` matches, and chance below `LOG2_BOUND`."""
    return matches >= ACCEPT and log2_false_positive(matches, tests) <= LOG2_BOUND


def _too_few(count: int) -> str:
    if count >= WEIGHTS:
        return ""
    return (
        f"{count:,} weights of linear layers and convolutions can carry one; "
        f"allowed are at least {WEIGHTS:,}"
    )


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also by the second name of a shared one."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _signs(key: bytes, purpose: bytes, count: int) -> NDArray[np.float64]:
    """Return signs of a key, a multiple of eight; the highest bit of a byte comes first."""
    data = np.frombuffer(hashlib.shake_256(key + purpose).digest(count // 8), np.uint8)
    return np.unpackbits(data).astype(np.float64) * 2.0 - 1.0


def _choose(key: bytes, total: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return places among all weights, ascending, and the order in which bits take them.

    One is chosen in each of `WEIGHTS` equal stretches; the order is that of other words.
    """
    words = np.frombuffer(hashlib.shake_256(key + b"pick").digest(8 * WEIGHTS), "<u8")
    numbers = np.arange(WEIGHTS + 1, dtype=np.int64)
    ends = numbers * total // WEIGHTS
    chosen = ends[:-1] + (words >> np.uint64(32)).astype(np.int64) % np.diff(ends)
    numbered = words << np.uint64(32) | numbers[:-1].astype(np.uint64)
    return chosen, (np.sort(numbered) & np.uint64(2**32 - 1)).astype(np.int64)


def _places(
    names: list[str], tensors: Mapping[str, Tensor], chosen: NDArray[np.int64]
) -> Iterator[_Place]:
    first = 0
    for name in names:
        after = first + tensors[name].numel()
        start, stop = np.searchsorted(chosen, (first, after)).tolist()
        at = torch.from_numpy(chosen[start:stop] - first)
        yield _Place(name, tensors[name].shape, at, slice(start, stop))
        first = after


def _rounded(weights: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Return weights as whole numbers of 19 bits, and their unit, a power of two.

    Sums of 16,384 of them, and of their squares, stay below 2^53: float64 adds them
    without rounding, in any order.
    """
    largest = float(np.abs(weights).max())
    if not math.isfinite(largest):
        raise EvidenceError("weights of the segment are NaN or infinite")
    unit = math.ldexp(1.0, math.frexp(largest)[1] - 19)
    return np.rint(weights.astype(np.float64) / unit), unit


def _add(target: Tensor, at: Tensor, change: Tensor) -> None:
    """Add to some elements in place, rounding once; the target may have any strides."""
    flat, at = target.detach().reshape(-1), at.to(target.device)
    flat[at] = (flat[at].double() + change.to(target.device)).to(flat.dtype)
    if flat.data_ptr() != target.data_ptr():
        target.copy_(flat.view(target.shape))
