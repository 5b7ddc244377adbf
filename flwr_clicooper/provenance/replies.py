"""What a client said of its replies: one signed statement each, in one chained file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flwr_clicooper.errors import EvidenceError, StateError
from flwr_clicooper.provenance.dsse import MAX_ENVELOPE, Envelope
from flwr_clicooper.provenance.fields import digest, mapped, moment, of, text, with_names
from flwr_clicooper.provenance.keys import Identity, PublicIdentity
from flwr_clicooper.provenance.statement import Statement, Subjects, about

_BLOCK = 2**16


@dataclass(frozen=True)
class ReplyStatement(Statement):
    """What a client says of one reply; `docs/attestation.md` has the fields.

    ``outputs``, digests of the reply's records by name, are the subjects.
    """

    TYPE: ClassVar[str] = "urn:flwr-clicooper:reply:v1"
    WHAT: ClassVar[str] = "a reply's statement"
    outputs: Mapping[str, str] = about(mapped(text(), digest()))
    inputs: Mapping[str, str] = of(mapped(text(), digest()))
    message: str = of(text())
    node: str = of(text())
    previous: str = of(digest(empty=True))
    run: str = of(text())
    time: str = of(moment)
    versions: Mapping[str, str] = of(with_names(text(), "flwr", "flwr-clicooper", "python"))

    def _check(self) -> None:
        self._demand(bool(self.outputs), "a reply without records has no statement")

    def subjects(self) -> Subjects:
        """Return the reply's records by name."""
        return sorted(self.outputs.items())

    @classmethod
    def of_subjects(cls, subjects: Subjects) -> dict[str, Any]:
        """Return the outputs."""
        return {"outputs": dict(subjects)}


class ReplyFile:
    """A client's file of statements; processes and threads may append at the same time.

    Parameters
    ----------
    path : Path
        The file. It is made when it is missing.
    identity : Identity
        Who signs; a file is of one identity.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path, self._identity = path, identity

    def check(self) -> None:
        """Return if the file can be continued.

        Raises
        ------
        EvidenceError
            Its last line is damaged, or is not of this identity.
        StateError
            It cannot be opened.
        """
        with self._locked() as handle:
            self._head(handle)

    def append(self, make: Callable[[str], ReplyStatement]) -> Envelope:
        """Sign a statement and add it; when this returns, the disk has it.

        Parameters
        ----------
        make : callable
            Gets the digest of the statement before, ``""`` for the first, and returns the
            statement.

        Raises
        ------
        EvidenceError
            The last line is damaged, or is not of this identity. Nothing is added.
        StateError
            The file cannot be opened or written.
        """
        with self._locked() as handle:
            envelope = Envelope.sign(make(self._head(handle)).payload(), self._identity)
            self._write(handle, envelope.to_json().encode() + b"\n")
            return envelope

    @contextmanager
    def _locked(self) -> Iterator[int]:
        import fcntl

        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StateError(f"the statements {self._path} cannot be opened") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed
            yield handle
        finally:
            os.close(handle)

    def _head(self, handle: int) -> str:
        """Return the digest of the last statement, or ``""`` when there is none."""
        line = _last_line(handle)
        if not line:
            return ""
        try:
            if not line.endswith(b"\n"):
                # It was never sent: a reply leaves only when its whole line is on the disk.
                raise EvidenceError("it is cut off; remove what there is of it to go on")
            return _read(line, self._identity.public)[0].digest
        except EvidenceError as error:
            raise EvidenceError(
                f"the last line of {self._path} cannot be continued: {error}"
            ) from error

    def _write(self, handle: int, line: bytes) -> None:
        size = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
            if written != len(line):
                raise OSError("the disk took a part of the line")
            os.fsync(handle)
            if not size:
                _sync_folder(self._path.parent)
        except OSError as error:
            os.ftruncate(handle, size)
            raise StateError(f"the statements {self._path} cannot be written") from error


def verify_replies(path: Path, key: PublicIdentity) -> list[ReplyStatement]:
    """Return what a client said of its replies, if its file is whole.

    Every line is signed by the key alone, and each has the digest of the line before. That
    lines are missing at the end does not show: compare the last statement with the one
    that came with the last reply.

    Parameters
    ----------
    path : Path
        The file that an `AttestationMod` wrote.
    key : PublicIdentity
        Whose it must be.

    Returns
    -------
    list of ReplyStatement
        In the order in which they were signed.

    Raises
    ------
    EvidenceError
        A line is damaged, forged, missing or moved; the text names it.
    StateError
        The file cannot be read.
    """
    found, previous = [], ""
    for number, line in enumerate(_lines(path), 1):
        try:
            envelope, statement = _read(line, key)
            if statement.previous != previous:
                raise EvidenceError("it does not follow the line before")
        except EvidenceError as error:
            raise EvidenceError(f"{path}, line {number}: {error}") from error
        found.append(statement)
        previous = envelope.digest
    return found


def _read(line: bytes, key: PublicIdentity) -> tuple[Envelope, ReplyStatement]:
    try:
        content = line.decode()
    except UnicodeDecodeError:
        raise EvidenceError("an envelope is not text") from None
    if not content.endswith("\n"):
        raise EvidenceError("an envelope is cut off")
    envelope = Envelope.from_json(content[:-1])
    return envelope, ReplyStatement.parse(envelope.verify(key))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_ENVELOPE + 1):
                yield line
    except OSError as error:
        raise StateError(f"the statements {path} cannot be read") from error


def _last_line(handle: int) -> bytes:
    """Return the last line with its end, or as much of it as an envelope can have."""
    size, block = os.fstat(handle).st_size, _BLOCK
    while True:
        start = max(0, size - block)
        data = os.pread(handle, size - start, start)
        found = data.rfind(b"\n", 0, -1)
        if found >= 0 or start == 0 or block > MAX_ENVELOPE:
            return data[found + 1 :]
        block *= 4


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
