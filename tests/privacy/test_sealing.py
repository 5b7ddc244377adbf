"""Sealed messages: what opens, and one test per way in which a relay may interfere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import SealError
from flwr_clicooper.privacy import sealing
from flwr_clicooper.privacy.sealing import (
    OVERHEAD,
    Introduction,
    KeyRing,
    Order,
    introduce,
)

RUN = "run 7"
PARTIES = ("owner", "trainer 1", "trainer 2")
ABOUT = b"train.forward/3/12"


def meet(party: str, run: str = RUN) -> tuple[Introduction, bytes]:
    return introduce(run, party, "ed25519:text", lambda content: bytes(64))


def rings(run: str = RUN) -> dict[str, KeyRing]:
    made = {party: meet(party, run) for party in PARTIES}
    return {
        party: KeyRing(own, private, {p: made[p][0] for p in PARTIES if p != party})
        for party, (own, private) in made.items()
    }


RINGS = rings()
OWNER, FIRST, SECOND = (RINGS[party] for party in PARTIES)


def refused(ring: KeyRing, sealed: bytes, sender: str = "owner", about: bytes = ABOUT) -> None:
    with pytest.raises(SealError, match="does not open") as caught:
        ring.open(sender, about, sealed, "the activations")
    text = str(caught.value)
    assert text.startswith(f"the activations from {sender} to {ring.own.party} ")


# -- what works ----------------------------------------------------------------------------


@given(data=st.binary(max_size=300), about=st.binary(max_size=40))
def test_what_is_sealed_opens(data: bytes, about: bytes) -> None:
    sealed = OWNER.seal("trainer 1", about, data)
    assert len(sealed) == len(data) + OVERHEAD
    assert FIRST.open("owner", about, bytes(sealed)) == data
    assert SECOND.open("trainer 1", about, FIRST.seal("trainer 2", about, data)) == data


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_is_sealed_and_opened(wrap: Callable) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for data in (array.data, memoryview(array), wrap(array.tobytes())):
        sealed = wrap(OWNER.seal("trainer 1", ABOUT, data))
        assert FIRST.open("owner", ABOUT, sealed) == array.tobytes()
    empty = np.empty((0, 4), dtype=np.float32)
    assert FIRST.open("owner", ABOUT, OWNER.seal("trainer 1", ABOUT, empty.data)) == b""


def test_what_is_sealed_does_not_show_the_data() -> None:
    data = os.urandom(64)
    sealed = bytes(OWNER.seal("trainer 1", ABOUT, data * 50))
    assert not any(data[i : i + 8] in sealed for i in range(56))
    assert data.hex() not in repr(OWNER)
    zeros = np.frombuffer(OWNER.seal("trainer 1", ABOUT, bytes(100_000)), np.uint8)
    counts = np.bincount(zeros, minlength=256)
    assert counts.min() > 250  # 390 expected; below 250 has probability under 1e-10


def test_nonces_do_not_repeat() -> None:
    sealed = [bytes(OWNER.seal("trainer 1", ABOUT, b"same")) for _ in range(2000)]
    assert len({data[:12] for data in sealed}) == len({data[12:] for data in sealed}) == 2000


def test_each_direction_has_a_key_of_its_own() -> None:
    keys = [
        bytes(RINGS[a]._cipher(x, y).encrypt(bytes(12), bytes(16), b""))
        for a in PARTIES
        for x in PARTIES
        for y in PARTIES
        if x != y and a in (x, y)
    ]
    # Six directions, each with the same key at both ends.
    assert sorted(keys.count(key) for key in keys) == [2] * 12


def test_the_derivation_is_pinned() -> None:
    # What these inputs give must not change within v1.
    private = [bytes(range(i, i + 32)) for i in (1, 101)]
    publics = [sealing.X25519PrivateKey.from_private_bytes(p).public_key() for p in private]
    introductions = [
        Introduction("r", name, "id", key.public_bytes_raw(), bytes(16), bytes(64))
        for name, key in zip("ab", publics, strict=True)
    ]
    ring = KeyRing(introductions[0], private[0], {"b": introductions[1]})
    peer = KeyRing(introductions[1], private[1], {"a": introductions[0]})
    fixed = bytes.fromhex(
        "000000000000000000000000af9a349f187ceb177c9a10f50578193cd92813867c3971"
    )
    assert peer.open("a", b"about", fixed) == b"message"
    bound = ring._bound("a", "b", b"about")
    assert ring._cipher("a", "b").encrypt(bytes(12), b"message", bound) == fixed[12:]


# -- what a relay may try ------------------------------------------------------------------


@settings(max_examples=150)
@given(
    data=st.binary(min_size=1, max_size=60),
    part=st.sampled_from(["nonce", "ciphertext", "tag"]),
    place=st.integers(0, 10_000),
    flip=st.integers(1, 255),
)
def test_changed_bytes(data: bytes, part: str, place: int, flip: int) -> None:
    sealed = OWNER.seal("trainer 1", ABOUT, data)
    start, stop = {
        "nonce": (0, 12),
        "ciphertext": (12, 12 + len(data)),
        "tag": (12 + len(data), len(sealed)),
    }[part]
    sealed[start + place % (stop - start)] ^= flip
    refused(FIRST, sealed)


def test_every_single_bit() -> None:
    sealed = OWNER.seal("trainer 1", ABOUT, b"abc")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        refused(FIRST, changed)
    assert FIRST.open("owner", ABOUT, sealed) == b"abc"


def test_cut_or_longer_messages() -> None:
    sealed = bytes(OWNER.seal("trainer 1", ABOUT, bytes(20)))
    for size in range(len(sealed)):
        with pytest.raises(SealError, match=r"does not open|allowed are 28 to"):
            FIRST.open("owner", ABOUT, sealed[:size])
    refused(FIRST, sealed + b"\0")
    refused(FIRST, sealed[1:])
    refused(FIRST, bytes(28))
    with pytest.raises(SealError, match="a message from owner to trainer 1 has 0 bytes"):
        FIRST.open("owner", ABOUT, b"")


def test_oversized_messages(monkeypatch) -> None:
    sealed = OWNER.seal("trainer 1", ABOUT, bytes(101))
    monkeypatch.setattr(sealing, "MAX_SEALED", 100 + OVERHEAD)
    assert OWNER.seal("trainer 1", ABOUT, bytes(100))
    with pytest.raises(SealError, match="has 101 bytes; allowed are at most 100"):
        OWNER.seal("trainer 1", ABOUT, bytes(101))
    with pytest.raises(SealError, match="has 129 bytes; allowed are 28 to 128"):
        FIRST.open("owner", ABOUT, sealed)


def test_a_message_for_another_party() -> None:
    refused(SECOND, OWNER.seal("trainer 1", ABOUT, b"data"))


def test_a_message_of_another_sender() -> None:
    refused(FIRST, OWNER.seal("trainer 1", ABOUT, b"data"), sender="trainer 2")
    refused(FIRST, SECOND.seal("trainer 1", ABOUT, b"data"), sender="owner")


def test_a_message_that_comes_back_to_its_sender() -> None:
    sealed = OWNER.seal("trainer 1", ABOUT, b"data")
    refused(OWNER, sealed, sender="trainer 1")
    with pytest.raises(SealError, match="owner has no key for owner"):
        OWNER.open("owner", ABOUT, sealed)


def test_a_message_about_something_else() -> None:
    sealed = OWNER.seal("trainer 1", ABOUT, b"data")
    for about in (b"", ABOUT[:-1], ABOUT + b"3", b"train.backward/3/12"):
        refused(FIRST, sealed, about=about)


def test_a_message_of_another_run() -> None:
    # The same keys, so that only the run's name differs.
    def renamed(ring: KeyRing) -> KeyRing:
        own, *peers = (
            dataclasses.replace(i, run="run 8") for i in (ring.own, *ring.peers.values())
        )
        return KeyRing(own, ring._private, {peer.party: peer for peer in peers})

    owner, first = renamed(OWNER), renamed(FIRST)
    assert first.open("owner", ABOUT, owner.seal("trainer 1", ABOUT, b"data")) == b"data"
    refused(FIRST, owner.seal("trainer 1", ABOUT, b"data"))
    refused(first, OWNER.seal("trainer 1", ABOUT, b"data"))


def test_a_message_of_another_attempt() -> None:
    again = rings()
    refused(again["trainer 1"], OWNER.seal("trainer 1", ABOUT, b"data"))
    refused(FIRST, again["owner"].seal("trainer 1", ABOUT, b"data"))


def test_one_end_that_missed_the_other_ends_new_attempt() -> None:
    own, private = meet("trainer 1")
    late = KeyRing(own, private, FIRST.peers)
    refused(late, OWNER.seal("trainer 1", ABOUT, b"data"))
    refused(OWNER, late.seal("owner", ABOUT, b"data"), sender="trainer 1")


def test_lengths_keep_parts_apart() -> None:
    names = [("a", "bc"), ("ab", "c")]
    assert sealing._joined(names[0]) != sealing._joined(names[1])
    assert sealing._joined(["a"]) != sealing._joined(["a", ""])


def test_no_error_holds_the_data_or_a_key() -> None:
    data = b"patient 4711"
    sealed = OWNER.seal("trainer 1", ABOUT, data)
    sealed[-1] ^= 1
    with pytest.raises(SealError) as caught:
        FIRST.open("owner", ABOUT, sealed)
    error: BaseException | None = caught.value
    while error:
        for secret in (data, FIRST._private):
            assert secret.hex() not in str(error)
            assert repr(secret)[2:-1] not in str(error)
        error = error.__cause__


# -- rings ---------------------------------------------------------------------------------


def test_a_ring_refuses_who_is_not_a_peer() -> None:
    own, private = meet("owner")
    first, second = meet("trainer 1")[0], meet("trainer 2", "run 8")[0]
    for peers in ({"trainer 2": first}, {"trainer 2": second}, {"owner": own}):
        with pytest.raises(SealError, match="is not one of a peer in this run"):
            KeyRing(own, private, peers)
    for wrong in (meet("owner")[1], b"", bytes(31)):
        with pytest.raises(SealError, match=r"secret key is not that of .* owner"):
            KeyRing(own, wrong, {"trainer 1": first})


def test_a_ring_without_a_peer_names_those_it_has() -> None:
    own, private = meet("owner")
    alone = KeyRing(own, private, {})
    with pytest.raises(SealError, match="owner has no key for trainer 1; it has for nobody"):
        alone.seal("trainer 1", ABOUT, b"data")
    with pytest.raises(SealError, match="it has for trainer 1, trainer 2"):
        OWNER.seal("trainer 3", ABOUT, b"data")
    with pytest.raises(SealError, match="it has for trainer 1, trainer 2"):
        OWNER.open("trainer 3", ABOUT, bytes(40))


@pytest.mark.parametrize("point", [bytes(32), bytes([1]) + bytes(31)])
def test_a_peer_key_that_gives_no_secret(point: bytes) -> None:
    weak = dataclasses.replace(FIRST.own, key=point)
    with pytest.raises(SealError, match="the key of trainer 1 gives no shared secret"):
        OWNER.with_peers({"trainer 1": weak}).seal("trainer 1", ABOUT, b"data")


def test_a_stored_ring_goes_on_before_and_after_it_met_the_others() -> None:
    again = KeyRing.from_json(FIRST.to_json())
    assert again.open("owner", ABOUT, OWNER.seal("trainer 1", ABOUT, b"data")) == b"data"
    assert OWNER.open("trainer 1", ABOUT, again.seal("owner", ABOUT, b"data")) == b"data"
    alone = KeyRing.from_json(KeyRing(FIRST.own, FIRST._private, {}).to_json())
    assert alone.peers == {}
    met = alone.with_peers(FIRST.peers)
    assert met.open("owner", ABOUT, OWNER.seal("trainer 1", ABOUT, b"data")) == b"data"


def damaged() -> list[bytes]:
    fields = json.loads(FIRST.to_json())
    return [
        b"",
        b"null",
        b"\xff",
        b"[" * 5000,
        FIRST.to_json()[:-1],
        *(
            json.dumps({k: v for k, v in fields.items() if k != name}).encode()
            for name in fields
        ),
        json.dumps(fields | {"private": fields["private"][2:]}).encode(),
        json.dumps(fields | {"private": OWNER._private.hex()}).encode(),
        json.dumps(fields | {"peers": [fields["own"]]}).encode(),
        json.dumps(fields | {"own": fields["private"]}).encode(),
    ]


@pytest.mark.parametrize("data", damaged())
def test_a_damaged_ring_is_refused_and_not_shown(data: bytes) -> None:
    with pytest.raises(SealError) as caught:
        KeyRing.from_json(data)
    assert str(caught.value) == "a stored key ring is damaged"
    assert caught.value.__cause__ is None


# -- order ---------------------------------------------------------------------------------


def test_messages_in_order() -> None:
    order = Order({"owner/forward": 5})
    for number in (5, 6, 7):
        order.check("owner/forward", number)
    order.check("owner/label", 0)
    assert order.expected == {"owner/forward": 8, "owner/label": 1}
    again = Order(json.loads(json.dumps(order.expected)))
    again.check("owner/forward", 8)
    assert order.expected["owner/forward"] == 8


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "owner/forward: message 4 is replayed; allowed is 5"),
        (0, "is replayed"),
        (6, "message 6 came too early: 5 is missing before it"),
        (2**70, "came too early"),
        (-1, "not an integer from 0"),
        (5.0, "not an integer from 0"),
        (True, "not an integer from 0"),
        ("5", "not an integer from 0"),
    ],
)
def test_messages_out_of_order_change_nothing(number: object, message: str) -> None:
    order = Order({"owner/forward": 5})
    with pytest.raises(SealError, match=message):
        order.check("owner/forward", number)
    order.check("owner/forward", 5)


@pytest.mark.parametrize("number", [-1, 1.5, "1", None, True])
def test_a_stored_order_that_is_damaged(number: object) -> None:
    with pytest.raises(SealError, match="next number of a channel"):
        Order({"owner/forward": number})


def received(order: Order, messages: list[tuple[int, bytearray]]) -> list[bytes]:
    """What a party does: open as the number that is said, then ask for the order."""
    out = []
    for number, sealed in messages:
        data = FIRST.open("owner", b"forward/%d" % number, sealed)
        order.check("owner/forward", number)
        out.append(data)
    return out


def test_a_relay_cannot_replay_reorder_or_drop() -> None:
    sent = [(i, OWNER.seal("trainer 1", b"forward/%d" % i, b"%d" % i)) for i in range(3)]
    assert received(Order(), sent) == [b"0", b"1", b"2"]
    with pytest.raises(SealError, match="message 0 is replayed"):
        received(Order(), [sent[0], sent[0]])
    with pytest.raises(SealError, match="message 1 came too early"):
        received(Order(), [sent[1], sent[0]])
    with pytest.raises(SealError, match="message 2 came too early: 1 is missing"):
        received(Order(), [sent[0], sent[2]])
    with pytest.raises(SealError, match="does not open"):  # the number itself is bound
        received(Order(), [sent[0], (1, sent[0][1])])


def test_no_pytorch_and_no_flower() -> None:
    code = (
        "import sys, flwr_clicooper.privacy.sealing\n"
        "loaded = {'torch', 'flwr', 'numpy', 'flwr_clicooper.provenance'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
