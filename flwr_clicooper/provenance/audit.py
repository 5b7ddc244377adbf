"""Which steps of a run are to be repeated, and what came out of it.

A trainer commits to its states before anybody knows which of them it must open: the verifier
draws a nonce when the log is closed, and nonce and log decide. `docs/attestation.md` has the
format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.evidence import Line, RunEvidence
from flwr_clicooper.provenance.fields import (
    Document,
    Part,
    digest,
    integer,
    listed,
    of,
    part,
    plain,
    text,
)
from flwr_clicooper.provenance.flow import Flow
from flwr_clicooper.provenance.streams import framed

FORMAT = "flwr-clicooper/audit/v1"
MAX_AUDITS = 10_000
MAX_CHALLENGE = 2**21
"""Bytes in a challenge at most."""
_PURPOSE = "clicooper/audit/v1"


@dataclass(frozen=True, order=True)
class Point(Part):
    """Where steps are repeated: from an audit point of a round up to the next.

    Attributes
    ----------
    segment, round : int
        From 1.
    step : int
        The first step, a multiple of ``audit-every``.
    """

    WHAT: ClassVar[str] = "a point of a challenge"
    segment: int = of(integer(1))
    round: int = of(integer(1))
    step: int = of(integer())


@dataclass(frozen=True)
class Challenge(Document):
    """What a verifier asks trainers to open; `docs/attestation.md` has the fields."""

    WHAT: ClassVar[str] = "a challenge"
    LIMIT: ClassVar[int] = MAX_CHALLENGE
    audits: int = of(integer(1, MAX_AUDITS))
    every: int = of(integer(1))
    nonce: str = of(digest())
    points: tuple[Point, ...] = of(listed(part(Point), 1))
    root: str = of(digest())
    run: str = of(text())
    size: int = of(integer(1))
    steps: int = of(integer(1))

    def _check(self) -> None:
        ordered = list(self.points) == sorted(set(self.points))
        self._demand(ordered, "its points are not in order, or one stands twice")
        self._demand(len(self.points) <= self.audits, "it has more points than audits")
        for it in self.points:
            inside = it.step < self.steps and it.step % self.every == 0
            self._demand(inside, "a point is no audit point of a round")

    @classmethod
    def draw(cls, run: RunEvidence, audits: int) -> Self:
        """Return a new challenge to a run whose log is closed.

        Parameters
        ----------
        run : RunEvidence
            Verified evidence.
        audits : int
            How many points to draw; all, if there are not so many.

        Raises
        ------
        EvidenceError
            The run has nothing to audit.
        """
        return cls.of_nonce(run, audits, os.urandom(32).hex())

    @classmethod
    def of_nonce(cls, run: RunEvidence, audits: int, nonce: str) -> Self:
        """Return the one challenge that a nonce gives for a run.

        Raises
        ------
        EvidenceError
            As `draw`.
        """
        every, steps = _pace(run)
        root = run.log.root().hex()
        integer(1, MAX_AUDITS)(audits, "the number of audits")
        lines, each = committed(run), -(-steps // every)
        if not lines:
            raise EvidenceError(
                "nothing can be audited: no trainer signed a round with states"
            )
        points = set()
        for number in _numbers(each * len(lines), audits, nonce, root):
            it = lines[number // each].statement
            points.add(Point(it.segment, it.round, number % each * every))
        name = run.jobs[-1].statement.run
        chosen = tuple(sorted(points))
        return cls(audits, every, nonce, chosen, root, name, len(run.lines), steps)

    def check(self, run: RunEvidence) -> None:
        """Refuse a run that the challenge is not for, and points that its nonce does not give.

        Raises
        ------
        EvidenceError
            The text says which.
        """
        size, root = len(run.lines), run.log.root().hex()
        if (self.run, self.root, self.size) != (run.jobs[-1].statement.run, root, size):
            raise EvidenceError(
                f"the challenge is for a log of run {self.run!r} with {self.size:,} lines, "
                "not for this one: it is drawn for one run, after its log was closed"
            )
        if self != Challenge.of_nonce(run, self.audits, self.nonce):
            raise EvidenceError("the challenge's points are not those that its nonce gives")

    def until(self, point: Point) -> int:
        """Return the step up to which a point's steps go, itself not included."""
        return min(point.step + self.every, self.steps)


def _pace(run: RunEvidence) -> tuple[int, int]:
    """Return the steps between audit points, and the steps of a round."""
    if not run.jobs:
        raise EvidenceError("the run has no job, so nothing can be audited")
    job = run.jobs[-1].statement
    every, steps = job.options.get("audit-every", 0), Flow.of(job).steps
    if not every:
        raise EvidenceError(
            "nothing can be audited: the run was made with audit-every = 0, so no trainer "
            "committed to its states"
        )
    return every, steps


def _numbers(total: int, count: int, nonce: str, root: str) -> Iterable[int]:
    """Return different numbers below a total, by a hash; all when there are not more."""
    if total <= count:
        return range(total)
    found: dict[int, None] = {}
    counter = 0
    while len(found) < count:
        data = framed(_PURPOSE, nonce, root, str(counter))
        found[int.from_bytes(hashlib.sha256(data).digest()) % total] = None
        counter += 1
    return found


def committed(run: RunEvidence) -> list[Line[RoundStatement]]:
    """Return the statements that commit to states, in the order of the log."""
    return [it for it in run.rounds if "states" in it.statement.roots]


# -- what came out of it -------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What repeating some steps gave.

    Attributes
    ----------
    segment, round, step, until : int
        Which steps: from ``step`` to before ``until``.
    passed : bool
        Whether they gave what the trainer committed to.
    what : str
        In words: what was repeated, or what is off.
    meaning : str
        What it means that it is off; else empty.
    seconds : float
        Seconds per step of checking and repeating them; 0 if it did not come to that.
    stated : float
        Seconds per step that the trainer stated for the round.
    """

    segment: int
    round: int
    step: int
    until: int
    passed: bool
    what: str
    meaning: str = ""
    seconds: float = 0.0
    stated: float = 0.0


@dataclass(frozen=True)
class AuditReport:
    """What an audit gave.

    Attributes
    ----------
    challenge : Challenge
        What was asked for.
    outcomes : tuple of Outcome
        One per point, in order.
    """

    challenge: Challenge
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether all points passed."""
        return len(self.outcomes) == len(self.challenge.points) and not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes that failed."""
        return tuple(it for it in self.outcomes if not it.passed)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "format": FORMAT,
            "run": self.challenge.run,
            "ok": self.ok,
            "challenge": plain(self.challenge),
            "outcomes": [asdict(it) for it in self.outcomes],
        }
