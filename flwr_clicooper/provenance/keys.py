"""Who a party is: an Ed25519 identity, kept in a file, and what others know of it."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from flwr_clicooper.errors import StateError, TrustError

MAX_FILE = 2**20
"""Bytes in a file of keys at most."""

_PREFIX = "ed25519:"
# Points of small order and their second encodings, without the sign bit. OpenSSL takes
# them as keys, and for such a key anyone can make signatures that verify.
_WEAK = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a party; as text ``ed25519:`` and base64url without padding.

    Attributes
    ----------
    raw : bytes
        The 32 bytes of the Ed25519 public key.

    Raises
    ------
    TrustError
        The bytes are not a public key that can be trusted.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise TrustError(f"a public key has {len(self.raw)} bytes; allowed are 32")
        if self.raw[:31] + bytes([self.raw[31] & 0x7F]) in _WEAK:
            raise TrustError("a public key is one for which anyone can sign")

    def __str__(self) -> str:
        return _as_text(self.raw)

    @classmethod
    def parse(cls, text: str) -> PublicIdentity:
        """Return the identity of a text; only the text that `str` gives is accepted.

        Raises
        ------
        TrustError
            The text is not a public key.
        """
        try:
            raw = base64.urlsafe_b64decode(text.removeprefix(_PREFIX) + "=")
        except ValueError:
            raw = b""
        if len(raw) != 32 or _as_text(raw) != text:
            raise TrustError(
                f"a text is not a public key; allowed is {_PREFIX!r} and 43 characters of "
                "base64url, as 'clicooper keygen' prints it"
            )
        return cls(raw)

    @property
    def spki(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self._key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `spki`, 32 bytes."""
        return hashlib.sha256(self.spki).digest()

    @property
    def fingerprint(self) -> str:
        """The first 80 bits of `digest`, for people to compare."""
        return self.digest[:10].hex("-", 2)

    @property
    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.raw)

    def verify(self, signature: bytes, data: bytes) -> None:
        """Return if the signature is of this identity and these bytes.

        Raises
        ------
        TrustError
            It is not.
        """
        try:
            self._key.verify(signature, data)
        except (InvalidSignature, ValueError):
            raise TrustError(
                f"a signature is not one by the key with fingerprint {self.fingerprint}"
            ) from None


def verify(identity: str, signature: bytes, data: bytes) -> None:
    """Raise unless the identity with this text signed some bytes.

    Raises
    ------
    TrustError
        The text is not a key, or the signature is not by it.
    """
    PublicIdentity.parse(identity).verify(signature, data)


class Identity:
    """An Ed25519 identity with its secret; make one by `new` or `load`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def new(cls) -> Identity:
        """Return a new identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Return the identity of a file.

        Raises
        ------
        StateError
            The file is missing, others may read it, or it does not hold an identity.
        """
        data = read_private(path, "identity key")
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise StateError(
                f"{path} does not hold an identity key; allowed is an Ed25519 key as PKCS8 "
                "PEM without password, as 'clicooper keygen' writes it"
            )
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the identity to a file that only its owner may read.

        Raises
        ------
        StateError
            The file exists, or cannot be written.
        """
        data = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        except FileExistsError as error:
            raise StateError(f"{path} exists; an identity is never overwritten") from error
        except OSError as error:
            raise StateError(f"the identity key {path} cannot be written") from error

    @property
    def public(self) -> PublicIdentity:
        """What others may know of it."""
        return PublicIdentity(self._key.public_key().public_bytes_raw())

    def derive(self, purpose: str) -> bytes:
        """Return 32 secret bytes that only this identity can make, by HKDF-SHA256.

        Parameters
        ----------
        purpose : str
            What they are for; other purposes give other bytes.
        """
        info = f"clicooper/derive/v1/{purpose}".encode()
        return HKDF(SHA256(), 32, salt=None, info=info).derive(self._key.private_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """Return the signature of some bytes, 64 bytes."""
        return self._key.sign(data)


def _as_text(raw: bytes) -> str:
    return _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def read_file(path: Path) -> tuple[bytes, int]:
    """Return content and mode of one and the same file; a large one is an `OSError`."""
    with path.open("rb") as file:
        data, mode = file.read(MAX_FILE + 1), os.fstat(file.fileno()).st_mode
    if len(data) > MAX_FILE:
        raise OSError(f"{path} has more than {MAX_FILE:,} bytes")
    return data, mode


def read_private(path: Path, what: str) -> bytes:
    """Return the content of a file that only its owner may read or write.

    Raises
    ------
    StateError
        The file cannot be read, or others may read it.
    """
    try:
        data, mode = read_file(path)
    except OSError as error:
        raise StateError(f"the {what} {path} cannot be read") from error
    if mode & 0o077:
        raise StateError(f"others may read the {what} {path}; use chmod 600")
    return data
