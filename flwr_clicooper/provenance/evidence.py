"""The evidence of a run as its files hold it: read strictly, indexed, not yet believed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import (
    Delivery,
    Job,
    LogHead,
    RoundStatement,
    parse_statement,
)
from flwr_clicooper.provenance.dsse import MAX_ENVELOPE, Envelope
from flwr_clicooper.provenance.fields import (
    Document,
    digest,
    integer,
    mapped,
    of,
    refuse,
    text,
)
from flwr_clicooper.provenance.log import MerkleLog
from flwr_clicooper.provenance.model_file import open_regular
from flwr_clicooper.provenance.statement import Statement

LINES_FILE = "attestations.jsonl"
LOG_FILE = "log.json"
KEYS_FILE = "watermark.json"
MAX_LINES = 2**28
"""Bytes in a file of statements at most."""

_ROUND = re.compile("[1-9][0-9]{0,8}")

S = TypeVar("S", bound=Statement)
Place = tuple[str, str, int, int]
"""Where a trainer's statement belongs: digest of the job, kind, round, segment."""


@dataclass(frozen=True)
class Line(Generic[S]):
    """One line of ``attestations.jsonl``.

    Attributes
    ----------
    index : int
        From 0, as in the log.
    envelope : Envelope
        What was signed, and by whom; no signature has been checked.
    statement : Statement
        What it says.
    digest : str
        Of the statement.
    """

    index: int
    envelope: Envelope
    statement: S
    digest: str

    @property
    def where(self) -> str:
        """File, line, and what stands there, in words."""
        return f"{LINES_FILE}, line {self.index + 1} ({_words(self.statement)})"


@dataclass(frozen=True)
class RunEvidence:
    """The statements of a run.

    Attributes
    ----------
    lines : tuple of Line
        In the order of the file.
    head : Line of LogHead, or None
        What ``log.json`` holds.
    """

    lines: tuple[Line[Statement], ...]
    head: Line[LogHead] | None = None

    @cached_property
    def jobs(self) -> tuple[Line[Job], ...]:
        """What was agreed on, by attempt."""
        return self._of(Job)

    @cached_property
    def rounds(self) -> tuple[Line[RoundStatement], ...]:
        """What trainers said of starts and rounds."""
        return self._of(RoundStatement)

    @cached_property
    def deliveries(self) -> tuple[Line[Delivery], ...]:
        """What the owner said of the delivery; a run has one at most."""
        return self._of(Delivery)

    @cached_property
    def attempts(self) -> dict[str, int]:
        """Place in `jobs` by the job's digest."""
        return {line.digest: number for number, line in enumerate(self.jobs)}

    @cached_property
    def places(self) -> dict[Place, Line[RoundStatement]]:
        """Trainers' statements by `Place`; the first of those in the same place."""
        return {place(line.statement): line for line in reversed(self.rounds)}

    @cached_property
    def segments(self) -> dict[int, tuple[Line[RoundStatement], ...]]:
        """Trainers' statements by segment."""
        found: dict[int, list[Line[RoundStatement]]] = {}
        for line in self.rounds:
            found.setdefault(line.statement.segment, []).append(line)
        return {segment: tuple(lines) for segment, lines in found.items()}

    @cached_property
    def log(self) -> MerkleLog:
        """The tree over the lines."""
        return MerkleLog(bytes.fromhex(line.digest) for line in self.lines)

    def job_of(self, line: Line[RoundStatement]) -> Job | None:
        """Return the job that a statement names, if it is there."""
        number = self.attempts.get(line.statement.job)
        return None if number is None else self.jobs[number].statement

    def round(self, segment: int, round_: int) -> Line[RoundStatement] | None:
        """Return a segment's statement of a round; the last, should there be several."""
        for job in reversed(self.jobs):
            if found := self.places.get((job.digest, "round", round_, segment)):
                return found
        return None

    def _of(self, kind: type[S]) -> tuple[Line[S], ...]:
        return tuple(
            Line(it.index, it.envelope, it.statement, it.digest)
            for it in self.lines
            if isinstance(it.statement, kind)
        )

    @classmethod
    def of(cls, envelopes: Iterable[Envelope], head: Line[LogHead] | None = None) -> Self:
        """Return the evidence that envelopes are, in their order.

        Raises
        ------
        EvidenceError
            One is not a statement, or belongs elsewhere.
        """
        return cls(tuple(_line(i, envelope) for i, envelope in enumerate(envelopes)), head)


@dataclass(frozen=True)
class DisclosedKeys(Document):
    """``watermark.json``: the keys of the last round's watermarks.

    Attributes
    ----------
    job : str
        Digest of the last attempt's job.
    keys : dict of str to str
        Key in hex by segment; those that have a watermark.
    round : int
        The last round.
    run : str
        The run.
    """

    WHAT: ClassVar[str] = KEYS_FILE
    LIMIT: ClassVar[int] = MAX_ENVELOPE
    job: str = of(digest())
    keys: Mapping[str, str] = of(mapped(text(), digest()))
    round: int = of(integer(1))
    run: str = of(text())


def _round_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _ROUND.fullmatch(value):
        raise refuse(where, "a round from 1")
    return value


@dataclass(frozen=True)
class OwnKeys(Document):
    """``watermark-<stage>.json``: the keys of a trainer's own watermarks, a secret.

    Attributes
    ----------
    keys : dict of str to str
        Key in hex by round; of a round that was tried again, that of the last attempt.
    run : str
        The run.
    segment : int
        The trainer's stage.
    """

    WHAT: ClassVar[str] = "watermark-<stage>.json"
    LIMIT: ClassVar[int] = MAX_ENVELOPE
    keys: Mapping[str, str] = of(mapped(_round_name, digest()))
    run: str = of(text())
    segment: int = of(integer(1))

    @property
    def file_name(self) -> str:
        """The name of its file, such as ``watermark-1.json``."""
        return f"watermark-{self.segment}.json"


def load_run(run_dir: Path) -> RunEvidence:
    """Return the evidence of a run's folder; every byte of both files is accounted for.

    Raises
    ------
    EvidenceError
        A file is missing or damaged; the text names it, and the line.
    """
    return RunEvidence.of(read_lines(run_dir / LINES_FILE), read_head(run_dir / LOG_FILE))


def read_lines(path: Path) -> list[Envelope]:
    """Return the envelopes of a file with one per line.

    Raises
    ------
    EvidenceError
        The file cannot be read, or a line is not one envelope in its one spelling.
    """
    text = _read(path, MAX_LINES)
    *lines, rest = text.split("\n")
    if rest or not lines:
        raise EvidenceError(f"{path.name} does not end with a whole line")
    return [_envelope(line, f"{path.name}, line {i}") for i, line in enumerate(lines, 1)]


def read_head(path: Path) -> Line[LogHead]:
    """Return the tree head of a file that holds nothing else.

    Raises
    ------
    EvidenceError
        The file cannot be read, or is not that.
    """
    text = _read(path, MAX_ENVELOPE + 1)
    if not text.endswith("\n"):
        raise EvidenceError(f"{path.name} does not end with a whole line")
    envelope = _envelope(text[:-1], path.name)
    try:
        return Line(0, envelope, LogHead.parse(envelope.payload), envelope.digest)
    except EvidenceError as error:
        raise EvidenceError(f"{path.name}: {error}") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file.

    Raises
    ------
    EvidenceError
        It cannot be read, or has more than ``limit`` bytes.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError:
        raise EvidenceError(f"{path.name} is missing or cannot be read") from None
    if len(data) > limit:
        raise EvidenceError(f"{path.name} is too large; allowed are {limit:,} bytes")
    return data


def place(statement: RoundStatement) -> Place:
    """Return where a trainer's statement says that it belongs."""
    return statement.job, statement.kind, statement.round, statement.segment


def _line(index: int, envelope: Envelope) -> Line[Statement]:
    try:
        statement = parse_statement(envelope.payload)
    except EvidenceError as error:
        raise EvidenceError(f"{LINES_FILE}, line {index + 1}: {error}") from None
    if isinstance(statement, LogHead):
        raise EvidenceError(f"{LINES_FILE}, line {index + 1}: a tree head is not a line")
    return Line(index, envelope, statement, envelope.digest)


def _envelope(text: str, where: str) -> Envelope:
    try:
        return Envelope.from_json(text)
    except EvidenceError as error:
        raise EvidenceError(f"{where}: {error}") from None


def _read(path: Path, limit: int) -> str:
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise EvidenceError(f"{path.name} is not text") from None


def _words(statement: Statement) -> str:
    match statement:
        case Job():
            return f"job, attempt {statement.attempt}"
        case RoundStatement(kind="start"):
            return f"start of segment {statement.segment} after round {statement.round}"
        case RoundStatement():
            return f"round {statement.round} of segment {statement.segment}"
        case Delivery():
            return "delivery"
        case _:
            return "tree head"
