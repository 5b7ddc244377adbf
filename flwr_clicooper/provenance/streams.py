"""What went in and out of a segment: one Merkle root per stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from blake3 import blake3

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.fields import canonical, integer, mapped, parsed, refuse
from flwr_clicooper.provenance.log import MerkleLog

STREAMS = (
    "activations-in",
    "activations-out",
    "gradients-in",
    "gradients-out",
    "labels-in",
    "labels-out",
    "states",
)
"""Their names, as `docs/attestation.md` explains them."""

Position = tuple[int, int, int]
"""Round, step and micro-batch of a leaf, each from 0."""
Data = bytes | bytearray | memoryview

_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_LEAF = 3 * 8 + 32
_MAX_HEADER = 1024


def framed(*parts: str | Data) -> bytes:
    """Return texts or bytes, each preceded by its length as an 8-byte big-endian integer."""
    found = (part.encode() if isinstance(part, str) else bytes(part) for part in parts)
    return b"".join(len(part).to_bytes(8, "big") + part for part in found)


def arrays_digest(arrays: Iterable[tuple[str, str, Sequence[int], Data]]) -> bytes:
    """Return the digest of a set of arrays, 32 bytes.

    It is BLAKE3, several times as fast as SHA-256 on vector units: every party hashes
    every tensor of a step, twice the chain's traffic.

    Parameters
    ----------
    arrays : iterable of (str, str, sequence of int, bytes)
        Name, dtype such as ``float32``, shape, and data, row-major and little-endian,
        without header. Their order does not matter: names that are integers come first,
        by value, then the others, by Unicode code points.

    Raises
    ------
    EvidenceError
        A name occurs twice.
    """
    found: dict[str, tuple[str, Sequence[int], Data]] = {}
    for name, dtype, shape, data in arrays:
        if name in found:
            raise EvidenceError(f"two arrays have the same name {name[:64]!r}")
        found[name] = (dtype, shape, data)
    hashed = blake3()
    for name in sorted(found, key=_order):
        dtype, shape, data = found[name]
        hashed.update(framed(name, dtype, ",".join(map(str, shape))))
        view = memoryview(data)
        hashed.update(view.nbytes.to_bytes(8, "big"))
        if view.nbytes:  # without, there is nothing to cast
            hashed.update(view.cast("B"))  # not by `framed`, which would copy it
    return hashed.digest()


def leaf(position: Position, digest: bytes) -> bytes:
    """Return the leaf of a stream, 56 bytes: what `check_inclusion` takes.

    Raises
    ------
    EvidenceError
        The position has no place in a stream, or the digest has not 32 bytes.
    """
    if not isinstance(position, tuple) or len(position) != 3:
        raise refuse("a position", "round, step and micro-batch")
    for value in position:
        integer()(value, "a position")
    if not isinstance(digest, bytes) or len(digest) != 32:
        raise refuse("a digest", "32 bytes")
    return b"".join(value.to_bytes(8, "big") for value in position) + digest


class Streams:
    """The leaves of a round's streams, which may come in any order."""

    def __init__(self) -> None:
        self._leaves: dict[str, dict[Position, bytes]] = {}

    def add(self, stream: str, round: int, step: int, microbatch: int, digest: bytes) -> None:
        """Add a leaf, or replace the one in the same place.

        Parameters
        ----------
        stream : str
            One of `STREAMS`.
        round, step, microbatch : int
            Its place, from 0.
        digest : bytes
            What `arrays_digest` gives.

        Raises
        ------
        EvidenceError
            There is no such stream or place, or the digest has not 32 bytes.
        """
        if stream not in STREAMS:
            raise refuse("a stream", " or ".join(STREAMS))
        position = (round, step, microbatch)
        self._leaves.setdefault(stream, {})[position] = leaf(position, digest)

    def update(self, other: Streams) -> None:
        """Add all leaves of others, which replace those in the same place."""
        for stream, leaves in other._leaves.items():
            self._leaves.setdefault(stream, {}).update(leaves)

    def agrees(self, other: Streams) -> bool:
        """Return whether no leaf of others is another one in the same place."""
        return all(
            self._leaves.get(stream, {}).get(position, data) == data
            for stream, leaves in other._leaves.items()
            for position, data in leaves.items()
        )

    def count(self, stream: str) -> int:
        """Return how many leaves a stream has."""
        return len(self._leaves.get(stream, ()))

    def has(self, stream: str, position: Position) -> bool:
        """Return whether a stream has a leaf in a place."""
        return position in self._leaves.get(stream, ())

    def positions(self, stream: str) -> list[Position]:
        """Return where a stream has leaves, in order."""
        return sorted(self._leaves.get(stream, ()))

    def digest(self, stream: str, position: Position) -> bytes:
        """Return what `add` got for a place.

        Raises
        ------
        EvidenceError
            There is no such leaf.
        """
        if position not in self._leaves.get(stream, ()):
            raise EvidenceError(f"stream {stream!r} has no leaf at {position}")
        return self._leaves[stream][position][-32:]

    def root(self, stream: str) -> str:
        """Return the root of a stream in hex, or ``""`` when it has no leaves."""
        return MerkleLog(self._sorted(stream)).root().hex() if self.count(stream) else ""

    def roots(self) -> dict[str, str]:
        """Return the root of each stream that has leaves."""
        return {stream: self.root(stream) for stream in STREAMS if self.count(stream)}

    def prove(self, stream: str, position: Position) -> tuple[int, int, list[bytes]]:
        """Return index, size and audit path of a leaf, for `check_inclusion`.

        Raises
        ------
        EvidenceError
            There is no such leaf.
        """
        places = sorted(self._leaves.get(stream, ()))
        if position not in places:
            raise EvidenceError(f"the stream has no leaf at {position}: nothing to prove")
        index = places.index(position)
        return index, len(places), MerkleLog(self._sorted(stream)).inclusion(index)

    def clear(self, *streams: str) -> None:
        """Forget the leaves of some streams, or of all when none is named."""
        for stream in streams or tuple(self._leaves):
            self._leaves.pop(stream, None)

    def forget_rounds(self) -> None:
        """Forget the leaves of rounds; what came or went as a whole, in chunks, stays."""
        for leaves in self._leaves.values():
            for position in [it for it in leaves if it[0]]:
                del leaves[position]

    def to_bytes(self) -> bytes:
        """Return everything as bytes, 56 per leaf and a short head."""
        found = [stream for stream in STREAMS if self.count(stream)]
        head = canonical({stream: self.count(stream) for stream in found})
        return b"\n".join((head, b"".join(b"".join(self._sorted(it)) for it in sorted(found))))

    @classmethod
    def from_bytes(cls, data: bytes) -> Streams:
        """Return what `to_bytes` gave.

        Raises
        ------
        EvidenceError
            The bytes are anything else.
        """
        head, _, body = data.partition(b"\n")
        what = "stored streams"
        counts = parsed(head, what, _MAX_HEADER)
        counts = mapped(lambda name, _: str(name), integer(1))(counts, what)
        if len(body) != _LEAF * sum(counts.values()):
            raise EvidenceError(f"{what} are damaged")
        found, start = cls(), 0
        for stream in sorted(counts):
            for _ in range(counts[stream]):
                part = body[start : start + _LEAF]
                values = [int.from_bytes(part[i : i + 8], "big") for i in (0, 8, 16)]
                found.add(stream, values[0], values[1], values[2], part[24:])
                start += _LEAF
        if found.to_bytes() != data:
            raise EvidenceError(f"{what} are damaged")
        return found

    def _sorted(self, stream: str) -> list[bytes]:
        found = self._leaves.get(stream, {})
        return [found[position] for position in sorted(found)]


def _order(name: str) -> tuple[bool, int, str]:
    number = bool(_NUMBER.fullmatch(name))
    return not number, int(name) if number else 0, name
