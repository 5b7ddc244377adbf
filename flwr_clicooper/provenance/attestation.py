"""The statements that parties of a run sign, as `docs/attestation.md` defines them."""

# ruff: noqa: RUF009 - `of` and `about` make fields, not values that are shared
from __future__ import annotations

import builtins
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.fields import (
    Part,
    anything,
    canonical,
    choice,
    digest,
    file_name,
    integer,
    listed,
    mapped,
    moment,
    now,
    number,
    of,
    part,
    public_key,
    refuse,
    text,
    with_names,
)
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.provenance.statement import (
    Statement,
    Subjects,
    about,
    opened,
    versions,
)
from flwr_clicooper.provenance.streams import STREAMS, framed

__all__ = [
    "Delivery",
    "FoundMark",
    "Job",
    "JobParty",
    "LogHead",
    "OwnerStream",
    "RoundMark",
    "RoundStatement",
    "Statement",
    "TreeHead",
    "canonical",
    "now",
    "parse_statement",
    "versions",
]

_MAX_MARK = 2**16
_ROOT = "log"


# -- the parts of statements ----------------------------------------------------------------


@dataclass(frozen=True)
class JobParty(Part):
    """A party that agreed to a job.

    Attributes
    ----------
    role : str
        ``owner``, ``trainer`` or ``relay``.
    stage : int
        The trainer's, from 1; 0 for the others.
    key : PublicIdentity
        What it signs with.
    """

    WHAT: ClassVar[str] = "a party of a job"
    role: str = of(choice("owner", "trainer", "relay"))
    stage: int = of(integer())
    key: PublicIdentity = of(public_key)


@dataclass(frozen=True)
class TreeHead(Part):
    """A state of the relay's log.

    Attributes
    ----------
    root : str
        In hex; ``""`` when nothing was shown, with size 0.
    size : int
        Lines.
    """

    WHAT: ClassVar[str] = "a tree head"
    root: str = of(digest(empty=True))
    size: int = of(integer())

    def _check(self) -> None:
        self._demand(bool(self.root) == bool(self.size), "only size 0 has no root")


@dataclass(frozen=True)
class RoundMark(Part):
    """What a trainer says about its watermark of a round.

    Attributes
    ----------
    bits, matches : int
        Bits of this round's watermark, and how many of them the segment gives; 0 of 0
        when there is none.
    commitment : str
        SHA-256 of the next round's key, or ``""``.
    skipped : str
        Why there is none, in words, or ``""``.
    """

    WHAT: ClassVar[str] = "the watermark of a round"
    bits: int = of(integer(0, _MAX_MARK))
    commitment: str = of(digest(empty=True))
    matches: int = of(integer(0, _MAX_MARK))
    skipped: str = of(text(empty=True))

    def _check(self) -> None:
        self._demand(self.matches <= self.bits, "more bits match than there are")
        self._demand(not (self.bits and self.skipped), "a watermark with bits is not skipped")


@dataclass(frozen=True)
class FoundMark(Part):
    """What the owner found of a watermark with the key that was disclosed to it.

    Attributes
    ----------
    segment, round : int
        Where, both from 1.
    bits, matches, commitment
        As in `RoundMark`; the commitment is that to this watermark's own key.
    """

    WHAT: ClassVar[str] = "a watermark that was found"
    bits: int = of(integer(1, _MAX_MARK))
    commitment: str = of(digest())
    matches: int = of(integer(0, _MAX_MARK))
    round: int = of(integer(1))
    segment: int = of(integer(1))

    def _check(self) -> None:
        self._demand(self.matches <= self.bits, "more bits match than there are")


@dataclass(frozen=True)
class OwnerStream(Part):
    """What the owner itself gave or got.

    Attributes
    ----------
    release : int
        The round, or 0 for once.
    root : str
        Of the stream, in hex.
    segment : int
        To which segment or from which, from 1.
    stream : str
        One of `STREAMS`.
    """

    WHAT: ClassVar[str] = "a stream of the owner"
    release: int = of(integer())
    root: str = of(digest())
    segment: int = of(integer(1))
    stream: str = of(choice(*STREAMS))


# -- statements -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job(Statement):
    """What all parties agree on before training; `docs/attestation.md` has the fields.

    ``subject`` is the digest of the privacy statement, the subject.
    """

    TYPE: ClassVar[str] = "urn:flwr-clicooper:job:v1"
    WHAT: ClassVar[str] = "a job"
    subject: str = about()
    run: str = of(text())
    attempt: int = of(integer(1))
    after: int = of(integer())
    previous: str = of(digest(empty=True))
    resumes: str = of(text(empty=True))
    rounds: int = of(integer(1))
    records: int = of(integer(1))
    options: Mapping[str, Any] = of(anything)
    task: Mapping[str, Any] = of(anything)
    cuts: tuple[tuple[str, ...], ...] = of(listed(listed(text())))
    initial: tuple[str, ...] = of(listed(digest(), 1))
    nonce: str = of(digest())
    parties: tuple[JobParty, ...] = of(listed(part(JobParty), 3))

    def _check(self) -> None:
        self._demand((self.attempt == 1) == (not self.previous), "only attempt 1 is the first")
        self._demand(self.after <= self.rounds, "it goes on after its last round")
        trainers = [("trainer", stage) for stage in range(1, self.trainers + 1)]
        places = [(it.role, it.stage) for it in self.parties]
        order = [("owner", 0), *trainers, ("relay", 0)]
        self._demand(places == order, "its parties are not owner, trainers 1 to N and relay")
        self._demand(len(self.initial) == self.trainers, "not one first segment per trainer")
        keys = {it.key for it in self.parties}
        self._demand(len(keys) == len(self.parties), "two parties have the same key")

    def subjects(self) -> Subjects:
        """Return the privacy statement's name and digest."""
        return [("privacy.json", self.subject)]

    @property
    def trainers(self) -> int:
        """How many there are."""
        return len(self.parties) - 2

    def party(self, role: str, stage: int = 0) -> PublicIdentity:
        """Return the key of a party.

        Raises
        ------
        EvidenceError
            The job has no such party.
        """
        for it in self.parties:
            if (it.role, it.stage) == (role, stage):
                return it.key
        raise EvidenceError(f"a job has no {role} {stage}; it has {self.trainers} trainers")


@dataclass(frozen=True)
class RoundStatement(Statement):
    """What a trainer says of its segment; `docs/attestation.md` has the fields.

    ``subject`` is the digest of the segment's canonical safetensors bytes, the subject.
    """

    TYPE: ClassVar[str] = "urn:flwr-clicooper:round:v1"
    WHAT: ClassVar[str] = "a round's statement"
    subject: str = about()
    run: str = of(text())
    job: str = of(digest())
    kind: str = of(choice("start", "round"))
    segment: int = of(integer(1))
    round: int = of(integer())
    previous: str = of(digest(empty=True))
    predecessor: str = of(digest(empty=True))
    roots: Mapping[str, str] = of(mapped(choice(*STREAMS), digest()))
    steps: int = of(integer())
    records: int = of(integer())
    seconds: float = of(number(0))
    bytes: int = of(integer())
    log: TreeHead = of(part(TreeHead))
    watermark: RoundMark = of(part(RoundMark))
    time: str = of(moment)
    versions: Mapping[str, str] = of(with_names(text(), "flwr-clicooper", "python", "torch"))

    def _check(self) -> None:
        start, mark = self.kind == "start", self.watermark
        self._demand(start or self.round > 0, "a round is from 1")
        self._demand(start or bool(self.previous), "a round has a statement before it")
        self._demand(start or bool(self.log.size), "before a round, the log is not empty")
        first = start or self.segment == 1
        self._demand(
            first == (not self.predecessor), "only segment 1 and a start have no predecessor"
        )
        empty = not (self.roots or self.steps or self.records or mark.bits)
        self._demand(not start or empty, "nothing was done before a start")

    def subjects(self) -> Subjects:
        """Return the segment's name and digest."""
        return [(f"segment-{self.segment}", self.subject)]

    def chain(self) -> builtins.bytes:
        """Return what binds the next watermark's key to this statement, 32 bytes."""
        before = (self.job, self.previous, self.subject, self.roots.get("activations-in", ""))
        return hashlib.sha256(framed(*before)).digest()


@dataclass(frozen=True)
class Delivery(Statement):
    """What the owner says of the model it got; `docs/attestation.md` has the fields.

    ``subject`` is the digest of ``model.safetensors``.
    """

    TYPE: ClassVar[str] = "urn:flwr-clicooper:delivery:v1"
    WHAT: ClassVar[str] = "a delivery"
    subject: str = about()
    run: str = of(text())
    job: str = of(digest())
    rounds: int = of(integer(1))
    attestations: tuple[str, ...] = of(listed(digest(), 1))
    log: TreeHead = of(part(TreeHead))
    privacy: str = of(digest())
    metrics: Mapping[str, float] = of(mapped(text(), number()))
    watermarks: tuple[FoundMark, ...] = of(listed(part(FoundMark)))
    streams: tuple[OwnerStream, ...] = of(listed(part(OwnerStream)))
    time: str = of(moment)
    versions: Mapping[str, str] = of(with_names(text(), "flwr-clicooper", "python", "torch"))

    def _check(self) -> None:
        marks = {(it.segment, it.round) for it in self.watermarks}
        self._demand(len(marks) == len(self.watermarks), "a watermark is listed twice")
        streams = {(it.release, it.segment, it.stream) for it in self.streams}
        self._demand(len(streams) == len(self.streams), "a stream is listed twice")
        self._demand(bool(self.log.size), "before a delivery, the log is not empty")

    def subjects(self) -> Subjects:
        """Return the model file's name and digest."""
        return [("model.safetensors", self.subject)]


@dataclass(frozen=True)
class LogHead(Statement):
    """A tree head that the relay signs; `docs/attestation.md` has the fields.

    ``root`` and ``files``, digests by name, are the subjects.
    """

    TYPE: ClassVar[str] = "urn:flwr-clicooper:log:v1"
    WHAT: ClassVar[str] = "a signed tree head"
    root: str = about()
    run: str = of(text())
    size: int = of(integer(1))
    time: str = of(moment)
    files: Mapping[str, str] = about(mapped(file_name, digest()), default_factory=dict)

    def _check(self) -> None:
        self._demand(_ROOT not in self.files, f"a file is named {_ROOT!r}, as the root is")

    def subjects(self) -> Subjects:
        """Return the root, then the files by name."""
        return [(_ROOT, self.root), *sorted(self.files.items())]

    @classmethod
    def of_subjects(cls, subjects: Subjects) -> dict[str, Any]:
        """Return root and files."""
        return {"root": subjects[0][1], "files": dict(subjects[1:])}

    @property
    def head(self) -> TreeHead:
        """Root and size."""
        return TreeHead(self.root, self.size)


_TYPES: tuple[type[Job | RoundStatement | Delivery | LogHead], ...] = (
    Job,
    RoundStatement,
    Delivery,
    LogHead,
)


def parse_statement(payload: bytes) -> Job | RoundStatement | Delivery | LogHead:
    """Return a statement of a run, of whatever type.

    Raises
    ------
    EvidenceError
        The bytes are not one.
    """
    found = opened(payload)
    for cls in _TYPES:
        if found["predicateType"] == cls.TYPE:
            return cls.read(found)
    raise refuse("the type of a statement", " or ".join(cls.TYPE for cls in _TYPES))
