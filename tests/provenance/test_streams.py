"""Streams: digests of arrays, and one root per stream."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.log import MerkleLog, check_inclusion
from flwr_clicooper.provenance.streams import (
    STREAMS,
    Streams,
    arrays_digest,
    framed,
    leaf,
)

DIGEST = hashlib.sha256(b"arrays").digest()


def other(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


# -- digests -------------------------------------------------------------------------------


def test_the_bytes_of_a_set_of_arrays() -> None:
    """As the page says, written out."""
    data = b"".join(
        (
            b"\0\0\0\0\0\0\0\x01" + b"0",
            b"\0\0\0\0\0\0\0\x07" + b"float32",
            b"\0\0\0\0\0\0\0\x05" + b"64,28",
            b"\0\0\0\0\0\0\0\x03" + b"abc",
            b"\0\0\0\0\0\0\0\x01" + b"1",
            b"\0\0\0\0\0\0\0\x05" + b"int64",
            b"\0\0\0\0\0\0\0\0",  # a scalar
            b"\0\0\0\0\0\0\0\x02" + b"de",
        )
    )
    arrays = [("0", "float32", (64, 28), b"abc"), ("1", "int64", (), b"de")]
    assert arrays_digest(arrays) == blake3(data).digest()
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert arrays_digest([]).hex() == empty  # of no bytes, as BLAKE3's own test vectors say
    assert framed("0", b"ab", "") == bytes(7) + b"\x010" + bytes(7) + b"\x02ab" + bytes(8)


def test_integers_are_in_order_before_other_names() -> None:
    names = ["0", "2", "10", "a", "b", "01", "-1", "é", "1" * 30, "٣"]
    arrays = [(name, "uint8", (1,), name.encode()) for name in names]
    expected = arrays_digest(arrays)
    for _ in range(20):
        random.Random(0).shuffle(arrays)
        assert arrays_digest(arrays) == expected
    ordered = [*names[:3], *sorted(names[3:])]
    data = (framed(name, "uint8", "1", name.encode()) for name in ordered)
    assert expected == blake3(b"".join(data)).digest()


def test_any_kind_of_bytes_gives_the_same() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    kinds = (array.tobytes(), bytearray(array.tobytes()), array.data, memoryview(array))
    found = {arrays_digest([("x", "float32", array.shape, data)]) for data in kinds}
    assert len(found) == 1
    nothing = np.empty((0, 3), dtype="<f4")
    assert arrays_digest([("x", "float32", (0, 3), nothing.data)]) == arrays_digest(
        [("x", "float32", (0, 3), b"")]
    )


@pytest.mark.parametrize(
    "changed",
    [
        [("1", "float32", (2, 3), b"abcdef")],
        [("0", "int32", (2, 3), b"abcdef")],
        [("0", "float32", (3, 2), b"abcdef")],
        [("0", "float32", (6,), b"abcdef")],
        [("0", "float32", (23,), b"abcdef")],
        [("0", "float32", (2, 3), b"abcdeg")],
        [("0", "float32", (2, 3), b"abcdef"), ("1", "", (), b"")],
        [],
    ],
)
def test_another_set_has_another_digest(changed: list[Any]) -> None:
    assert arrays_digest(changed) != arrays_digest([("0", "float32", (2, 3), b"abcdef")])


def test_a_name_occurs_once() -> None:
    with pytest.raises(EvidenceError, match="two arrays have the same name '0'"):
        arrays_digest([("0", "float32", (), b""), ("0", "float32", (), b"")])


# -- streams -------------------------------------------------------------------------------


def filled(count: int = 7) -> Streams:
    streams = Streams()
    for number in range(count):
        streams.add("activations-in", 2, number, 0, other(number))
        streams.add("gradients-out", 2, number, 1, other(-number))
    return streams


def test_the_root_is_that_of_the_leaves_in_order() -> None:
    places = [(1, 0, 0), (1, 0, 1), (1, 2, 0), (1, 10, 0), (2, 0, 0)]
    expected = MerkleLog(
        b"".join(n.to_bytes(8, "big") for n in place) + other(i)
        for i, place in enumerate(places)
    )
    for seed in range(5):
        order = list(enumerate(places))
        random.Random(seed).shuffle(order)
        streams = Streams()
        for i, place in order:
            streams.add("states", *place, other(i))
        assert streams.root("states") == expected.root().hex()
        assert streams.roots() == {"states": expected.root().hex()}


def test_streams_that_did_not_occur_have_no_root() -> None:
    assert Streams().roots() == {}
    assert Streams().root("states") == ""
    assert Streams().count("states") == 0
    assert list(filled().roots()) == ["activations-in", "gradients-out"]
    assert filled(3).count("gradients-out") == 3


def test_a_repeated_place_replaces() -> None:
    streams = filled()
    streams.add("activations-in", 2, 3, 0, DIGEST)
    assert streams.count("activations-in") == 7
    assert streams.root("activations-in") != filled().root("activations-in")
    streams.add("activations-in", 2, 3, 0, other(3))
    assert streams.roots() == filled().roots()


def test_each_leaf_can_be_proved() -> None:
    streams = filled()
    root = bytes.fromhex(streams.root("activations-in"))
    for number in range(7):
        index, size, proof = streams.prove("activations-in", (2, number, 0))
        assert (index, size) == (number, 7)
        check_inclusion(leaf((2, number, 0), other(number)), index, size, proof, root)
        for wrong in (leaf((2, number, 1), other(number)), leaf((2, number, 0), DIGEST)):
            with pytest.raises(EvidenceError, match="does not lead to the root"):
                check_inclusion(wrong, index, size, proof, root)
    for stream, place in (
        ("activations-in", (2, 7, 0)),
        ("states", (2, 0, 0)),
        ("hidden", (2, 0, 0)),
    ):
        with pytest.raises(EvidenceError, match="no leaf at"):
            streams.prove(stream, place)


def test_streams_are_forgotten() -> None:
    streams = filled()
    streams.clear("activations-in", "states")
    assert list(streams.roots()) == ["gradients-out"]
    streams.clear()
    assert streams.roots() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("hidden", 0, 0, 0, DIGEST), "a stream .* activations-in or"),
        ((["states"], 0, 0, 0, DIGEST), "a stream"),
        (("states", -1, 0, 0, DIGEST), "a position .* an integer from 0"),
        (("states", 0, True, 0, DIGEST), "a position"),
        (("states", 0, 0, 1.0, DIGEST), "a position"),
        (("states", 0, 0, 2**64, DIGEST), "a position"),
        (("states", 0, 0, 0, DIGEST[:-1]), "a digest .* 32 bytes"),
        (("states", 0, 0, 0, DIGEST.hex()), "a digest .* 32 bytes"),
        (("states", 0, 0, 0, bytearray(32)), "a digest .* 32 bytes"),
    ],
)
def test_what_is_no_leaf_is_refused(values: Any, message: str) -> None:
    streams = Streams()
    with pytest.raises(EvidenceError, match=message):
        streams.add(*values)
    assert streams.roots() == {}


def test_a_position_has_three_places() -> None:
    for position in ((0, 0), (0, 0, 0, 0), [0, 0, 0], 0):
        with pytest.raises(EvidenceError, match="round, step and micro-batch"):
            leaf(position, DIGEST)  # type: ignore[arg-type]


# -- storage -------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(STREAMS),
            *(st.integers(0, 2**63 - 1),) * 3,
            st.binary(min_size=32, max_size=32),
        ),
        max_size=20,
    )
)
def test_stored_and_back(leaves: list[tuple[str, int, int, int, bytes]]) -> None:
    streams = Streams()
    for values in leaves:
        streams.add(*values)
    data = streams.to_bytes()
    again = Streams.from_bytes(data)
    assert again.roots() == streams.roots()
    assert again.to_bytes() == data
    again.add("states", 1, 1, 1, DIGEST)  # it goes on
    assert again.root("states")


DATA = filled(2).to_bytes()
HEAD, _, BODY = DATA.partition(b"\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\n", "not JSON"),
        (BODY, "not JSON|too large"),
        (b"[" * 2000 + b"\n", "too large"),
        (b"[]\n", "an object"),
        (DATA[:-1], "damaged"),
        (DATA + b"x", "damaged"),
        (HEAD, "damaged"),
        (HEAD.replace(b"2", b"3") + b"\n" + BODY, "damaged"),
        (HEAD.replace(b"2", b"0") + b"\n", "an integer from 1"),
        (HEAD.replace(b"2", b"true") + b"\n" + BODY, "an integer from 1"),
        (HEAD.replace(b"2", b"2.0") + b"\n" + BODY, "an integer from 1"),
        (HEAD.replace(b":", b": ") + b"\n" + BODY, "damaged"),
        (HEAD.replace(b"activations-in", b"activations-on") + b"\n" + BODY, "a stream"),
        (HEAD + b"\n" + BODY[56:112] + BODY[:56] + BODY[112:], "damaged"),
        (HEAD + b"\n" + BODY[:56] + BODY[:56] + BODY[112:], "damaged"),
        (HEAD + b"\n" + b"\xff" * 56 + BODY[56:], "a position"),
    ],
)
def test_damaged_storage_is_refused(data: bytes, message: str) -> None:
    assert Streams.from_bytes(DATA).roots()
    with pytest.raises(EvidenceError, match=message):
        Streams.from_bytes(data)
