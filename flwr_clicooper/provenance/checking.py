"""What a check of a run's evidence is, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from os.path import lexists
from pathlib import Path
from typing import Any, Literal

from flwr_clicooper.provenance.attestation import Delivery, Job
from flwr_clicooper.provenance.evidence import Line, RunEvidence
from flwr_clicooper.provenance.trust import Trust

Outcome = Literal["passed", "failed", "not checked"]
FORMAT = "flwr-clicooper/verify/v1"
BITS, ACCEPT = 256, 208
"""Those of `watermark`, which cannot be imported here: it loads PyTorch."""

_COUNTED = 1000
"""Problems that a check counts at most: a file may claim any number of rounds."""
_SHOWN = 400


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    name : str
        Of the check.
    outcome : str
        ``passed``, ``failed``, or ``not checked`` when something that it needs is absent.
    what : str
        In words: what holds, what is off, or what is absent.
    where : str
        File, line or statement that is off; else empty.
    meaning : str
        What it means that it is off; else empty.
    """

    name: str
    outcome: Outcome
    what: str
    where: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Report:
    """What verifying gave.

    Attributes
    ----------
    checks : tuple of Check
        In the order in which they were made.
    run : str
        The run that the evidence says it is of; empty if it says none.
    """

    checks: tuple[Check, ...]
    run: str = ""

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return any(it.outcome == "passed" for it in self.checks) and not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(it for it in self.checks if it.outcome == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        checks = [asdict(check) for check in self.checks]
        return {"format": FORMAT, "run": self.run, "ok": self.ok, "checks": checks}


@dataclass(frozen=True)
class Case:
    """What is to be checked.

    Attributes
    ----------
    folder : Path
        The run's.
    run : RunEvidence
        What its files say.
    trust : Trust or None
        Whose keys are trusted.
    model_file : Path or None
        The delivered model; None for that in the folder, if there is one.
    """

    folder: Path
    run: RunEvidence
    trust: Trust | None = None
    model_file: Path | None = None

    @property
    def job(self) -> Line[Job]:
        """The job of the last attempt."""
        if not self.run.jobs:
            raise NotChecked("there is no job")
        return self.run.jobs[-1]

    @property
    def delivery(self) -> Line[Delivery]:
        """The delivery."""
        if not self.run.deliveries:
            raise NotChecked("the run was not delivered")
        return self.run.deliveries[-1]

    @cached_property
    def model(self) -> Path:
        """The file of the delivered model."""
        found = self.model_file or self.folder / "model.safetensors"
        if self.model_file is None and not lexists(found):
            raise NotChecked("model.safetensors is with the owner; --model names it")
        return found


@dataclass(frozen=True)
class Problem:
    """Something that is off, and where."""

    what: str
    where: str


@dataclass(frozen=True)
class Note:
    """Something to know of a check that may pass."""

    what: str


class NotChecked(Exception):  # noqa: N818 - it is no error
    """Something that a check needs is absent; the text says what."""


@dataclass(frozen=True)
class Rule:
    """One check.

    Attributes
    ----------
    name : str
        Of the check.
    holds : str
        What is so when it passes, in words.
    meaning : str
        What it means when it fails.
    find : callable
        Yields what is off.
    """

    name: str
    holds: str
    meaning: str
    find: Callable[[Case], Iterable[Problem | Note]] = field(repr=False)

    def check(self, case: Case) -> Check:
        """Return the outcome for a case."""
        found: list[Problem | Note] = []
        absent = ""
        try:
            found.extend(islice(self.find(case), _COUNTED))
        except NotChecked as reason:
            absent = str(reason)
        problems = [it for it in found if isinstance(it, Problem)]
        if absent and not problems:
            return Check(self.name, "not checked", shown(absent))
        if problems:
            first, more = problems[0], len(problems) - 1
            what = shown(first.what) + (f" (and {more} more)" if more else "")
            return Check(self.name, "failed", what, shown(first.where), self.meaning)
        notes = [shown(it.what) for it in found]
        return Check(self.name, "passed", "; ".join([self.holds, *notes]))


def shown(text: str) -> str:
    """Return a text that came with the evidence as a terminal may show it."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "..."
