"""Signed envelopes: DSSE with Ed25519, in one spelling."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from flwr_clicooper.errors import EvidenceError, TrustError
from flwr_clicooper.provenance.fields import MAX_STATEMENT, digest, exactly, parsed, refuse
from flwr_clicooper.provenance.keys import Identity, PublicIdentity

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE = 2 * MAX_STATEMENT
"""Characters in an envelope's text at most."""

_WHAT = "an envelope"
_keyid = digest()


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding.

    Parameters
    ----------
    payload_type : str
        What the payload is.
    payload : bytes
        What is signed.
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def keyid(key: PublicIdentity) -> str:
    """Return what names a key in an envelope: SHA-256 of its SubjectPublicKeyInfo, in hex."""
    return key.digest.hex()


@dataclass(frozen=True)
class Signature:
    """One signature of an envelope.

    Attributes
    ----------
    keyid : str
        What `keyid` gives for the signer's key.
    sig : bytes
        The Ed25519 signature, 64 bytes.

    Raises
    ------
    EvidenceError
        One of them cannot be that.
    """

    keyid: str
    sig: bytes

    def __post_init__(self) -> None:
        _keyid(self.keyid, f"{_WHAT}: the keyid of a signature")
        if not isinstance(self.sig, bytes) or len(self.sig) != 64:
            raise refuse(f"{_WHAT}: a signature", "64 bytes")

    @property
    def fingerprint(self) -> str:
        """The signer's `PublicIdentity.fingerprint`."""
        return bytes.fromhex(self.keyid)[:10].hex("-", 2)


@dataclass(frozen=True)
class Envelope:
    """A statement's bytes and who signed them; a signature is checked only by `verify`.

    Attributes
    ----------
    payload : bytes
        The statement.
    signatures : tuple of Signature
        At least one, sorted by keyid; no key signs twice.

    Raises
    ------
    EvidenceError
        The signatures are not so, or the payload is too large.
    """

    payload: bytes
    signatures: tuple[Signature, ...]

    def __post_init__(self) -> None:
        keyids = self.signed_by()
        if not keyids:
            raise refuse(f"{_WHAT}: the number of signatures", "1 or more")
        if len(set(keyids)) < len(keyids):
            raise EvidenceError(f"{_WHAT} has two signatures by the same key; allowed is one")
        if list(keyids) != sorted(keyids):
            raise refuse(f"{_WHAT}: the order of the signatures", "that of their keyids")
        if len(self.payload) > MAX_STATEMENT:
            raise refuse(f"{_WHAT}: the payload's size", f"{MAX_STATEMENT:,} bytes at most")

    @classmethod
    def sign(cls, payload: bytes, *identities: Identity) -> Envelope:
        """Return a statement signed by some identities.

        Parameters
        ----------
        payload : bytes
            The statement, as its ``payload()`` gives it.
        *identities : Identity
            One or more, each once.

        Raises
        ------
        EvidenceError
            There is none, or one twice.
        """
        return cls(payload, _sorted(_signed(payload, it) for it in identities))

    def countersigned(self, identity: Identity) -> Envelope:
        """Return this envelope with one more signature.

        The signatures that are there are not checked; call `verify` before.

        Raises
        ------
        EvidenceError
            The identity has signed it already.
        """
        return Envelope(
            self.payload, _sorted((*self.signatures, _signed(self.payload, identity)))
        )

    def with_signatures_of(self, other: Envelope) -> Envelope:
        """Return this envelope with the signatures of both.

        Raises
        ------
        EvidenceError
            The statements differ, or a key signed both in different ways.
        """
        if other.payload != self.payload:
            raise EvidenceError(
                "two envelopes hold different statements; allowed are equal ones"
            )
        return Envelope(self.payload, _sorted({*self.signatures, *other.signatures}))

    def verify(self, *keys: PublicIdentity) -> bytes:
        """Return the payload if exactly these keys signed it.

        Raises
        ------
        EvidenceError
            A signature by one of the keys is missing or wrong, or somebody else signed.
        """
        wanted, found = {keyid(key): key for key in keys}, set(self.signed_by())
        for name, key in wanted.items():
            if name not in found:
                raise EvidenceError(
                    f"a statement lacks the signature by the key with fingerprint "
                    f"{key.fingerprint}"
                )
        data = pae(PAYLOAD_TYPE, self.payload)
        for signature in self.signatures:
            if signature.keyid not in wanted:
                raise EvidenceError(
                    "a statement is signed by the key with fingerprint "
                    f"{signature.fingerprint}, which must not sign it"
                )
            try:
                wanted[signature.keyid].verify(signature.sig, data)
            except TrustError as error:
                raise EvidenceError(f"a statement was changed or forged: {error}") from None
        return self.payload

    def signed_by(self) -> tuple[str, ...]:
        """Return the keyids of the signatures, in order; nothing is checked."""
        return tuple(it.keyid for it in self.signatures)

    @property
    def digest(self) -> str:
        """The digest of the statement: SHA-256 of the payload, in hex."""
        return hashlib.sha256(self.payload).hexdigest()

    def to_json(self) -> str:
        """Return the envelope as text, one line without its end."""
        return json.dumps(
            {
                "payload": base64.b64encode(self.payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [
                    {"keyid": it.keyid, "sig": base64.b64encode(it.sig).decode()}
                    for it in self.signatures
                ],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Envelope:
        """Return the envelope of a text; only the text that `to_json` gives is accepted.

        Raises
        ------
        EvidenceError
            The text is anything else.
        """
        if not isinstance(text, str):
            raise refuse(_WHAT, "text")
        value = parsed(text, _WHAT, MAX_ENVELOPE)
        found = exactly(value, ("payload", "payloadType", "signatures"), _WHAT)
        if found["payloadType"] != PAYLOAD_TYPE:
            raise refuse(f"{_WHAT}: 'payloadType'", PAYLOAD_TYPE)
        if not isinstance(found["signatures"], list):
            raise refuse(f"{_WHAT}: 'signatures'", "a list")
        signatures = [
            exactly(it, ("keyid", "sig"), f"{_WHAT}: a signature")
            for it in found["signatures"]
        ]
        envelope = cls(
            _decoded(found["payload"], f"{_WHAT}: 'payload'"),
            tuple(
                Signature(it["keyid"], _decoded(it["sig"], f"{_WHAT}: 'sig'"))
                for it in signatures
            ),
        )
        if envelope.to_json() != text:
            raise refuse(f"{_WHAT}: its spelling", "JSON in order, without white space")
        return envelope


def _signed(payload: bytes, identity: Identity) -> Signature:
    return Signature(keyid(identity.public), identity.sign(pae(PAYLOAD_TYPE, payload)))


def _sorted(signatures: Any) -> tuple[Signature, ...]:
    return tuple(sorted(signatures, key=lambda it: it.keyid))


def _decoded(value: Any, where: str) -> bytes:
    """Return the bytes of base64 in its standard spelling."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or base64.b64encode(data).decode() != value:
        raise refuse(where, "standard base64 with padding")
    return data
