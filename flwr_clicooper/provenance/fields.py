"""Fields that are checked: what signed statements are made of, and their one spelling.

A *kind* takes a value as JSON has it and where it stands, and returns it checked, or
raises `EvidenceError` with where and what is allowed, never with the value.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Self

from flwr_clicooper.errors import EvidenceError, TrustError
from flwr_clicooper.provenance.keys import PublicIdentity

MAX_STATEMENT = 2**22
"""Bytes in a statement at most."""
MAX_TEXT = 1024
"""Characters in a text at most."""
MAX_INTEGER = 2**63 - 1

_MAX_DEPTH = 16
_DIGEST = re.compile("[0-9a-f]{64}")
_MOMENT = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_TIME = "%Y-%m-%dT%H:%M:%SZ"

Kind = Callable[[Any, str], Any]


def refuse(where: str, allowed: str) -> EvidenceError:
    """Return the error for a value that is not allowed."""
    return EvidenceError(f"{where} is not what it must be; allowed is {allowed}")


# -- JSON ----------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of a value, as `docs/attestation.md` defines it.

    Raises
    ------
    EvidenceError
        The value cannot be written as JSON.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError):  # ValueError: NaN, or half a character
        raise refuse("a value", "what JSON can hold, without NaN or infinity") from None


def canonical_digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def parsed(data: bytes | str, what: str, limit: int) -> Any:
    """Return what a JSON text of at most ``limit`` bytes or characters holds.

    Raises
    ------
    EvidenceError
        It is too large or not JSON.
    """
    if len(data) > limit:
        raise EvidenceError(f"{what} is too large; allowed are {limit:,} bytes")
    try:
        return json.loads(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError):  # ValueError: bytes that are not UTF-8, too
        raise EvidenceError(f"{what} is not JSON") from None


def exactly(value: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """Return an object that has these fields and no other.

    Raises
    ------
    EvidenceError
        It is no object, or a field is missing or unknown.
    """
    if not isinstance(value, dict):
        raise refuse(what, "a JSON object")
    if wrong := sorted({*names} ^ {*value}):
        known = "missing" if wrong[0] in names else "unknown"
        raise EvidenceError(
            f"{what}: field {wrong[0][:64]!r} is {known}; allowed are {', '.join(names)}"
        )
    return value


# -- kinds ---------------------------------------------------------------------------------


def integer(low: int = 0, high: int = MAX_INTEGER) -> Kind:
    """Return the kind of an integer in a range, both ends included."""

    def read(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(where, f"an integer from {low}")
        return value

    return read


def number(low: float = -math.inf) -> Kind:
    """Return the kind of a finite number."""

    def read(value: Any, where: str) -> float:
        fits = (
            abs(value) <= MAX_INTEGER
            if type(value) is int
            else isinstance(value, float) and math.isfinite(value)
        )
        if not fits or value < low:
            raise refuse(where, "a finite number" + ("" if low < 0 else f" from {low:g}"))
        return value if type(value) is int else float(value)

    return read


def text(*, empty: bool = False) -> Kind:
    """Return the kind of printable text."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
            raise refuse(where, f"printable text of at most {MAX_TEXT} characters")
        if not value and not empty:
            raise refuse(where, "text that is not empty")
        return str(value)

    return read


def digest(*, empty: bool = False) -> Kind:
    """Return the kind of a SHA-256, or of 32 random bytes, in lower-case hex."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not (
            _DIGEST.fullmatch(value) or (empty and not value)
        ):
            raise refuse(where, "64 lower-case hex digits" + (", or ''" if empty else ""))
        return str(value)

    return read


def choice(*allowed: str) -> Kind:
    """Return the kind of one of some texts."""

    def read(value: Any, where: str) -> str:
        if value not in allowed:
            raise refuse(where, " or ".join(allowed))
        return str(value)

    return read


def moment(value: Any, where: str) -> str:
    """Check a time: RFC 3339, UTC, whole seconds, as `now` writes it."""
    try:
        if isinstance(value, str) and _MOMENT.fullmatch(value):
            datetime.fromisoformat(value)
            return str(value)
    except ValueError:
        pass
    raise refuse(where, "a time in UTC such as 2026-05-01T12:00:00Z")


def public_key(value: Any, where: str) -> PublicIdentity:
    """Check the text of a `PublicIdentity`."""
    try:
        return PublicIdentity.parse(value if isinstance(value, str) else "")
    except TrustError as error:
        raise EvidenceError(f"{where}: {error}") from None


def file_name(value: Any, where: str) -> str:
    """Check the name of a file, which never leads out of its folder."""
    name: str = text()(value, where)
    if name.startswith(".") or "/" in name or "\\" in name:
        raise refuse(where, "the name of a file, without a folder")
    return name


def listed(kind: Kind, low: int = 0) -> Kind:
    """Return the kind of a list of at least ``low`` values of a kind; it becomes a tuple."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) < low:
            raise refuse(where, f"a list of at least {low}" if low else "a list")
        return tuple(kind(item, f"{where}[{i}]") for i, item in enumerate(value))

    return read


def mapped(name: Kind, kind: Kind) -> Kind:
    """Return the kind of an object of any number of fields."""

    def read(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(where, "an object")
        names = [name(key, f"a name in {where}") for key in value]
        return {key: kind(value[key], f"{where}: {key!r}") for key in names}

    return read


def with_names(kind: Kind, *names: str) -> Kind:
    """Return the kind of an object of exactly these fields."""

    def read(value: Any, where: str) -> dict[str, Any]:
        return {n: kind(v, f"{where}: {n!r}") for n, v in exactly(value, names, where).items()}

    return read


def anything(value: Any, where: str) -> dict[str, Any]:
    """Check an object of whatever JSON can hold, not too deep."""
    if not isinstance(value, dict):
        raise refuse(where, "an object")
    _check_depth(value, where, _MAX_DEPTH)
    canonical(value)
    return value


def part(cls: type[Part]) -> Kind:
    """Return the kind of a `Part`."""

    def read(value: Any, where: str) -> Part:
        return cls(**exactly(value, [name for name, _, _ in _kinds(cls)], where))

    return read


def _check_depth(value: Any, where: str, depth: int) -> None:
    if not depth:
        raise refuse(where, f"an object of at most {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise refuse(where, "an object whose names are text")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_depth(item, where, depth - 1)
    elif type(value) is int and abs(value) > MAX_INTEGER:
        raise refuse(where, "an object whose integers have at most 64 bits")


# -- records -------------------------------------------------------------------------------


def of(kind: Kind, **options: Any) -> Any:
    """Return a dataclass field whose values are of a kind."""
    return field(metadata={"kind": kind}, **options)


@dataclass(frozen=True)
class Part:
    """A record whose fields are checked however it is made.

    Raises
    ------
    EvidenceError
        A field's value is not allowed, or the fields do not agree.
    """

    WHAT: ClassVar[str] = "a record"

    def __post_init__(self) -> None:
        for name, kind, where in _kinds(type(self)):
            object.__setattr__(self, name, kind(plain(getattr(self, name)), where))
        self._check()

    def _check(self) -> None:
        """Raise unless the fields agree with each other."""

    def _demand(self, holds: bool, rule: str) -> None:
        if not holds:
            raise EvidenceError(f"{self.WHAT} contradicts itself: {rule}")


class Document(Part):
    """A record that is a file of its own, in one spelling: canonical JSON.

    `LIMIT` is how many bytes it may have.
    """

    LIMIT: ClassVar[int] = MAX_STATEMENT

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return canonical(plain(self))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the record of a file's content; only what `to_bytes` gives is accepted.

        Raises
        ------
        EvidenceError
            The bytes are anything else.
        """
        names = [it.name for it in fields(cls)]
        made = cls(**exactly(parsed(data, cls.WHAT, cls.LIMIT), names, cls.WHAT))
        if made.to_bytes() != data:
            raise refuse(f"{cls.WHAT}: its spelling", "canonical JSON")
        return made


def plain(value: Any) -> Any:
    """Return a value as JSON has it: parts as objects, keys as text."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, PublicIdentity):
        return str(value)
    if isinstance(value, Part):
        return {name: plain(getattr(value, name)) for name, _, _ in _kinds(type(value))}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


_fields: dict[type, list[tuple[str, Kind, str]]] = {}


def _kinds(cls: type[Part]) -> list[tuple[str, Kind, str]]:
    """Return name, kind and place of each field, which are found out once."""
    if cls not in _fields:
        _fields[cls] = [
            (it.name, it.metadata["kind"], f"{cls.WHAT}: {it.name!r}") for it in fields(cls)
        ]
    return _fields[cls]


def now() -> str:
    """Return the time as statements have it."""
    return datetime.now(UTC).strftime(_TIME)
