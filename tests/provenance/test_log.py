"""The log: known trees, and proofs of every size."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.log import (
    EMPTY,
    MerkleLog,
    check_consistency,
    check_inclusion,
    leaf_hash,
    node_hash,
)

# Leaves, roots by size, and proofs of the tests of Certificate Transparency.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {  # index, size
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {  # old size, new size
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
ALL = 40
TREE = MerkleLog(bytes([i]) * 32 for i in range(ALL))
SIZES = st.integers(1, ALL)


def in_hex(proof: list[bytes]) -> list[str]:
    return [node.hex() for node in proof]


def simple_root(leaves: list[bytes]) -> bytes:
    """The definition in RFC 6962, 2.1."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    halves = simple_root(leaves[:split]) + simple_root(leaves[split:])
    return hashlib.sha256(b"\1" + halves).digest()


# -- known trees ---------------------------------------------------------------------------


def test_known_roots() -> None:
    tree = MerkleLog()
    for size, root in enumerate(ROOTS):
        assert tree.size == size
        assert tree.root().hex() == root
        if size < len(LEAVES):
            tree.append(LEAVES[size])
    assert [tree.root(size).hex() for size in range(9)] == ROOTS  # of the past, too
    assert ROOTS[0] == EMPTY.hex()
    assert leaf_hash(b"").hex() == ROOTS[1]
    assert node_hash(leaf_hash(b""), leaf_hash(b"\0")).hex() == ROOTS[2]


@pytest.mark.parametrize(("place", "proof"), INCLUSION.items())
def test_known_inclusion(place: tuple[int, int], proof: list[str]) -> None:
    index, size = place
    assert in_hex(MerkleLog(LEAVES).inclusion(index, size)) == proof
    nodes = [bytes.fromhex(node) for node in proof]
    check_inclusion(LEAVES[index], index, size, nodes, bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("sizes", "proof"), CONSISTENCY.items())
def test_known_consistency(sizes: tuple[int, int], proof: list[str]) -> None:
    old, new = sizes
    assert in_hex(MerkleLog(LEAVES).consistency(old, new)) == proof
    roots = [bytes.fromhex(ROOTS[size]) for size in sizes]
    nodes = [bytes.fromhex(node) for node in proof]
    check_consistency(old, roots[0], new, roots[1], nodes)


# -- all trees -----------------------------------------------------------------------------


def test_roots_of_all_sizes() -> None:
    leaves = [bytes([i]) * 32 for i in range(ALL)]
    for size in range(ALL + 1):
        assert TREE.root(size) == simple_root(leaves[:size])
        assert MerkleLog(leaves[:size]).root() == simple_root(leaves[:size])


def test_every_leaf_of_every_tree_is_included() -> None:
    for size in range(1, ALL + 1):
        for index in range(size):
            proof = TREE.inclusion(index, size)
            check_inclusion(bytes([index]) * 32, index, size, proof, TREE.root(size))


def test_every_tree_continues_every_smaller_one() -> None:
    for new in range(ALL + 1):
        for old in range(new + 1):
            proof = TREE.consistency(old, new)
            check_consistency(old, TREE.root(old), new, TREE.root(new), proof)
    check_consistency(0, b"", 5, TREE.root(5), [])
    check_consistency(0, b"", 0, EMPTY, [])


def test_a_long_log_costs_little() -> None:
    began, tree, old = time.process_time(), MerkleLog(), EMPTY
    for size in range(400):
        tree.append(bytes(32))
        proof = tree.consistency(size)
        check_consistency(size, old, size + 1, tree.root(), proof)
        old = tree.root()
    assert time.process_time() - began < 0.2  # 0.01 s on an idle core


# -- wrong proofs --------------------------------------------------------------------------


def no(check: Callable[..., None], *values: Any, match: str = "") -> None:
    with pytest.raises(EvidenceError, match=match or "does not|longer|allowed"):
        check(*values)


def flipped(nodes: list[bytes], bit: int) -> list[bytes]:
    data = bytearray(b"".join(nodes))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    return [bytes(data[i : i + 32]) for i in range(0, len(data), 32)]


BITS = st.integers(0, 2**16 - 1)


@settings(max_examples=300, deadline=None)
@given(st.data(), SIZES, BITS)
def test_no_part_of_an_inclusion_can_be_changed(data: Any, size: int, bit: int) -> None:
    index = data.draw(st.integers(0, size - 1))
    leaf, proof, root = bytes([index]) * 32, TREE.inclusion(index, size), TREE.root(size)
    if proof:
        no(check_inclusion, leaf, index, size, flipped(proof, bit), root)
        no(check_inclusion, leaf, index, size, proof[:-1], root)
        no(check_inclusion, leaf, index, size, proof[1:], root)
    no(check_inclusion, leaf, index, size, [*proof, bytes(32)], root)
    no(check_inclusion, leaf, index, size, [bytes(32), *proof], root)
    no(check_inclusion, leaf, index, size, proof, flipped([root], bit)[0])
    no(check_inclusion, flipped([leaf], bit)[0], index, size, proof, root)
    other = data.draw(st.integers(0, size - 1).filter(lambda it: it != index)) if proof else 0
    if proof:
        no(check_inclusion, leaf, other, size, proof, root)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, ALL), BITS)
def test_no_part_of_a_consistency_can_be_changed(data: Any, new: int, bit: int) -> None:
    old = data.draw(st.integers(1, new - 1))
    first, last, proof = TREE.root(old), TREE.root(new), TREE.consistency(old, new)
    no(check_consistency, old, first, new, last, flipped(proof, bit))
    no(check_consistency, old, first, new, last, proof[:-1])
    no(check_consistency, old, first, new, last, proof[1:])
    no(check_consistency, old, first, new, last, [*proof, bytes(32)])
    no(check_consistency, old, first, new, last, [bytes(32), *proof])
    no(check_consistency, old, first, new, last, [])
    no(check_consistency, old, flipped([first], bit)[0], new, last, proof)
    no(check_consistency, old, first, new, flipped([last], bit)[0], proof)
    other = data.draw(st.integers(1, new).filter(lambda it: it != old))
    no(check_consistency, other, first, new, last, proof)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, ALL))
def test_a_rewritten_log_is_noticed(data: Any, new: int) -> None:
    old = data.draw(st.integers(1, new - 1))
    place = data.draw(st.integers(0, old - 1))
    leaves = [bytes([i]) * 32 for i in range(new)]
    leaves[place] = b"changed"
    other = MerkleLog(leaves)
    for proof in (other.consistency(old), TREE.consistency(old, new)):
        no(check_consistency, old, TREE.root(old), new, other.root(), proof)


def test_a_larger_tree_does_not_pass_for_a_small_one() -> None:
    second, first = bytes([1]) * 32, leaf_hash(bytes(32))
    check_inclusion(second, 1, 2, [first], TREE.root(2))
    no(check_inclusion, second, 0, 1, [first], TREE.root(2), match="longer than the tree")


def test_logs_without_lines() -> None:
    root = TREE.root(3)
    for values in (
        (0, root, 3, root, []),  # an empty log has no such root
        (0, EMPTY, 3, root, [bytes(32)]),
        (0, EMPTY, 0, root, []),
        (0, b"", 0, bytes(32), []),
        (3, root, 3, TREE.root(4), []),
        (3, root, 3, root, [bytes(32)]),
        (3, EMPTY, 3, root, []),
    ):
        no(check_consistency, *values, match="does not continue")


def test_the_error_of_a_fork_says_which_sizes() -> None:
    proof = TREE.consistency(3, 7)
    with pytest.raises(
        EvidenceError, match="log of 7 lines does not continue that of 3 lines"
    ):
        check_consistency(3, TREE.root(4), 7, TREE.root(7), proof)


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (check_inclusion, (b"", 0, 0, [], EMPTY)),
        (check_inclusion, (b"", 1, 1, [], leaf_hash(b""))),
        (check_inclusion, (b"", -1, 1, [], leaf_hash(b""))),
        (check_inclusion, (b"", False, True, [], leaf_hash(b""))),
        (check_inclusion, (b"", 0.0, 1, [], leaf_hash(b""))),
        (check_inclusion, (b"", 0, 2**64, [], leaf_hash(b""))),
        (check_inclusion, (b"", 0, 2, [b"short"], leaf_hash(b""))),
        (check_inclusion, (b"", 0, 2, ["a" * 32], leaf_hash(b""))),
        (check_inclusion, (b"", 0, 1, [], leaf_hash(b"")[:-1])),
        (check_consistency, (2, bytes(32), 1, bytes(32), [])),
        (check_consistency, (-1, bytes(32), 1, bytes(32), [])),
        (check_consistency, (True, bytes(32), 1, bytes(32), [])),
        (check_consistency, (1, bytes(32), 2**64, bytes(32), [])),
        (check_consistency, (1, b"", 2, bytes(32), [bytes(32)])),
        (check_consistency, (0, b"x", 2, bytes(32), [])),
        (check_consistency, (1, bytes(32), 2, b"", [bytes(32)])),
        (check_consistency, (1, bytes(32), 2, bytes(32), [bytes(33)])),
    ],
)
def test_what_is_no_proof_is_refused(check: Callable[..., None], values: Any) -> None:
    no(check, *values, match="out of its range|wrong size")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: TREE.root(ALL + 1),
        lambda: TREE.root(-1),
        lambda: TREE.inclusion(ALL),
        lambda: TREE.inclusion(-1),
        lambda: TREE.inclusion(3, 3),
        lambda: TREE.inclusion(0, 0),
        lambda: TREE.inclusion(0, ALL + 1),
        lambda: TREE.consistency(5, 4),
        lambda: TREE.consistency(-1),
        lambda: TREE.consistency(1, ALL + 1),
    ],
)
def test_what_the_log_does_not_have_is_refused(ask: Callable[[], Any]) -> None:
    with pytest.raises(EvidenceError, match="out of its range; allowed is"):
        ask()


def test_a_node_is_no_leaf() -> None:
    """Otherwise a tree of two leaves could pass for one leaf."""
    pair = leaf_hash(b"a") + leaf_hash(b"b")
    assert MerkleLog([pair]).root() != MerkleLog([b"a", b"b"]).root()
