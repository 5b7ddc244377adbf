"""Records in seals: each array opens only for its receiver, and only in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord

from flwr_clicooper.errors import SealError
from flwr_clicooper.privacy.sealing import KeyRing, Order

SEALED = "clicooper.sealed"
"""Serialisation type of a sealed array, before its number and its own type."""
_DIGITS = 18

Place = Sequence[int | str]
"""What a record belongs to, such as round and step; both ends must come to the same."""


@dataclass
class RecordSealer:
    """Seals and opens whole records, and counts them on their way.

    Attributes
    ----------
    ring : KeyRing
        This party's keys.
    order : Order
        The next number of what comes, by channel.
    sent : dict of str to int
        The next number of what goes, by channel.
    """

    ring: KeyRing
    order: Order = field(default_factory=Order)
    sent: dict[str, int] = field(default_factory=dict)

    def seal(
        self,
        name: str,
        record: ArrayRecord,
        taker: str,
        place: Place,
        *,
        whole: bool = True,
        counted: bool = True,
    ) -> ArrayRecord:
        """Return a record sealed for a party.

        Parameters
        ----------
        whole : bool
            Whether Flower itself carries the message, which takes only ``bytes``.
        counted : bool
            Whether it has a number on its way; else it may be opened at any time.
        """
        channel = f"{name} to {taker}"
        number = self.sent.get(channel, 0) if counted else 0
        self.sent[channel] = number + bool(record)
        found = ArrayRecord()
        for key, array in record.items():
            about = _about(name, key, array, array.stype, number, place)
            sealed = self.ring.seal(taker, about, array.data, _memory)
            stype = f"{SEALED}:{number}:{array.stype}"
            found[key] = _like(array, stype, bytes(sealed) if whole else sealed)
        return found

    def open(
        self,
        name: str,
        record: ArrayRecord,
        giver: str,
        place: Place,
        what: str,
        *,
        counted: bool = True,
    ) -> ArrayRecord:
        """Return a record that a party sealed for this one.

        An array that came as ``bytes``, which is how Flower carries it, is ``bytes`` again;
        one that came as a view over a live link is a view, without a copy.

        Parameters
        ----------
        what : str
            What an error calls it.

        Raises
        ------
        SealError
            It is not sealed, was changed, is not of this place, or not the next one.
        """
        found, numbers = ArrayRecord(), set()
        if not record:  # nothing that could be sealed
            return found
        for key, array in record.items():
            number, stype = _taken_apart(array.stype, what, giver)
            numbers.add(number)
            about = _about(name, key, array, stype, number, place)
            data = self.ring.open(giver, about, array.data, what, _memory)
            whole = isinstance(array.data, bytes)
            found[key] = _like(array, stype, bytes(data) if whole else data)
        if len(numbers) != 1:
            raise SealError(f"{what} from {giver}: its arrays are not of one message")
        if counted:
            self.order.check(f"{name} from {giver}", numbers.pop())
        return found


def is_sealed(record: ArrayRecord) -> bool:
    """Return whether any array of a record is sealed."""
    return any(array.stype.startswith(f"{SEALED}:") for array in record.values())


def _memory(size: int) -> memoryview:
    """Return memory that is not zeroed first, which would take a quarter of the time."""
    return np.empty(size, np.uint8).data


def _like(array: Array, stype: str, data: bytes | memoryview) -> Array:
    """Return an array of the same dtype and shape with other data."""
    found = Array(array.dtype, tuple(array.shape), stype, b"")
    found.data = data  # type: ignore[assignment]  # a view does as well, but is not announced
    return found


def _about(name: str, key: str, array: Array, stype: str, number: int, place: Place) -> bytes:
    shape = list(array.shape)
    return json.dumps([name, key, array.dtype, shape, stype, number, *place]).encode()


def _taken_apart(stype: str, what: str, giver: str) -> tuple[int, str]:
    """Return the number and the serialisation type of a sealed array."""
    mark, _, rest = stype.partition(":")
    number, _, inner = rest.partition(":")
    if mark != SEALED or not number.isdecimal() or len(number) > _DIGITS:
        raise SealError(f"{what} from {giver} is not sealed")
    return int(number), inner
