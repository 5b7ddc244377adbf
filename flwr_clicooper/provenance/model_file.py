"""Digests of a delivered model's segments, from the file alone: PyTorch is not needed.

The file holds segment 1's ``weight`` as ``1.weight``. Its writer sorts tensors by kind and
name, and what is a segment's own stays in that order without the ``1.``. So the segment's
canonical safetensors bytes, of which its trainer signed the digest, are parts of this file
behind a header of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.fields import exactly, integer, listed, parsed, text

MAX_HEADER = 10**8
"""Bytes in the header of a safetensors file at most, as in the format's own reader."""
_PIECE = 2**20
_INDEX = re.compile("0|[1-9][0-9]{0,5}")
EMPTY = hashlib.sha256(b"\x08" + bytes(7) + b"{}" + b" " * 6).hexdigest()
"""The digest of a segment without tensors."""

Entry = tuple[str, dict[str, Any]]
"""A tensor's name and what the header says of it."""


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read; what came with a run may be a link to a device without end."""
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    return path.open("rb")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def segment_digests(path: Path) -> dict[int, str]:
    """Return the digest of each segment that has tensors, as its trainer signs it.

    Raises
    ------
    EvidenceError
        The file cannot be read, or is not a delivered model.
    """
    try:
        with open_regular(path) as file:
            start, entries = _header(file, path.name)
            return {
                segment: _digest(file, start, own)
                for segment, own in _by_segment(entries, path.name).items()
            }
    except OSError:
        raise EvidenceError(f"{path.name} is missing or cannot be read") from None


def _header(file: BufferedReader, name: str) -> tuple[int, list[Entry]]:
    """Return where the tensors' bytes begin, and the entries in the order of the file."""
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise EvidenceError(f"{name} is not a safetensors file")
    header = parsed(file.read(size), name, MAX_HEADER)
    if not isinstance(header, dict):
        raise EvidenceError(f"{name} is not a safetensors file")
    header.pop("__metadata__", None)
    entries = [(key, _checked(value, name)) for key, value in header.items()]
    entries.sort(key=lambda entry: entry[1]["data_offsets"])
    end = 0
    for _, entry in entries:
        if entry["data_offsets"][0] != end:
            raise EvidenceError(f"{name}: its tensors leave gaps or overlap")
        end = entry["data_offsets"][1]
    if 8 + size + end != file.seek(0, 2):
        raise EvidenceError(f"{name} is not as long as its header says")
    return 8 + size, entries


def _checked(value: Any, name: str) -> dict[str, Any]:
    entry = exactly(value, ("dtype", "shape", "data_offsets"), f"{name}: a tensor")
    where = f"{name}: a tensor's entry"
    text()(entry["dtype"], where)
    listed(integer())(entry["shape"], where)
    offsets = listed(integer(), 2)(entry["data_offsets"], where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise EvidenceError(f"{where} has no place")
    return entry


def _by_segment(entries: list[Entry], name: str) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {}
    for key, entry in entries:
        segment, dot, own = key.partition(".")
        if not dot or not _INDEX.fullmatch(segment):
            raise EvidenceError(f"{name}: tensor {key[:64]!r} is of no segment")
        found.setdefault(int(segment), []).append((own, entry))
    return found


def _digest(file: BufferedReader, start: int, own: list[Entry]) -> str:
    header, place = {}, 0
    for name, entry in own:
        first, after = entry["data_offsets"]
        header[name] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data_offsets": [place, place + after - first],
        }
        place += after - first
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    digest = hashlib.sha256(len(data).to_bytes(8, "little") + data)
    for _, entry in own:
        for piece in _pieces(file, start, entry["data_offsets"]):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BufferedReader, start: int, offsets: list[int]) -> Iterator[bytes]:
    first, after = offsets
    file.seek(start + first)
    while first < after:
        piece = file.read(min(_PIECE, after - first))
        if not piece:
            raise EvidenceError("a model file became shorter while it was read")
        first += len(piece)
        yield piece
