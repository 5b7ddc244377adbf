"""A Merkle tree log as in RFC 6962, with proofs that it only grows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from flwr_clicooper.errors import EvidenceError

EMPTY = hashlib.sha256(b"").digest()
"""The root of a tree without leaves."""


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf, 32 bytes (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node of two subtrees, 32 bytes (RFC 6962, 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class MerkleLog:
    """A tree that grows by one leaf at a time, O(log n) each.

    Parameters
    ----------
    leaves : iterable of bytes
        To begin with. The tree keeps hashes only.
    """

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        # _levels[k][i] is the root of the full subtree over leaves i * 2^k to (i + 1) * 2^k.
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaves:
            self.append(leaf)

    @property
    def size(self) -> int:
        """Leaves so far."""
        return len(self._levels[0])

    def append(self, data: bytes) -> None:
        """Add a leaf."""
        node, height = leaf_hash(data), 0
        while True:
            level = self._levels[height]
            level.append(node)
            if len(level) % 2:
                return
            node, height = node_hash(level[-2], level[-1]), height + 1
            if height == len(self._levels):
                self._levels.append([])

    def root(self, size: int | None = None) -> bytes:
        """Return the root, 32 bytes, of the first ``size`` leaves, or of all.

        Raises
        ------
        EvidenceError
            There are not so many leaves.
        """
        size = self.size if size is None else size
        _check_range(size, 0, self.size, "a size of the log")
        return self._hash(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the audit path of a leaf (RFC 6962, 2.1.1).

        Parameters
        ----------
        index : int
            Of the leaf, from 0.
        size : int, optional
            Leaves of the tree that it is a proof for; all by default.

        Raises
        ------
        EvidenceError
            There is no such leaf or size.
        """
        size = self.size if size is None else size
        _check_range(size, 1, self.size, "a size of the log")
        _check_range(index, 0, size - 1, "an index of the log")
        path, start, end = [], 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._hash(middle, end))
                end = middle
            else:
                path.append(self._hash(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """Return the proof that a tree is the beginning of a later one (RFC 6962, 2.1.2).

        Parameters
        ----------
        old, new : int
            Their sizes; ``new`` is all leaves by default. It is empty when ``old`` is 0 or
            ``new``.

        Raises
        ------
        EvidenceError
            There are no such sizes.
        """
        new = self.size if new is None else new
        _check_range(new, 0, self.size, "a size of the log")
        _check_range(old, 0, new, "an old size of the log")
        if old in (0, new):
            return []
        path, start, end = [], 0, new
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._hash(middle, end))
                end = middle
            else:
                path.append(self._hash(start, middle))
                start = middle
        if start:  # the verifier has the old root already
            path.append(self._hash(start, end))
        return path[::-1]

    def _hash(self, start: int, end: int) -> bytes:
        """Return the root of a range that is a subtree."""
        count = end - start
        if count & (count - 1) == 0:
            height = count.bit_length() - 1
            return self._levels[height][start >> height]
        middle = start + _split(count)
        return node_hash(self._hash(start, middle), self._hash(middle, end))


def check_inclusion(
    data: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Raise unless a leaf is in a tree (RFC 9162, 2.1.3.2).

    Parameters
    ----------
    data : bytes
        The leaf, as it was appended.
    index, size : int
        Where it is in a tree of how many leaves.
    proof : sequence of bytes
        32 bytes each, as `MerkleLog.inclusion` gives them.
    root : bytes
        Of the tree, 32 bytes.

    Raises
    ------
    EvidenceError
        It is not in there, or the proof is none.
    """
    _check_range(size, 1, 2**63, "a size of the log")
    _check_range(index, 0, size - 1, "an index of the log")
    _check_nodes([*proof, root])
    node, last = leaf_hash(data), size - 1
    for other in proof:
        if not last:
            raise EvidenceError("a proof of inclusion is longer than the tree is high")
        if index & 1 or index == last:
            node = node_hash(other, node)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            node = node_hash(node, other)
        index, last = index >> 1, last >> 1
    if last or node != root:
        raise EvidenceError("a proof of inclusion does not lead to the root of the log")


def check_consistency(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Raise unless a tree is the beginning of a later one (RFC 9162, 2.1.4.2).

    Parameters
    ----------
    old_size, new_size : int
        Leaves of the trees.
    old_root, new_root : bytes
        32 bytes each; an old tree of size 0 may also have no root, ``b""``.
    proof : sequence of bytes
        32 bytes each, as `MerkleLog.consistency` gives them.

    Raises
    ------
    EvidenceError
        It is not, or the proof is none.
    """
    _check_range(new_size, 0, 2**63, "a size of the log")
    _check_range(old_size, 0, new_size, "an old size of the log")
    _check_nodes([*proof, new_root, *([old_root] if old_size or old_root else [])])
    if not old_size:
        holds = old_root in (b"", EMPTY) and (new_size > 0 or new_root == EMPTY) and not proof
    elif old_size == new_size:
        holds = old_root == new_root and not proof
    else:
        if old_size & (old_size - 1) == 0:  # the old tree is the first node of the path
            proof = [old_root, *proof]
        holds = _walked(old_size - 1, new_size - 1, proof) == (old_root, new_root)
    if not holds:
        raise EvidenceError(
            f"the log of {new_size:,} lines does not continue that of {old_size:,} lines"
        )


def _walked(index: int, last: int, proof: Sequence[bytes]) -> tuple[bytes, bytes] | None:
    """Return the old root and the new root that a path leads to, or None if to neither."""
    if not proof:
        return None
    while index & 1:
        index, last = index >> 1, last >> 1
    old = new = proof[0]
    for other in proof[1:]:
        if not last:
            return None
        if index & 1 or index == last:
            old, new = node_hash(other, old), node_hash(other, new)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            new = node_hash(new, other)
        index, last = index >> 1, last >> 1
    return None if last else (old, new)


def _split(count: int) -> int:
    """Return the largest power of two below a count."""
    return 1 << ((count - 1).bit_length() - 1)


def _check_range(value: int, low: int, high: int, what: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise EvidenceError(f"{what} is out of its range; allowed is {low} to {high}")


def _check_nodes(nodes: Sequence[bytes]) -> None:
    if not all(isinstance(node, bytes) and len(node) == 32 for node in nodes):
        raise EvidenceError("a hash of the log has a wrong size; allowed are 32 bytes")
