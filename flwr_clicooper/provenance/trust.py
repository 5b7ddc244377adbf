"""Whose keys are trusted where.

The others' public keys come from a `Trust` file that people agreed on or, failing that,
from the `Pins` of what was seen first.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from flwr_clicooper.errors import StateError, TrustError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.provenance.keys import PublicIdentity, read_file, read_private

ROLES = ("owner", "trainer", "relay", "verifier")
TRAINER = "trainer"
MAX_NAME = 64
"""Characters in the name of a party at most."""


@dataclass(frozen=True)
class Party:
    """One ``[[party]]`` of a trust file.

    Attributes
    ----------
    name : str
        What people call it: 1 to 64 printable characters.
    role : str
        One of `ROLES`.
    key : PublicIdentity
        Its identity.
    stage : int
        The only stage that a trainer may serve, or 0 for any.

    Raises
    ------
    TrustError
        A value is not allowed.
    """

    name: str
    role: str
    key: PublicIdentity
    stage: int = 0

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not name.isprintable() or name.strip() != name:
            raise TrustError("the name of a party is not printable text without outer spaces")
        if not 1 <= len(name) <= MAX_NAME:
            raise TrustError(f"a party's name has {len(name)} characters; 1 to {MAX_NAME}")
        if self.role not in ROLES:
            raise TrustError(f"party {name!r}: a role is one of {', '.join(ROLES)}")
        if type(self.stage) is not int or self.stage < 0:
            raise TrustError(f"party {name!r}: a stage is an integer from 1")
        if self.stage and self.role != TRAINER:
            raise TrustError(f"party {name!r}: only a trainer has a stage")

    @property
    def place(self) -> str:
        """Where it may stand, such as ``owner`` or ``trainer 1``."""
        return place(self.role, self.stage)

    def to_toml(self) -> str:
        """Return its entry in a trust file."""
        fields: dict[str, Any] = {"name": self.name, "role": self.role}
        if self.stage:
            fields["stage"] = self.stage
        return "[[party]]\n" + tomli_w.dumps({**fields, "key": str(self.key)})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Party:
        """Return the party of a trust file's entry.

        Raises
        ------
        TrustError
            A field is missing, unknown, or has a value that is not allowed.
        """
        needed, allowed = {"name", "role", "key"}, {"name", "role", "key", "stage"}
        if not needed <= set(fields) <= allowed:
            wrong = sorted((needed - set(fields)) | (set(fields) - allowed))
            raise TrustError(
                f"a party has fields missing or unknown ({', '.join(map(repr, wrong))}); "
                "allowed are name, role, key, and stage for a trainer"
            )
        if "stage" in fields and fields["stage"] == 0:
            raise TrustError(f"party {fields['name']!r}: a stage is an integer from 1")
        try:
            key = PublicIdentity.parse(str(fields["key"]))
        except TrustError as error:
            raise TrustError(f"party {fields['name']!r}: {error}") from error
        return cls(fields["name"], fields["role"], key, fields.get("stage", 0))


@dataclass(frozen=True)
class Trust:
    """The parties that a trust file lists.

    Attributes
    ----------
    parties : tuple of Party
        In the order of the file; names and keys are unique.
    """

    parties: tuple[Party, ...]

    def __post_init__(self) -> None:
        names, keys = [p.name for p in self.parties], [p.key for p in self.parties]
        for party in self.parties:
            if names.count(party.name) > 1:
                raise TrustError(f"party {party.name!r} is listed more than once")
            if keys.count(party.key) > 1:
                raise TrustError(f"the key of party {party.name!r} is listed more than once")

    @classmethod
    def load(cls, path: Path) -> Trust:
        """Return what a trust file lists.

        Raises
        ------
        TrustError
            The file cannot be read, or something in it is not allowed.
        """
        try:
            return cls.parse(read_file(path)[0].decode())
        except (OSError, UnicodeDecodeError) as error:
            raise TrustError(f"the trust file {path} cannot be read") from error
        except TrustError as error:
            raise TrustError(f"the trust file {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Trust:
        """Return what the text of a trust file lists.

        Raises
        ------
        TrustError
            Something in it is not allowed.
        """
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise TrustError(f"it is not TOML: {error}") from error
        parties = fields.pop("party", [])
        if fields:
            raise TrustError(f"{sorted(fields)[0]!r} is unknown; allowed is [[party]]")
        if not isinstance(parties, list) or not all(isinstance(p, dict) for p in parties):
            raise TrustError("'party' is not a list of tables; allowed is [[party]]")
        return cls(tuple(map(Party.from_fields, parties)))

    @classmethod
    def add(cls, path: Path, party: Party) -> Trust:
        """Append a party to a trust file, which need not exist; the rest stays as it is.

        Raises
        ------
        TrustError
            The file is not a trust file, or would not be one with this party.
        """
        text, mode = "", 0o644
        if path.exists():
            cls.load(path)
            data, mode = read_file(path)
            text = data.decode().rstrip() + "\n\n"
        text += party.to_toml()
        try:
            trust = cls.parse(text)
        except TrustError as error:
            raise TrustError(f"nothing is added to {path}: {error}") from error
        try:
            write_atomically(path, text.encode())
            path.chmod(mode & 0o777)  # it is no secret: whoever could read it still can
        except OSError as error:
            raise TrustError(f"the trust file {path} cannot be written") from error
        return trust

    def expect(self, role: str, stage: int, public: PublicIdentity) -> str:
        """Return the name of the party that a key is of, if it may stand in a place.

        Parameters
        ----------
        role : str
            One of `ROLES`.
        stage : int
            A trainer's stage, or 0 for one that has none (a standby).

        Raises
        ------
        TrustError
            The key is not that of a party that is listed for this place.
        """
        allowed = [p for p in self.parties if p.role == role and p.stage in (0, stage)]
        for party in allowed:
            if party.key == public:
                return party.name
        names = [f"{party.name!r} ({party.key.fingerprint})" for party in allowed]
        raise TrustError(
            f"the key with fingerprint {public.fingerprint} is not trusted as "
            f"{place(role, stage)}; allowed is {' or '.join(names) or 'nobody'}"
        )


class Pins:
    """Trust on first use: the key that was seen first in a place is expected from then on.

    Parameters
    ----------
    folder : Path
        Where ``pins.json`` is kept, for its owner only; used by one process at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "pins.json"

    def check(self, role: str, stage: int, public: PublicIdentity) -> bool:
        """Return whether the key is new in this place, and pin it then.

        A new key has been proved by nobody: the caller should warn.

        Raises
        ------
        TrustError
            Another key is pinned here.
        StateError
            The stored pins are damaged, open to others, or cannot be written.
        """
        here, pins = place(role, stage), self._load()
        if here not in pins:
            self._save({**pins, here: public})
            return True
        if pins[here] != public:
            raise TrustError(
                f"the key with fingerprint {public.fingerprint} is not the one that was seen "
                f"first as {here}; allowed is {pins[here].fingerprint}. If the party changed "
                f"its key, list it in a trust file, or remove {self._path}"
            )
        return False

    def _load(self) -> dict[str, PublicIdentity]:
        if not self._path.exists():
            return {}
        data = read_private(self._path, "pinned keys")
        try:
            pins = json.loads(data)
            return {str(k): PublicIdentity.parse(v) for k, v in pins.items()}
        except (ValueError, AttributeError, RecursionError, TrustError) as error:
            raise StateError(f"the pinned keys {self._path} are damaged") from error

    def _save(self, pins: Mapping[str, PublicIdentity]) -> None:
        data = json.dumps({k: str(v) for k, v in pins.items()}, indent=1).encode()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, data)  # its files are the owner's only
        except OSError as error:
            raise StateError(f"the pinned keys {self._path} cannot be written") from error


def place(role: str, stage: int) -> str:
    """Return a role and a stage in words, such as ``owner`` or ``trainer 1``."""
    return f"{role} {stage}" if stage else role
