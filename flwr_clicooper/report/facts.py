"""What the evidence of a run says, in the words and the order in which people read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import Job, RoundStatement
from flwr_clicooper.provenance.check_files import MAX_SETTINGS, PRIVACY_FILE
from flwr_clicooper.provenance.checking import (
    Case,
    NotChecked,
    Outcome,
    Problem,
    Report,
    shown,
)
from flwr_clicooper.provenance.evidence import (
    LINES_FILE,
    LOG_FILE,
    Line,
    RunEvidence,
    read_bytes,
)
from flwr_clicooper.provenance.fields import parsed
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.provenance.trust import Trust
from flwr_clicooper.provenance.verify import RULES

_NEEDED = (
    "signatures",
    "chain in time",
    "chain of segments",
    "streams",
    "steps and records",
)
"""Checks without which a trainer's statement does not count as checked."""
_MOST = 10_000
"""Problems of a check that are placed at most."""


@dataclass(frozen=True)
class Facts:
    """A run's evidence, what verifying gave, and what else there is to know of it.

    Attributes
    ----------
    evidence : RunEvidence
        Its statements; empty if they cannot be read.
    report : Report
        What verifying gave.
    names : mapping of PublicIdentity to str
        What parties are called; others go by their fingerprint.
    privacy : tuple of str
        The words of the privacy statement, a sentence each.
    faults : mapping of str to tuple of str
        What is off, by the place where; the places that `report` names if not given.
    """

    evidence: RunEvidence
    report: Report
    names: Mapping[PublicIdentity, str] = field(default_factory=dict)
    privacy: tuple[str, ...] = ()
    faults: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def name(self, key: PublicIdentity) -> str:
        """Return what a party is called."""
        return self.names.get(key, key.fingerprint)

    @cached_property
    def job(self) -> Job | None:
        """What was agreed on last, if anything was."""
        return self.evidence.jobs[-1].statement if self.evidence.jobs else None

    def trainer(self, line: Line[RoundStatement]) -> PublicIdentity | None:
        """Return whose statement this must be, if its job is there and says so."""
        job, segment = self.evidence.job_of(line), line.statement.segment
        if job is None or segment > job.trainers:
            return None
        return job.party("trainer", segment)

    def trainer_name(self, line: Line[RoundStatement]) -> str:
        """Return what the trainer of a statement is called."""
        key = self.trainer(line)
        return "unknown" if key is None else self.name(key)

    @cached_property
    def wrong(self) -> Mapping[str, tuple[str, ...]]:
        """What is off, by the place where."""
        if self.faults:
            return self.faults
        found: dict[str, list[str]] = {}
        for check in self.report.failed:
            _place(found, check.name, check.what, check.where)
        return _unique(found)

    def state(self, where: str, *needed: str) -> Outcome:
        """Return whether what is in a place passed.

        Parameters
        ----------
        where : str
            As checks name it.
        *needed : str
            Checks that must have been made for that.
        """
        if shown(where) in self.wrong:
            return "failed"
        made = {it.name for it in self.report.checks if it.outcome != "not checked"}
        return "passed" if made.issuperset(needed) else "not checked"

    def outcome(self, needed: Sequence[str], *others: str) -> Outcome:
        """Return the outcome of some checks together.

        Parameters
        ----------
        needed : sequence of str
            Checks that must have passed.
        *others : str
            Checks that must not have failed.
        """
        found = {it.name: it.outcome for it in self.report.checks}
        if any(found.get(name) == "failed" for name in (*needed, *others)):
            return "failed"
        passed = all(found.get(name) == "passed" for name in needed)
        return "passed" if passed else "not checked"

    def failed(self, *checks: str) -> tuple[str, ...]:
        """Return what those of some checks found that failed."""
        return tuple(f"{it.name}: {it.what}" for it in self.report.failed if it.name in checks)

    def round_state(self, line: Line[RoundStatement]) -> Outcome:
        """Return whether a trainer's statement passed all checks that are about it."""
        return self.state(line.where, *_NEEDED)

    def verdict(self) -> str:
        """Return in a sentence whether the evidence holds."""
        report = self.report
        if not report.ok:
            failed = ", ".join(check.name for check in report.failed)
            return f"FAILED: {failed or 'nothing could be checked'}. Do not rely on this run."
        absent = [it.name for it in report.checks if it.outcome == "not checked"]
        passed = len(report.checks) - len(absent)
        rest = f"; not checked: {', '.join(absent)}" if absent else ""
        return f"The evidence holds: {passed} checks passed{rest}."

    @cached_property
    def attempts(self) -> tuple[str, ...]:
        """How each attempt came about, in words."""
        jobs = [line.statement for line in self.evidence.jobs]
        return tuple(
            ["begins the run"] * bool(jobs) + [self._went_on(*pair) for pair in pairwise(jobs)]
        )

    def _went_on(self, before: Job, job: Job) -> str:
        again = f"tried again after round {job.after}"
        if job.run != before.run:
            again = f"resumes run {job.resumes} after round {job.after}"
        if _all_new(before, job):
            return f"{again}; all keys are new"
        new = self.handed_over(job)
        to = ", ".join(
            f"segment {segment} to {self.name(job.party('trainer', segment))}"
            for segment in new
        )
        if job.run != before.run:
            return f"{again}; hand-over: {to}" if to else again
        return f"hand-over after round {job.after}: {to}" if to else again

    def handed_over(self, job: Job) -> tuple[int, ...]:
        """Return the segments whose trainer is another than in the attempt before.

        None where all keys are new: parties without an identity of their own have one per
        attempt, and who is who cannot be said.
        """
        number = job.attempt - 2
        jobs = self.evidence.jobs
        if not 0 <= number < len(jobs) or _all_new(before := jobs[number].statement, job):
            return ()
        return tuple(
            it.stage for it in job.parties if it.role == "trainer" and it not in before.parties
        )


def _all_new(before: Job, job: Job) -> bool:
    """Whether neither the owner nor any trainer has the key that it had before."""
    parties = {it for it in before.parties if it.role != "relay"}
    return parties.isdisjoint(job.parties)


def facts_of(case: Case, report: Report) -> Facts:
    """Return what is to be told of a run that was verified.

    Parameters
    ----------
    case : Case
        What was checked.
    report : Report
        What came out.
    """
    names = _names(case.trust)
    return Facts(case.run, report, names, _privacy(case.folder), _faults(case, report))


def _names(trust: Trust | None) -> dict[PublicIdentity, str]:
    return {} if trust is None else {party.key: party.name for party in trust.parties}


def _privacy(folder: Path) -> tuple[str, ...]:
    """Return the words of the privacy statement; whether it was signed is a check."""
    try:
        found = parsed(
            read_bytes(folder / PRIVACY_FILE, MAX_SETTINGS), PRIVACY_FILE, MAX_SETTINGS
        )
    except EvidenceError:
        return ()
    words = found.get("words") if isinstance(found, dict) else None
    return tuple(words.splitlines()) if isinstance(words, str) else ()


def _faults(case: Case, report: Report) -> dict[str, tuple[str, ...]]:
    """Return all that the failed checks found, by place; a report has only the first."""
    found: dict[str, list[str]] = {}
    failed = {check.name for check in report.failed}
    for check in report.failed:
        if check.name in (LINES_FILE, LOG_FILE):  # these are no rules
            _place(found, check.name, check.what, check.where)
    for rule in (rule for rule in RULES if rule.name in failed):
        try:
            for problem in islice(rule.find(case), _MOST):
                if isinstance(problem, Problem):
                    _place(found, rule.name, shown(problem.what), shown(problem.where))
        except NotChecked:
            continue
    return _unique(found)


def _place(found: dict[str, list[str]], check: str, what: str, where: str) -> None:
    """Add what a check found; what is off with the log is nobody else's statement."""
    place = LOG_FILE if check == "tree heads" else where
    found.setdefault(place, []).append(f"{check}: {what}")


def _unique(found: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {where: tuple(dict.fromkeys(texts)) for where, texts in found.items()}


def option(job: Job, name: str) -> str:
    """Return an option of a job as text; what it is was not checked."""
    value = job.options.get(name, "")
    return value if isinstance(value, str) else json.dumps(value)
