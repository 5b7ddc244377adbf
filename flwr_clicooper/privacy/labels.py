"""Secret label mapping: trainers learn pseudo-classes whose names only the owner knows.

Record ``i`` of class ``c`` always goes to the same one of ``expansion`` pseudo-classes of
``c``, chosen by a keyed pseudo-random function of its id; all pseudo-classes are permuted
by the key. (To draw anew each epoch would show which pseudo-classes belong together.)

What this protects is the *names* of the classes, and a stolen model: it answers in
pseudo-classes. It does not hide the *grouping*: who sees activations can merge
pseudo-classes whose activations look alike. `flip` adds randomised response, which holds
against every attack and is stated as a label epsilon.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_clicooper.errors import DataError, OptionError, StateError

KEY_BYTES = 32
_WORD = 2**64


class SecretLabelMap:
    """Classes to pseudo-classes and back.

    Parameters
    ----------
    num_classes : int
        Classes, at least 2.
    expansion : int
        Pseudo-classes per class, at least 1.
    key : bytes
        32 secret bytes; the same key gives the same map on every machine.

    Raises
    ------
    OptionError
        A value is out of its range.
    """

    def __init__(self, num_classes: int, expansion: int, key: bytes) -> None:
        if num_classes < 2 or expansion < 1:
            raise OptionError(
                f"{num_classes} classes with label-expansion {expansion}; allowed are at "
                "least 2 classes and an expansion of at least 1"
            )
        if len(key) != KEY_BYTES:
            raise OptionError(f"the label key has {len(key)} bytes; allowed are {KEY_BYTES}")
        self.num_classes = num_classes
        self.expansion = expansion
        self._key = key
        # Row c has the pseudo-classes of class c.
        self._table = self._permutation().reshape(num_classes, expansion)

    @property
    def pseudo_classes(self) -> int:
        """How many outputs the trained model has."""
        return self.num_classes * self.expansion

    def encode(self, labels: Tensor, ids: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the pseudo-class of each record.

        Parameters
        ----------
        labels : Tensor
            Class indices, int64 ``[n]``.
        ids : sequence of int
            What names each record, once and for all.

        Raises
        ------
        DataError
            A label is not a class, or there is not one id per label.
        """
        if labels.ndim != 1 or len(labels) != len(ids):
            raise DataError(
                f"{len(ids)} ids came for labels of shape {list(labels.shape)}; allowed is "
                "one label and one id per record"
            )
        if labels.numel() and bool((labels.amin() < 0) | (labels.amax() >= self.num_classes)):
            raise DataError(
                f"a label is out of range; allowed are 0 to {self.num_classes - 1}"
            )
        members = [self._word("member", int(i)) % self.expansion for i in ids]
        return self._table[labels.long(), torch.tensor(members, dtype=torch.int64)]

    def decode(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each class, from pseudo-logits.

        Parameters
        ----------
        logits : Tensor
            ``[..., pseudo_classes]``.

        Returns
        -------
        Tensor
            ``[..., num_classes]``: each class has the probability of its pseudo-classes
            together, so it is an answer in the usual sense.

        Raises
        ------
        DataError
            The last dimension is not the number of pseudo-classes.
        """
        if logits.shape[-1:] != (self.pseudo_classes,):
            raise DataError(
                f"the model gives {list(logits.shape)}; its last dimension must be "
                f"{self.pseudo_classes}, one per pseudo-class"
            )
        log_probabilities = torch.log_softmax(logits, dim=-1)
        return torch.logsumexp(log_probabilities[..., self._table.to(logits.device)], dim=-1)

    def _permutation(self) -> Tensor:
        """Return a permutation of all pseudo-classes that only the key gives."""
        order = list(range(self.pseudo_classes))
        for last in range(len(order) - 1, 0, -1):  # Fisher and Yates
            other = self._below(last + 1, last)
            order[last], order[other] = order[other], order[last]
        return torch.tensor(order, dtype=torch.int64)

    def _below(self, bound: int, place: int) -> int:
        """Return a uniform number below a bound; rejection leaves no bias."""
        attempt = 0
        while (word := self._word(f"order/{attempt}", place)) >= _WORD - _WORD % bound:
            attempt += 1
        return word % bound

    def _word(self, purpose: str, number: int) -> int:
        text = f"clicooper/labels/v1/{purpose}/{number}".encode()
        return int.from_bytes(hmac.digest(self._key, text, hashlib.sha256)[:8], "big")


def new_key() -> bytes:
    """Return a new secret key."""
    return secrets.token_bytes(KEY_BYTES)


def save_key(path: Path, key: bytes) -> None:
    """Write a key to a file that only its owner may read; an existing file stays.

    Raises
    ------
    StateError
        The file exists.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise StateError(f"{path} exists; a label key is never overwritten") from error
    with os.fdopen(handle, "wb") as file:
        file.write(key.hex().encode() + b"\n")


def load_key(path: Path) -> bytes:
    """Return the key of a file.

    Raises
    ------
    StateError
        The file is missing, others may read it, or it does not hold a key.
    """
    try:
        text, mode = path.read_text(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"the label key {path} cannot be read") from error
    if mode & 0o077:
        raise StateError(f"others may read the label key {path}; use chmod 600")
    try:
        key = bytes.fromhex(text.strip())
    except ValueError as error:
        raise StateError(f"{path} does not hold a label key: it is not hexadecimal") from error
    if len(key) != KEY_BYTES:
        raise StateError(f"{path} does not hold a label key: it has {len(key)} bytes")
    return key


def keep_probability(epsilon: float, classes: int) -> float:
    """Return the probability with which randomised response tells the truth.

    ``k``-ary randomised response (Warner, 1965; Kairouz et al., 2014) is
    epsilon-differentially private for the label of one record.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise OptionError(f"label-epsilon is {epsilon}; allowed is a number above 0")
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def flip(labels: Tensor, classes: int, epsilon: float) -> Tensor:
    """Return labels after randomised response, by a secure source of randomness.

    Parameters
    ----------
    labels : Tensor
        Class indices, int64.
    classes : int
        Number of classes.
    epsilon : float
        Per-record label differential privacy of one call. Labels are flipped once and
        kept; each further call would be charged again.
    """
    keep = keep_probability(epsilon, classes)
    source = secrets.SystemRandom()
    flat = labels.reshape(-1).tolist()
    # One of the others, uniformly, so that the truth has its probability exactly.
    told = [
        label
        if source.random() < keep
        else (label + 1 + source.randrange(classes - 1)) % classes
        for label in flat
    ]
    return torch.tensor(told, dtype=torch.int64).reshape(labels.shape)
