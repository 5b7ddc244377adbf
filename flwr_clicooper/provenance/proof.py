"""Proof that one statement is in a run's log, to be checked without the rest of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance import check_statements
from flwr_clicooper.provenance.attestation import LogHead
from flwr_clicooper.provenance.checking import Case, Check, Problem, Report, Rule, shown
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import LINES_FILE, Line, RunEvidence
from flwr_clicooper.provenance.fields import (
    Document,
    canonical,
    choice,
    digest,
    integer,
    listed,
    of,
    parsed,
)
from flwr_clicooper.provenance.log import check_inclusion
from flwr_clicooper.provenance.trust import Trust

FORMAT = "flwr-clicooper/proof/v1"
MAX_PROOF = 2**25
"""Bytes in a proof at most."""


def _envelope(value: Any, where: str) -> Mapping[str, Any]:
    """Check an envelope, as an object."""
    try:
        Envelope.from_json(canonical(value).decode())
    except EvidenceError as error:
        raise EvidenceError(f"{where}: {error}") from None
    checked: Mapping[str, Any] = value
    return checked


@dataclass(frozen=True)
class Proof(Document):
    """A statement of a run's log, and all that it takes to check that it is.

    Attributes
    ----------
    format : str
        `FORMAT`.
    envelope : dict
        The statement.
    jobs : tuple of dict
        All jobs of the run, which say whose signatures are needed.
    index, size : int
        Which leaf, from 0, of how many.
    path : tuple of str
        Hashes in hex that lead from the leaf to the root.
    head : dict
        The tree head that the relay signed.
    """

    WHAT: ClassVar[str] = "a proof"
    LIMIT: ClassVar[int] = MAX_PROOF
    format: str = of(choice(FORMAT))
    envelope: Mapping[str, Any] = of(_envelope)
    jobs: tuple[Mapping[str, Any], ...] = of(listed(_envelope, 1))
    index: int = of(integer())
    size: int = of(integer(1))
    path: tuple[str, ...] = of(listed(digest()))
    head: Mapping[str, Any] = of(_envelope)

    @classmethod
    def of_run(cls, run: RunEvidence, segment: int, round_: int) -> Self:
        """Return the proof of a segment's statement of a round; round 0 is its first start.

        Raises
        ------
        EvidenceError
            There is no such statement, or the log does not fit the lines.
        """
        first = run.segments.get(segment, (None,))[0]
        line = run.round(segment, round_) if round_ else first
        if line is None:
            raise EvidenceError(
                f"the run has no statement of segment {segment}, round {round_}"
            )
        if run.head is None or run.head.statement.head.size != len(run.lines):
            raise EvidenceError("the signed tree head is not over the lines that are here")
        path = [part.hex() for part in run.log.inclusion(line.index)]
        jobs = tuple(_object(job.envelope) for job in run.jobs)
        envelope, head = _object(line.envelope), _object(run.head.envelope)
        return cls(FORMAT, envelope, jobs, line.index, len(run.lines), tuple(path), head)

    @property
    def evidence(self) -> RunEvidence:
        """The jobs and the statement, as evidence of a run.

        Raises
        ------
        EvidenceError
            One of them is not what it must be.
        """
        head = _read(self.head)
        signed = Line(0, head, LogHead.parse(head.payload), head.digest)
        found = RunEvidence.of([*map(_read, self.jobs), _read(self.envelope)], signed)
        if (len(found.jobs), len(found.rounds)) != (len(self.jobs), 1):
            raise EvidenceError("a proof is not of jobs and one trainer's statement")
        return found


def check_proof(data: bytes, trust: Trust | None = None) -> Report:
    """Check a proof by itself; nothing that is off passes, and nothing raises.

    Parameters
    ----------
    data : bytes
        The proof's file.
    trust : Trust, optional
        Whose keys are trusted.
    """
    try:
        proof = Proof.parse(data)
        run = proof.evidence
    except EvidenceError as error:
        meaning = "The file is not a proof, or was changed."
        return Report((Check("proof", "failed", shown(str(error)), "the file", meaning),))
    said = run.rounds[0].statement
    what = f"run {said.run}, segment {said.segment}, {said.kind} {said.round}: {said.subject}"
    rules = (
        *_RULES,
        Rule("log", "it is in the log", _REWRITTEN, lambda _: _logged(proof, run)),
    )
    case = Case(Path(), run, trust)
    checks = [_here(rule.check(case)) for rule in rules]
    return Report((Check("proof", "passed", shown(what)), *checks), shown(said.run))


_REWRITTEN = "The relay did not log this statement, or the proof is of another log."
_RULES = (
    Rule(
        "jobs",
        "attempts are in order and on the same terms",
        "An attempt was left out or invented.",
        check_statements.jobs,
    ),
    Rule(
        "agreement",
        "all parties signed each job, and nobody else",
        "Somebody did not agree to this job.",
        check_statements.agreement,
    ),
    Rule(
        "trusted keys",
        "every party's key is listed in the trust file for its role and stage",
        "A key is not that of a party you trust.",
        check_statements.trusted,
    ),
    Rule(
        "place",
        "it is of a run, attempt and segment of these jobs",
        "The statement comes from elsewhere.",
        check_statements.belonging,
    ),
    Rule(
        "signature",
        "the segment's trainer signed it",
        "The statement was forged or changed.",
        check_statements.signed,
    ),
)


def _here(check: Check) -> Check:
    """Return a check that does not name a file which is not here."""
    return replace(check, where=check.where.replace(LINES_FILE, "the proof"))


def _logged(proof: Proof, run: RunEvidence) -> Iterator[Problem]:
    head, job = run.head, run.jobs[-1].statement
    assert head is not None
    leaf, path = bytes.fromhex(run.rounds[0].digest), [bytes.fromhex(it) for it in proof.path]
    said = head.statement
    if (said.run, said.size) != (job.run, proof.size):
        yield Problem("the tree head is of another run or size", "head")
    try:
        head.envelope.verify(job.party("relay"))
        check_inclusion(leaf, proof.index, proof.size, path, bytes.fromhex(said.root))
    except EvidenceError as error:
        yield Problem(str(error), "head")


def _object(envelope: Envelope) -> Mapping[str, Any]:
    found: Mapping[str, Any] = parsed(envelope.to_json(), "an envelope", MAX_PROOF)
    return found


def _read(envelope: Mapping[str, Any]) -> Envelope:
    return Envelope.from_json(canonical(envelope).decode())
