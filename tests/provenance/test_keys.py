"""Identities: their files, their texts, their signatures."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_public_key,
    load_pem_private_key,
)

from flwr_clicooper.errors import StateError, TrustError
from flwr_clicooper.provenance.keys import MAX_FILE, Identity, PublicIdentity

ONE = bytes([1]) + bytes(31)  # the neutral point


def test_a_saved_identity_is_the_same_one(tmp_path: Path) -> None:
    identity, path = Identity.new(), tmp_path / "me.pem"
    identity.save(path)
    again = Identity.load(path)
    assert again.public == identity.public
    identity.public.verify(again.sign(b"data"), b"data")
    assert Identity.new().public != identity.public


def test_the_file_is_pkcs8_that_others_read(tmp_path: Path) -> None:
    identity, path = Identity.new(), tmp_path / "me.pem"
    identity.save(path)
    key = load_pem_private_key(path.read_bytes(), None)
    assert key.public_key().public_bytes_raw() == identity.public.raw


def test_the_file_is_its_owners_only_and_never_overwritten(tmp_path: Path) -> None:
    path, first = tmp_path / "me.pem", Identity.new()
    old = os.umask(0)
    try:
        first.save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StateError, match="never overwritten"):
        Identity.new().save(path)
    assert Identity.load(path).public == first.public
    with pytest.raises(StateError, match="cannot be written"):
        first.save(tmp_path / "no folder" / "me.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "me.pem"
    Identity.new().save(path)
    path.chmod(mode)
    with pytest.raises(StateError, match=r"others may read the identity key .* chmod 600"):
        Identity.load(path)


def pem(key: object, encryption: object = None) -> bytes:
    encryption = encryption or NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_a_file_without_an_identity_is_refused_and_not_shown(tmp_path: Path) -> None:
    path, good = tmp_path / "me.pem", pem(Identity.new()._key)
    with pytest.raises(StateError, match="cannot be read"):
        Identity.load(path)
    wrong = [
        b"",
        good[:-40],
        good[:40] + b"AAAA" + good[44:],
        pem(X25519PrivateKey.generate()),
        pem(Identity.new()._key, BestAvailableEncryption(b"password")),
    ]
    for data in wrong:
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_bytes(data)
        with pytest.raises(StateError, match="does not hold an identity key") as caught:
            Identity.load(path)
        assert "MC4CAQ" not in str(caught.value)
    path.write_bytes(bytes(MAX_FILE + 1))
    with pytest.raises(StateError, match="cannot be read"):
        Identity.load(path)


def test_no_secret_is_printed() -> None:
    identity = Identity.new()
    secret = identity._key.private_bytes_raw()
    for text in (repr(identity), str(identity), repr(identity.public)):
        assert secret.hex() not in text
        assert base64.b64encode(secret).decode() not in text


# -- public identities ---------------------------------------------------------------------


def test_text_and_back() -> None:
    for _ in range(20):
        public = Identity.new().public
        text = str(public)
        head, _, body = text.partition(":")
        assert head == "ed25519"
        assert base64.urlsafe_b64decode(body + "=") == public.raw
        assert PublicIdentity.parse(text) == public


def test_the_digest_is_that_of_the_public_key_info() -> None:
    public = Identity.new().public
    key = load_der_public_key(public.spki)
    assert isinstance(key, Ed25519PublicKey)
    assert key.public_bytes_raw() == public.raw
    assert public.digest == hashlib.sha256(public.spki).digest()
    assert public.fingerprint.replace("-", "") == public.digest.hex()[:20]


GOOD = "ed25519:" + "A" * 42 + "Q"  # may not be a point; that is found when it verifies


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD.removeprefix("ed25519:"),
        GOOD.replace("ed25519", "rsa"),
        GOOD.replace("ed25519", "ED25519"),
        GOOD + "=",
        GOOD + "\n",
        " " + GOOD,
        GOOD[:-1],
        GOOD + "A",
        GOOD[:-1] + "R",  # the same bytes, written otherwise
        GOOD.replace("AAA", "A A", 1),
        GOOD.replace("A", "+", 1),
        GOOD.replace("A", "é", 1),
        "ed25519:ed25519:" + "A" * 43,
    ],
)
def test_other_texts_are_not_keys(text: str) -> None:
    with pytest.raises(TrustError, match="not a public key; allowed is") as caught:
        PublicIdentity.parse(text)
    assert "AAAA" not in str(caught.value)


def test_the_text_that_others_are_made_from_is_a_key() -> None:
    assert str(PublicIdentity.parse("ed25519:" + "B" * 42 + "A")).endswith("BA")
    with pytest.raises(TrustError, match="31 bytes; allowed are 32"):
        PublicIdentity(bytes(31))


def test_a_key_for_which_anyone_can_sign_is_refused() -> None:
    anyone = ONE + bytes(32)
    # The library takes this signature, which nobody's secret made.
    Ed25519PublicKey.from_public_bytes(ONE).verify(anyone, b"I trained it")
    for raw in (ONE, bytes(32), ONE[:31] + b"\x80", b"\xec" + b"\xff" * 31):
        with pytest.raises(TrustError, match="anyone can sign"):
            PublicIdentity(raw)
    with pytest.raises(TrustError, match="anyone can sign"):
        PublicIdentity.parse("ed25519:" + base64.urlsafe_b64encode(ONE).decode().rstrip("="))


# -- signatures ----------------------------------------------------------------------------


def test_signatures_are_of_one_identity_and_one_text() -> None:
    identity = Identity.new()
    signature = identity.sign(b"data")
    assert len(signature) == 64
    identity.public.verify(signature, b"data")
    changed = bytes([signature[0] ^ 1]) + signature[1:]
    for wrong, data in (
        (signature, b"Data"),
        (signature, b""),
        (changed, b"data"),
        (signature[:-1], b"data"),
        (signature + b"\0", b"data"),
        (b"", b"data"),
        (Identity.new().sign(b"data"), b"data"),
    ):
        with pytest.raises(TrustError, match="a signature is not one by the key") as caught:
            identity.public.verify(wrong, data)
        assert identity.public.fingerprint in str(caught.value)


def test_a_key_that_is_no_point_verifies_nothing() -> None:
    with pytest.raises(TrustError, match="a signature is not"):
        PublicIdentity(bytes([2]) + bytes(31)).verify(bytes(64), b"")
