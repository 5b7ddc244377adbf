"""Messages between parties through a relay that may read, change, drop or replay them.

Each party makes an `Introduction` per run: a fresh X25519 key, signed by its identity.
Whoever has checked those of the others builds a `KeyRing`, which has one AES-256-GCM key
per ordered pair of parties. A sealed message is ``nonce (12) | ciphertext | tag (16)`` and
opens only for this run, sender, receiver and what it is about. `Order` then refuses what
is replayed or comes after a gap. The relay still sees sizes and timings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flwr_clicooper.errors import CooperError, SealError
from flwr_clicooper.privacy.aead import OVERHEAD, Memory, decrypted, encrypted

Buffer = bytes | bytearray | memoryview
Sign = Callable[[bytes], bytes]
"""Returns the signature of some bytes."""
Verify = Callable[[str, bytes, bytes], None]
"""Raises a `CooperError` if a key's text, a signature and some bytes do not go together."""

MAX_SEALED = 2**31 - 1
"""Bytes of a sealed message at most; the cipher takes no more at once."""
MAX_INTRODUCTION = 2048
"""Characters of an introduction at most."""

_INTRODUCTION = "clicooper/introduction/v1"
_SEAL = "clicooper/seal/v1"
_NAME = re.compile(r"[ -~]{1,128}")


@dataclass(frozen=True)
class Introduction:
    """What a party says of itself for one attempt at a run.

    Attributes
    ----------
    run : str
        The run's id, 1 to 128 printable ASCII characters, as `party` and `identity`.
    party : str
        Such as ``owner`` or ``trainer 1``.
    identity : str
        The text of its identity's public key.
    key : bytes
        Its X25519 public key for this attempt, 32 bytes.
    nonce : bytes
        16 random bytes that name the attempt.
    signature : bytes
        64 bytes, of `content` by the identity.

    Raises
    ------
    SealError
        A field has a value that is not allowed.
    """

    run: str
    party: str
    identity: str
    key: bytes
    nonce: bytes
    signature: bytes

    def __post_init__(self) -> None:
        texts = (self.run, self.party, self.identity)
        if not all(isinstance(text, str) and _NAME.fullmatch(text) for text in texts):
            raise SealError(
                "an introduction's run, party or identity is not 1 to 128 printable ASCII "
                "characters"
            )
        if (len(self.key), len(self.nonce), len(self.signature)) != (32, 16, 64):
            raise SealError("an introduction's key, nonce, signature are not 32, 16, 64 bytes")

    @property
    def content(self) -> bytes:
        """What the signature is of."""
        return _content(self.run, self.party, self.identity, self.key, self.nonce)

    def to_json(self) -> str:
        """Return it as text."""
        data = {"key": self.key, "nonce": self.nonce, "signature": self.signature}
        fields = {"run": self.run, "party": self.party, "identity": self.identity}
        return json.dumps(fields | {name: value.hex() for name, value in data.items()})

    @classmethod
    def from_json(cls, text: str) -> Introduction:
        """Return the introduction of a text; only the text of `to_json` is accepted.

        Raises
        ------
        SealError
            The text is not an introduction.
        """
        try:
            fields = json.loads(text if len(text) <= MAX_INTRODUCTION else "")
            data = [bytes.fromhex(fields[name]) for name in ("key", "nonce", "signature")]
            found = cls(fields["run"], fields["party"], fields["identity"], *data)
        except (ValueError, TypeError, LookupError, RecursionError):
            raise SealError("a text is not an introduction") from None
        if found.to_json() != text:
            raise SealError("a text is not an introduction as it is written here")
        return found


def introduce(run: str, party: str, identity: str, sign: Sign) -> tuple[Introduction, bytes]:
    """Return a new introduction and the secret half of its key.

    Parameters
    ----------
    run, party, identity : str
        As in `Introduction`.
    sign : callable
        Signs by the identity.
    """
    private, nonce = X25519PrivateKey.generate(), os.urandom(16)
    key = private.public_key().public_bytes_raw()
    signature = sign(_content(run, party, identity, key, nonce))
    return Introduction(
        run, party, identity, key, nonce, signature
    ), private.private_bytes_raw()


def check(introduction: Introduction, run: str, party: str, verify: Verify) -> None:
    """Return if an introduction is of this run and party, and its identity signed it.

    Whether the identity is one that this party may have is for the caller to decide.

    Raises
    ------
    SealError
        It is of another run or party, or the signature is not of its identity.
    """
    if introduction.run != run:
        raise SealError(f"the introduction of {party} is of another run")
    if introduction.party != party:
        raise SealError(f"an introduction is of {introduction.party}; allowed is {party}")
    try:
        verify(introduction.identity, introduction.signature, introduction.content)
    except CooperError as error:
        raise SealError(f"the introduction of {party} is refused: {error}") from error


class KeyRing:
    """Seals for the other parties of a run, and opens what they sealed.

    Parameters
    ----------
    own : Introduction
        This party's.
    private : bytes
        Its secret half, from `introduce`.
    peers : mapping of str to Introduction
        Those of other parties by party name, after `check`.

    Raises
    ------
    SealError
        The secret is not that of `own`, or a peer is another party, of another run, or
        this party itself.
    """

    def __init__(
        self, own: Introduction, private: bytes, peers: Mapping[str, Introduction]
    ) -> None:
        if not _belongs(private, own.key):
            raise SealError(f"the secret key is not that of the introduction of {own.party}")
        for name, peer in peers.items():
            if name != peer.party or name == own.party or peer.run != own.run:
                raise SealError(
                    f"the introduction for {name} is not one of a peer in this run"
                )
        self.own, self.peers = own, dict(peers)
        self._private = private
        self._ciphers: dict[tuple[str, str], AESGCM] = {}

    def with_peers(self, peers: Mapping[str, Introduction]) -> KeyRing:
        """Return a ring with the same secret and these peers."""
        return KeyRing(self.own, self._private, peers)

    def seal(
        self, receiver: str, about: bytes, data: Buffer, memory: Memory = bytearray
    ) -> memoryview:
        """Return bytes that only the receiver can open, and only as what they are.

        Parameters
        ----------
        receiver : str
            The party.
        about : bytes
            What the message is, such as action, round and number; not secret, not sent.
        data : bytes-like
            Any C-contiguous buffer.
        memory : callable
            Gives the memory that the result goes to, of the size that it is asked for.

        Raises
        ------
        SealError
            There is no key for the receiver, or there are too many bytes.
        """
        sender = self.own.party
        cipher, bound = self._cipher(sender, receiver), self._bound(sender, receiver, about)
        plain = _flat(data)
        if len(plain) + OVERHEAD > MAX_SEALED:
            raise SealError(
                f"a message from {sender} to {receiver} has {len(plain):,} bytes; allowed are "
                f"at most {MAX_SEALED - OVERHEAD:,}"
            )
        return encrypted(cipher, plain, bound, memory)

    def open(
        self,
        sender: str,
        about: bytes,
        sealed: Buffer,
        what: str = "a message",
        memory: Memory = bytearray,
    ) -> memoryview:
        """Return what a party sealed for this one, to read only.

        Parameters
        ----------
        sender : str
            The party that must have sealed it.
        about : bytes
            As the sender gave it.
        sealed : bytes-like
            What came.
        what : str
            What an error calls it.
        memory : callable
            Gives the memory that the result goes to, of the size that it is asked for.

        Raises
        ------
        SealError
            It was changed, cut, made by another party, for another party or run, or about
            something else; or there is no key for the sender.
        """
        receiver, view = self.own.party, _flat(sealed)
        cipher, bound = self._cipher(sender, receiver), self._bound(sender, receiver, about)
        if not OVERHEAD <= len(view) <= MAX_SEALED:
            raise SealError(
                f"{what} from {sender} to {receiver} has {len(view):,} bytes; allowed are "
                f"{OVERHEAD} to {MAX_SEALED:,}"
            )
        try:
            return decrypted(cipher, view, bound, memory)
        except InvalidTag:
            raise SealError(
                f"{what} from {sender} to {receiver} does not open: it was changed on its "
                "way, or is not the one for this place"
            ) from None

    def to_json(self) -> bytes:
        """Return all of it, with its secret, to be kept in a file of its owner only."""
        peers = [peer.to_json() for peer in self.peers.values()]
        fields = {"own": self.own.to_json(), "private": self._private.hex(), "peers": peers}
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, data: bytes) -> KeyRing:
        """Return the ring that `to_json` gave.

        Raises
        ------
        SealError
            The bytes are damaged.
        """
        try:
            fields = json.loads(data)
            own = Introduction.from_json(fields["own"])
            peers = [Introduction.from_json(text) for text in fields["peers"]]
            private = bytes.fromhex(fields["private"])
            return cls(own, private, {peer.party: peer for peer in peers})
        except (ValueError, TypeError, LookupError, RecursionError, SealError):
            raise SealError("a stored key ring is damaged") from None

    def _cipher(self, sender: str, receiver: str) -> AESGCM:
        """Return the cipher of one direction, of which this party is one end."""
        if (sender, receiver) in self._ciphers:
            return self._ciphers[sender, receiver]
        peer = sender if receiver == self.own.party else receiver
        if peer not in self.peers:
            known = ", ".join(sorted(self.peers)) or "nobody"
            raise SealError(f"{self.own.party} has no key for {peer}; it has for {known}")
        other = self.peers[peer]
        try:
            shared = X25519PrivateKey.from_private_bytes(self._private).exchange(
                X25519PublicKey.from_public_bytes(other.key)
            )
        except ValueError:  # a point of small order
            raise SealError(f"the key of {peer} gives no shared secret") from None
        both = _joined(sorted((self.own.content, other.content)))
        key = HKDF(
            hashes.SHA256(),
            length=32,
            salt=hashlib.sha256(both).digest(),
            info=_joined((_SEAL, self.own.run, sender, receiver)),
        ).derive(shared)
        return self._ciphers.setdefault((sender, receiver), AESGCM(key))

    def _bound(self, sender: str, receiver: str, about: bytes) -> bytes:
        """Return the associated data of a message."""
        return _joined((_SEAL, self.own.run, sender, receiver, about))


class Order:
    """The next number of each channel; to be asked after a message has opened.

    Parameters
    ----------
    expected : mapping of str to int, optional
        Next numbers by channel; other channels begin at 0.
    """

    def __init__(self, expected: Mapping[str, int] | None = None) -> None:
        self._expected = dict(expected or {})
        if not all(_is_number(number) for number in self._expected.values()):
            raise SealError("the next number of a channel is not an integer from 0")

    @property
    def expected(self) -> dict[str, int]:
        """Next numbers by channel, as `Order` takes them; JSON can hold it."""
        return dict(self._expected)

    def check(self, channel: str, number: int) -> None:
        """Return if a message is the next of its channel, and expect the one after it.

        Raises
        ------
        SealError
            The message was there before, or one before it is missing.
        """
        following = self._expected.get(channel, 0)
        if not _is_number(number):
            raise SealError(f"{channel}: the number of a message is not an integer from 0")
        if number < following:
            raise SealError(f"{channel}: message {number} is replayed; allowed is {following}")
        if number > following:
            raise SealError(
                f"{channel}: message {number} came too early: {following} is missing before it"
            )
        self._expected[channel] = following + 1


def _content(run: str, party: str, identity: str, key: bytes, nonce: bytes) -> bytes:
    return _joined((_INTRODUCTION, run, party, identity, key, nonce))


def _joined(parts: Iterable[str | bytes]) -> bytes:
    """Return parts with their lengths before them, so that no two lists give the same."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


def _flat(data: Buffer) -> memoryview:
    """Return a view of the bytes of a buffer of any shape."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # no shape may have a zero


def _belongs(private: bytes, key: bytes) -> bool:
    """Return whether a secret key is that of a public one."""
    try:
        own = X25519PrivateKey.from_private_bytes(private)
    except ValueError:
        return False
    return own.public_key().public_bytes_raw() == key


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0
