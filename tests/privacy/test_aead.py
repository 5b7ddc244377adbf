"""AES-GCM into given memory."""

from __future__ import annotations

import os

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from flwr_clicooper.privacy import aead
from flwr_clicooper.privacy.aead import OVERHEAD, decrypted, encrypted

CIPHER = AESGCM(bytes(range(32)))
DATA = b"patient 4711" * 10


class Memory:
    """Gives memory that is not zero, and keeps it."""

    def __init__(self) -> None:
        self.given: list[bytearray] = []

    def __call__(self, size: int) -> bytearray:
        self.given.append(bytearray(b"\xff" * size))
        return self.given[-1]


def sealed(data: bytes = DATA) -> bytes:
    return bytes(encrypted(CIPHER, memoryview(data), b"about", bytearray))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100_000])
def test_the_result_goes_to_the_memory_that_was_given(size: int) -> None:
    data, memory = os.urandom(size), Memory()
    closed = encrypted(CIPHER, memoryview(data), b"about", memory)
    assert len(closed) == size + OVERHEAD
    assert closed == memory.given[0]
    assert AESGCM.decrypt(CIPHER, closed[:12], closed[12:], b"about") == data
    assert decrypted(CIPHER, closed, b"about", memory) == data == memory.given[1]


def test_older_versions_of_the_library_make_the_same_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = sealed()
    monkeypatch.setattr(aead, "_HAS_INTO", False)
    old = sealed()
    for _ in range(2):
        for one in (new, old):
            opened = decrypted(CIPHER, memoryview(one), b"about", bytearray)
            assert opened == DATA
            assert opened.readonly
        monkeypatch.setattr(aead, "_HAS_INTO", True)


@pytest.mark.parametrize("place", [0, 12, 60, -1], ids=["nonce", "first", "middle", "tag"])
def test_nothing_is_left_of_what_does_not_open(place: int) -> None:
    changed, memory = bytearray(sealed()), Memory()
    changed[place] ^= 1
    with pytest.raises(InvalidTag):
        decrypted(CIPHER, memoryview(changed), b"about", memory)
    assert memory.given == [bytes(len(DATA))]


def test_what_was_opened_is_to_be_read_only() -> None:
    opened = decrypted(CIPHER, memoryview(sealed()), b"about", bytearray)
    with pytest.raises(TypeError):
        opened[0] = 0


@pytest.mark.parametrize("more", [-1, 1])
def test_memory_of_another_size_is_refused(more: int) -> None:
    def wrong(size: int) -> bytearray:
        return bytearray(size + more)

    with pytest.raises(ValueError, match="buffer must be"):
        encrypted(CIPHER, memoryview(DATA), b"about", wrong)
    with pytest.raises(ValueError, match="buffer must be"):
        decrypted(CIPHER, memoryview(sealed()), b"about", wrong)
