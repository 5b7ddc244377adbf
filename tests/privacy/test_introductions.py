"""Introductions: whose they are, and what is not one."""

from __future__ import annotations

import dataclasses
import json

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from flwr_clicooper.errors import SealError, TrustError
from flwr_clicooper.privacy import sealing
from flwr_clicooper.privacy.sealing import MAX_INTRODUCTION, Introduction, check, introduce

RUN = "run 7"
PARTIES = ("owner", "trainer 1", "trainer 2")
SECRETS = {party: Ed25519PrivateKey.generate() for party in PARTIES}


def verify(identity: str, signature: bytes, data: bytes) -> None:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))
        key.verify(signature, data)
    except (InvalidSignature, ValueError) as error:
        raise TrustError("the signature is wrong") from error


def meet(party: str, run: str = RUN) -> tuple[Introduction, bytes]:
    secret = SECRETS[party]
    identity = secret.public_key().public_bytes_raw().hex()
    return introduce(run, party, identity, secret.sign)


def test_an_introduction_is_checked_and_survives_its_text() -> None:
    for party in PARTIES:
        introduction, private = meet(party)
        check(introduction, RUN, party, verify)
        assert Introduction.from_json(introduction.to_json()) == introduction
        assert private.hex() not in introduction.to_json()
    one, two = (meet("owner") for _ in range(2))
    assert one[0].key != two[0].key
    assert one[0].nonce != two[0].nonce


def test_an_introduction_of_another_run_or_party() -> None:
    introduction, _ = meet("trainer 1")
    with pytest.raises(SealError, match="introduction of trainer 1 is of another run"):
        check(introduction, "run 8", "trainer 1", verify)
    with pytest.raises(SealError, match="of trainer 1; allowed is trainer 2"):
        check(introduction, RUN, "trainer 2", verify)


@pytest.mark.parametrize("field", ["run", "party", "identity", "key", "nonce", "signature"])
def test_a_forged_introduction(field: str) -> None:
    introduction, other = meet("trainer 1")[0], meet("trainer 2", "run 8")[0]
    forged = dataclasses.replace(introduction, **{field: getattr(other, field)})
    with pytest.raises(SealError, match=r"the introduction of .* is refused: the signature"):
        check(forged, forged.run, forged.party, verify)


def test_a_signature_for_something_else_is_not_one_of_an_introduction() -> None:
    introduction, _ = meet("owner")
    signature = SECRETS["owner"].sign(introduction.content[33:])  # without the domain
    with pytest.raises(SealError, match="is refused"):
        check(dataclasses.replace(introduction, signature=signature), RUN, "owner", verify)


GOOD = meet("owner")[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run", "", "printable ASCII"),
        ("run", "x" * 129, "printable ASCII"),
        ("party", "own\ner", "printable ASCII"),
        ("party", "öwner", "printable ASCII"),
        ("party", 7, "printable ASCII"),
        ("identity", None, "printable ASCII"),
        ("key", bytes(31), "32, 16, 64"),
        ("nonce", b"", "32, 16, 64"),
        ("signature", bytes(65), "32, 16, 64"),
    ],
)
def test_a_field_out_of_its_range(field: str, value: object, message: str) -> None:
    with pytest.raises(SealError, match=message):
        dataclasses.replace(GOOD, **{field: value})
    fields = json.loads(GOOD.to_json())
    fields[field] = value.hex() if isinstance(value, bytes) else value
    with pytest.raises(SealError, match=message):
        Introduction.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "7",
        "[" * 2000,
        "{" + "x" * MAX_INTRODUCTION,
        GOOD.to_json() + " " * MAX_INTRODUCTION,
        GOOD.to_json() + " ",
        GOOD.to_json()[:-1],
        GOOD.to_json()[:-1] + ', "more": 1}',
        GOOD.to_json().replace('"run": ', '"run": "other", "run": '),
        GOOD.to_json().replace(GOOD.key.hex(), GOOD.key.hex().upper()),
        GOOD.to_json().replace(GOOD.nonce.hex(), "zz" * 16),
        GOOD.to_json().replace(f'"{GOOD.nonce.hex()}"', "5"),
        GOOD.to_json().replace(f'"{GOOD.nonce.hex()}"', "null"),
        GOOD.to_json().replace('"owner"', '"\\u006fwner"'),
    ],
)
def test_other_texts_are_not_introductions(text: str) -> None:
    with pytest.raises(SealError, match="a text is not an introduction"):
        Introduction.from_json(text)


def test_a_long_text_is_refused_before_it_is_parsed(monkeypatch) -> None:
    parsed = []
    monkeypatch.setattr(sealing.json, "loads", lambda text: parsed.append(text) or {})
    with pytest.raises(SealError, match="a text is not an introduction"):
        Introduction.from_json("[" * (MAX_INTRODUCTION + 1))
    assert all(len(text) <= MAX_INTRODUCTION for text in parsed)


def test_the_longest_introduction_is_not_too_long() -> None:
    introduction = dataclasses.replace(
        GOOD, run="\\" * 128, party='"' * 128, identity="i" * 128
    )
    assert Introduction.from_json(introduction.to_json()) == introduction
