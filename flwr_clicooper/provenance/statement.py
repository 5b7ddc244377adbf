"""What all signed statements share: in-toto Statement v1 as canonical JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any, ClassVar, Self

from flwr_clicooper.provenance.fields import (
    MAX_STATEMENT,
    Kind,
    Part,
    canonical,
    digest,
    exactly,
    listed,
    parsed,
    plain,
    refuse,
    text,
)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_ENVELOPE = ("_type", "predicate", "predicateType", "subject")

Subjects = list[tuple[str, str]]
"""Name and digest of what a statement is about."""


def about(kind: Kind | None = None, **options: Any) -> Any:
    """Return a dataclass field that holds subjects: it is no part of the predicate."""
    return field(metadata={"kind": kind or digest(), "subject": True}, **options)


@dataclass(frozen=True)
class Statement(Part):
    """What all statements share; `TYPE` is the predicate type."""

    TYPE: ClassVar[str] = ""

    def subjects(self) -> Subjects:
        """Return names and digests of the subjects, as this statement must have them."""
        raise NotImplementedError

    @classmethod
    def of_subjects(cls, subjects: Subjects) -> dict[str, Any]:
        """Return the fields that subjects stand for; `parse` checks their names."""
        names = [it.name for it in fields(cls) if "subject" in it.metadata]
        return {names[0]: subjects[0][1]} if names else {}

    def payload(self) -> bytes:
        """Return the statement as canonical JSON: the bytes to sign."""
        predicate = {
            it.name: plain(getattr(self, it.name))
            for it in fields(self)
            if "subject" not in it.metadata
        }
        subjects = [{"digest": {"sha256": d}, "name": name} for name, d in self.subjects()]
        values = (STATEMENT_TYPE, predicate, self.TYPE, subjects)
        return canonical(dict(zip(_ENVELOPE, values, strict=True)))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Return the statement of some bytes; only what `payload` gives is accepted.

        Raises
        ------
        EvidenceError
            The bytes are not a statement of this type.
        """
        return cls.read(opened(payload))

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """Return the statement of what `opened` gave.

        Raises
        ------
        EvidenceError
            It is not a statement of this type.
        """
        if found["predicateType"] != cls.TYPE:
            raise refuse("the type of a statement", cls.TYPE)
        subjects = _read_subjects(found["subject"], cls.WHAT)
        names = [it.name for it in fields(cls) if "subject" not in it.metadata]
        predicate = exactly(found["predicate"], names, cls.WHAT)
        made = cls(**predicate, **cls.of_subjects(subjects))
        if made.subjects() != subjects:
            allowed = ", ".join(name for name, _ in made.subjects())
            raise refuse(f"{cls.WHAT}: its subject", allowed)
        return made


def opened(payload: bytes) -> dict[str, Any]:
    """Return the four fields of a statement; the predicate is not looked at.

    Raises
    ------
    EvidenceError
        The bytes are not a statement.
    """
    found = exactly(parsed(payload, "a statement", MAX_STATEMENT), _ENVELOPE, "a statement")
    if found["_type"] != STATEMENT_TYPE:
        raise refuse("a statement: '_type'", STATEMENT_TYPE)
    if canonical(found) != payload:  # so fields are neither repeated nor written otherwise
        raise refuse("a statement: its spelling", "canonical JSON")
    return found


def _read_subjects(value: Any, what: str) -> Subjects:
    def read(item: Any, where: str) -> tuple[str, str]:
        found = exactly(item, ("digest", "name"), where)
        sha256 = exactly(found["digest"], ("sha256",), where)["sha256"]
        return text()(found["name"], where), digest()(sha256, where)

    return list(listed(read, 1)(value, f"{what}: its subject"))


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of this package, of Python, and of some packages."""
    names = ("flwr-clicooper", *packages)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
