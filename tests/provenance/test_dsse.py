"""Envelopes: one spelling, and signatures by exactly who must sign."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement as InTotoStatement
from in_toto_attestation.v1.statement_pb2 import Statement as InTotoMessage
from securesystemslib import dsse as other
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import Statement
from flwr_clicooper.provenance.dsse import (
    MAX_ENVELOPE,
    PAYLOAD_TYPE,
    Envelope,
    Signature,
    keyid,
    pae,
)
from flwr_clicooper.provenance.fields import MAX_STATEMENT
from flwr_clicooper.provenance.keys import Identity
from tests.provenance.signed import ACME, BETA, OWNER, ROUND, STATEMENTS, STRANGER

PAYLOAD = ROUND.payload()
LINE = Envelope.sign(PAYLOAD, ACME, OWNER).to_json()


def test_the_example_of_the_specification() -> None:
    """DSSE's protocol.md."""
    signed = pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("é", b"\0\n") == b"DSSEv1 2 \xc3\xa9 2 \0\n"  # lengths in bytes


# -- signing -------------------------------------------------------------------------------


def test_an_envelope_and_its_text() -> None:
    envelope = Envelope.sign(PAYLOAD, ACME, OWNER)
    assert Envelope.from_json(envelope.to_json()) == envelope
    assert envelope.verify(OWNER.public, ACME.public) == PAYLOAD
    assert envelope.digest == hashlib.sha256(PAYLOAD).hexdigest()
    assert envelope.signed_by() == tuple(sorted((keyid(ACME.public), keyid(OWNER.public))))
    assert keyid(ACME.public) == hashlib.sha256(ACME.public.spki).hexdigest()
    assert "\n" not in envelope.to_json()
    assert list(json.loads(envelope.to_json())) == ["payload", "payloadType", "signatures"]


def test_a_countersignature_keeps_the_digest() -> None:
    one = Envelope.sign(PAYLOAD, ACME)
    two = one.countersigned(OWNER)
    assert two == Envelope.sign(PAYLOAD, OWNER, ACME)
    assert two.digest == one.digest
    assert one.verify(ACME.public)  # is not changed
    with pytest.raises(EvidenceError, match="two signatures by the same key"):
        two.countersigned(ACME)
    with pytest.raises(EvidenceError, match="two signatures by the same key"):
        Envelope.sign(PAYLOAD, ACME, ACME)


def test_signatures_of_two_envelopes_come_together() -> None:
    one, two = Envelope.sign(PAYLOAD, ACME, OWNER), Envelope.sign(PAYLOAD, OWNER, BETA)
    both = one.with_signatures_of(two)
    assert both.verify(ACME.public, OWNER.public, BETA.public)
    assert both == two.with_signatures_of(one)
    assert both.with_signatures_of(both) == both
    with pytest.raises(EvidenceError, match="different statements"):
        one.with_signatures_of(Envelope.sign(PAYLOAD + b" ", BETA))
    forged = Envelope(PAYLOAD, (Signature(keyid(OWNER.public), bytes(64)),))
    with pytest.raises(EvidenceError, match="two signatures by the same key"):
        one.with_signatures_of(forged)


# -- verifying -----------------------------------------------------------------------------


def test_exactly_these_keys_must_have_signed() -> None:
    envelope = Envelope.sign(PAYLOAD, ACME, OWNER)
    with pytest.raises(EvidenceError, match="lacks the signature by") as caught:
        envelope.verify(ACME.public, OWNER.public, BETA.public)
    assert BETA.public.fingerprint in str(caught.value)
    with pytest.raises(EvidenceError, match="which must not sign it") as caught:
        envelope.countersigned(STRANGER).verify(ACME.public, OWNER.public)
    assert STRANGER.public.fingerprint in str(caught.value)
    with pytest.raises(EvidenceError, match="must not sign it"):
        envelope.verify()


def test_a_stripped_signature_is_missed() -> None:
    envelope = Envelope.sign(PAYLOAD, ACME, OWNER)
    for identity, left in ((ACME, OWNER), (OWNER, ACME)):
        rest = tuple(s for s in envelope.signatures if s.keyid == keyid(left.public))
        with pytest.raises(EvidenceError, match="lacks") as caught:
            Envelope(PAYLOAD, rest).verify(ACME.public, OWNER.public)
        assert identity.public.fingerprint in str(caught.value)


def test_a_signature_is_of_one_statement_and_one_key() -> None:
    mine = Envelope.sign(PAYLOAD, ACME).signatures
    moved = (Signature(keyid(BETA.public), mine[0].sig),)
    unwrapped = (Signature(keyid(ACME.public), ACME.sign(PAYLOAD)),)  # not its PAE
    typed = (Signature(keyid(ACME.public), ACME.sign(pae("text/plain", PAYLOAD))),)
    for signatures, payload, key in (
        (mine, PAYLOAD + b" ", ACME),
        (moved, PAYLOAD, BETA),
        (unwrapped, PAYLOAD, ACME),
        (typed, PAYLOAD, ACME),
    ):
        with pytest.raises(EvidenceError, match="changed or forged") as caught:
            Envelope(payload, signatures).verify(key.public)
        assert key.public.fingerprint in str(caught.value)


# -- what is no envelope -------------------------------------------------------------------


def text_with(**fields: Any) -> str:
    return json.dumps({**json.loads(LINE), **fields}, separators=(",", ":"))


def signatures_with(**fields: Any) -> str:
    first, *rest = json.loads(LINE)["signatures"]
    found = {name: value for name, value in {**first, **fields}.items() if value != ""}
    return text_with(signatures=[found, *rest])


FIRST, SECOND = json.loads(LINE)["signatures"]
SIG = FIRST["sig"]
BITS = SIG[:-3] + chr(ord(SIG[-3]) + 1) + "=="  # the same 64 bytes, other unused bits
HUGE = base64.b64encode(bytes(MAX_STATEMENT + 3)).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("null", "an envelope is not what it must be; allowed is a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON object"),
        (LINE[:-1], "not JSON"),
        (LINE + "\n", "spelling"),
        (" " + LINE, "spelling"),
        (LINE.replace('":"', '": "', 1), "spelling"),
        (LINE.replace("payload", "\\u0070ayload", 1), "spelling"),
        (LINE.replace("in-toto", "in-\\u0074oto"), "spelling"),
        (LINE.replace("/", "\\/", 1), "spelling"),
        (LINE.replace('{"payload"', '{"payloadType":"x","payload"'), "spelling"),
        (LINE[:-1] + ',"payload":""}', "spelling"),
        (json.dumps(json.loads(LINE), sort_keys=True), "spelling"),
        (text_with(more=1), "'more' is unknown; allowed are payload, payloadType, signatures"),
        (
            text_with(payloadType="application/json"),
            "'payloadType' .* allowed is application/",
        ),
        (text_with(payloadType=PAYLOAD_TYPE.upper()), "'payloadType'"),
        (text_with(payload=7), "'payload' .* base64"),
        (text_with(payload="e30"), "'payload' .* base64"),
        (text_with(payload="e31="), "'payload' .* base64"),
        (text_with(payload="e3 0="), "'payload' .* base64"),
        (text_with(payload="_-8="), "'payload' .* base64"),
        (text_with(payload="é30="), "'payload' .* base64"),
        (text_with(payload=HUGE), "payload's size"),
        (text_with(signatures={}), "'signatures' .* a list"),
        (text_with(signatures=[]), "number of signatures .* 1 or more"),
        (text_with(signatures=[7]), "a signature .* a JSON object"),
        (text_with(signatures=[SECOND, FIRST]), "order of the signatures"),
        (text_with(signatures=[FIRST, FIRST]), "two signatures by the same key"),
        (signatures_with(cert="x"), "'cert' is unknown"),
        (signatures_with(keyid=""), "'keyid' is missing"),
        (signatures_with(sig=""), "'sig' is missing"),
        (signatures_with(keyid=7), "keyid .* 64 lower-case hex"),
        (signatures_with(keyid=FIRST["keyid"].upper()), "keyid .* 64 lower-case hex"),
        (signatures_with(keyid=FIRST["keyid"][:-1]), "keyid .* 64 lower-case hex"),
        (signatures_with(keyid=FIRST["keyid"] + "\n"), "keyid .* 64 lower-case hex"),
        (signatures_with(sig=BITS), "'sig' .* base64"),
        (signatures_with(sig=base64.b64encode(bytes(63)).decode()), "a signature .* 64 bytes"),
        (signatures_with(sig=base64.b64encode(bytes(65)).decode()), "a signature .* 64 bytes"),
    ],
)
def test_other_texts_are_not_envelopes(text: str, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as caught:
        Envelope.from_json(text)
    assert len(str(caught.value)) < 200
    assert SIG not in str(caught.value)


def test_the_text_that_the_wrong_ones_are_made_from_is_right() -> None:
    assert text_with() == signatures_with() == LINE
    Envelope.from_json(LINE).verify(ACME.public, OWNER.public)
    assert base64.b64decode(BITS) == base64.b64decode(SIG)


def test_a_huge_text_is_refused_before_it_is_read() -> None:
    with pytest.raises(EvidenceError, match="an envelope is too large; allowed are"):
        Envelope.from_json("[" * (MAX_ENVELOPE + 1))
    with pytest.raises(EvidenceError, match="payload's size"):
        Envelope.sign(bytes(MAX_STATEMENT + 1), ACME)
    largest = Envelope.sign(bytes(MAX_STATEMENT), ACME, OWNER, BETA)
    assert Envelope.from_json(largest.to_json()) == largest


@pytest.mark.parametrize("value", [None, b"", 7])
def test_only_text_is_read(value: Any) -> None:
    with pytest.raises(EvidenceError, match="allowed is text"):
        Envelope.from_json(value)


def test_nobody_s_envelope_is_none() -> None:
    with pytest.raises(EvidenceError, match="number of signatures"):
        Envelope.sign(PAYLOAD)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(LINE) - 1), st.characters(codec="utf-8"))
def test_no_character_can_be_changed(place: int, character: str) -> None:
    text = LINE[:place] + character + LINE[place + 1 :]
    if text == LINE:
        return
    with pytest.raises(EvidenceError):
        Envelope.from_json(text).verify(ACME.public, OWNER.public)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * len(LINE) - 1))
def test_no_bit_can_be_changed(bit: int) -> None:
    data = bytearray(LINE.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises((EvidenceError, UnicodeDecodeError)):
        Envelope.from_json(data.decode()).verify(ACME.public, OWNER.public)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(LINE) - 1), st.integers(1, 20))
def test_nothing_can_be_left_out_or_repeated(place: int, count: int) -> None:
    for text in (
        LINE[:place] + LINE[place + count :],
        LINE[: place + count] + LINE[place:],
    ):
        if text == LINE:  # nothing was left after the place
            continue
        with pytest.raises(EvidenceError):
            Envelope.from_json(text).verify(ACME.public, OWNER.public)


# -- other implementations -----------------------------------------------------------------


def key_of(identity: Identity) -> SSlibKey:
    public = identity.public
    return SSlibKey(keyid(public), "ed25519", "ed25519", {"public": public.raw.hex()})


def test_securesystemslib_verifies_our_envelopes() -> None:
    found = other.Envelope.from_dict(json.loads(LINE))
    keys = [key_of(ACME), key_of(OWNER)]
    assert set(found.verify(keys, 2)) == {key.keyid for key in keys}
    assert found.payload == PAYLOAD
    assert found.pae() == pae(PAYLOAD_TYPE, PAYLOAD)
    with pytest.raises(VerificationError):
        found.verify([key_of(ACME), key_of(STRANGER)], 2)
    found.payload += b" "
    with pytest.raises(VerificationError):
        found.verify(keys, 2)


def test_we_verify_what_securesystemslib_writes() -> None:
    written = other.Envelope.from_dict(json.loads(LINE)).to_dict()
    assert Envelope.from_json(json.dumps(written, separators=(",", ":"))).to_json() == LINE


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda it: type(it).__name__)
def test_statements_are_in_toto_statements(statement: Statement) -> None:
    found = InTotoStatement.copy_from_pb(
        json_format.Parse(statement.payload(), InTotoMessage())
    )
    found.validate()
    assert found.pb.predicate_type == statement.TYPE
    subjects = [(it.name, it.digest["sha256"]) for it in found.pb.subject]
    assert subjects == statement.subjects()
    predicate = json_format.MessageToDict(found.pb.predicate)
    assert predicate == json.loads(statement.payload())["predicate"]
