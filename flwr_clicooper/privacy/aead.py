"""AES-GCM into memory that the caller gives, with every version of the library."""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Memory = Callable[[int], bytearray | memoryview]
"""Gives so many bytes of memory; all of them will be written."""
NONCE = 12
OVERHEAD = 28
"""Bytes of a nonce and a tag."""
_HAS_INTO = hasattr(AESGCM, "decrypt_into")  # not in older versions


def encrypted(cipher: AESGCM, plain: memoryview, bound: bytes, memory: Memory) -> memoryview:
    """Return ``nonce | ciphertext | tag`` with a new random nonce.

    Parameters
    ----------
    cipher : AESGCM
        The key.
    plain : memoryview
        Bytes.
    bound : bytes
        Associated data.
    memory : callable
        Where the result goes.
    """
    nonce = os.urandom(NONCE)
    if not _HAS_INTO:
        return memoryview(bytearray().join((nonce, cipher.encrypt(nonce, plain, bound))))
    sealed = memoryview(memory(len(plain) + OVERHEAD))
    sealed[:NONCE] = nonce
    cipher.encrypt_into(nonce, plain, bound, sealed[NONCE:])
    return sealed


def decrypted(cipher: AESGCM, sealed: memoryview, bound: bytes, memory: Memory) -> memoryview:
    """Return what `encrypted` made, to read only.

    Raises
    ------
    InvalidTag
        It is not the same, or the key or the associated data are not. Nothing that may
        have been decrypted is left in memory.
    """
    nonce, rest = sealed[:NONCE], sealed[NONCE:]
    if not _HAS_INTO:
        return memoryview(cipher.decrypt(nonce, rest, bound))
    plain = memoryview(memory(len(sealed) - OVERHEAD))
    try:
        cipher.decrypt_into(nonce, rest, bound, plain)
    except InvalidTag:
        plain[:] = bytes(len(plain))  # the library writes before it has seen the tag
        raise
    return plain.toreadonly()
