"""Where a client's state lives between messages.

Flower may run each message of a node in another process: a stock SuperNode starts one
per message, a simulation serves a node by any of its actors. So live objects sit in a
cache of the process, over files, and both carry the version that the relay's message
names. A process that has the version goes on; one that has not reads the files; and
where the files have another version, the message is refused.

A state is a set of named parts, each a safetensors file, and a manifest that is
replaced last. A process killed at any point leaves the state before or after the
message, never a mixture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flwr_clicooper.errors import StateError
from flwr_clicooper.files import write_atomically

MANIFEST = "state.json"
Worker = TypeVar("Worker")


@dataclass
class Manifest:
    """What the files of a state hold.

    Attributes
    ----------
    version : int
        Number of messages that changed the state.
    facts : dict
        JSON values: sizes, specs, positions.
    parts : dict of str to str
        File name by part name.
    """

    version: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)


class StateStore:
    """The files of one node's state in one run.

    Parameters
    ----------
    folder : Path
        Made with owner-only permissions when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest()

    def create(self) -> None:
        """Make the folder of a new state.

        Raises
        ------
        StateError
            There is a state already.
        """
        if (self.folder / MANIFEST).exists():
            raise StateError(f"{self.folder} has the state of this run already")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def open(self, version: int) -> None:
        """Read the manifest and insist on a version.

        Raises
        ------
        StateError
            There is no state, it is damaged, or it has another version.
        """
        path = self.folder / MANIFEST
        try:
            self.manifest = Manifest(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise StateError(
                f"no state in {self.folder}: this node was not set up for the run, or its "
                "state-dir is not the same in every process"
            ) from error
        except (ValueError, TypeError) as error:
            raise StateError(f"{path} is damaged: it is not a state manifest") from error
        if self.manifest.version != version:
            raise StateError(
                f"the state in {self.folder} has version {self.manifest.version}, the "
                f"message is for version {version}: the message is late or doubled, or a "
                "process died before it wrote its state"
            )

    def read(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a part, mapped from its file, not read into memory.

        Raises
        ------
        StateError
            The part does not exist or its file is damaged.
        """
        name = self.manifest.parts.get(part)
        if name is None:
            raise StateError(f"the state in {self.folder} has no part {part!r}")
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{self.folder / name} is missing or damaged") from error

    def commit(
        self,
        version: int,
        changes: Mapping[str, Mapping[str, Tensor] | None],
        facts: Mapping[str, Any] | None = None,
        *,
        durable: bool,
    ) -> None:
        """Write changed parts, then the manifest, then remove what it no longer names.

        Parameters
        ----------
        version : int
            The version of the state with the changes.
        changes : mapping of str to (tensors or None)
            Tensors by part; None removes the part.
        facts : mapping, optional
            Replaces the facts.
        durable : bool
            Whether to wait until the disk has it, so that it survives a power cut.
            Another process sees it in any case.

        Raises
        ------
        StateError
            The state was deleted meanwhile.
        """
        if not self.folder.is_dir():
            raise StateError(f"the state in {self.folder} was deleted: the run has ended")
        parts = dict(self.manifest.parts)
        for part, tensors in changes.items():
            parts.pop(part, None)
            if tensors is not None:
                parts[part] = f"{part}-{version}.safetensors"
                data = save({k: v.contiguous() for k, v in tensors.items()})
                write_atomically(self.folder / parts[part], data, durable=durable)
        old = set(self.manifest.parts.values())
        new_facts = dict(self.manifest.facts if facts is None else facts)
        self.manifest = Manifest(version, new_facts, parts)
        text = json.dumps(vars(self.manifest))
        write_atomically(self.folder / MANIFEST, text.encode(), durable=durable)
        for name in old - set(parts.values()):
            (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all files of the state."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other nodes' states may be beside it
            self.folder.parent.rmdir()


class WorkerCache(Generic[Worker]):
    """The live workers of this process, by run and node."""

    def __init__(self) -> None:
        self._workers: dict[tuple[int, int], tuple[int, Worker]] = {}
        self._ended: set[tuple[int, int]] = set()

    def take(self, key: tuple[int, int], version: int, load: Callable[[], Worker]) -> Worker:
        """Take a worker out of the cache at a version, or load it from its files.

        The worker is gone from the cache until `put`: if handling a message fails half
        way, the next message starts from the files.
        """
        cached = self._workers.pop(key, None)
        if cached is not None and cached[0] == version:
            return cached[1]
        if cached is not None and cached[0] > version:
            self._workers[key] = cached
            raise StateError(
                f"the message is for version {version} of this node's state, which is at "
                f"version {cached[0]}: the message is late or doubled"
            )
        return load()

    def put(self, key: tuple[int, int], version: int, worker: Worker) -> None:
        """Keep a worker at a version, unless its run has ended meanwhile."""
        if key not in self._ended:
            self._workers[key] = (version, worker)

    def drop(self, key: tuple[int, int]) -> None:
        """Forget a worker for good: its run has ended."""
        self._ended.add(key)
        self._workers.pop(key, None)

    def revive(self, key: tuple[int, int]) -> None:
        """Let a run that ended on this node begin again, after a hand-over."""
        self._ended.discard(key)

    def clear(self) -> None:
        """Forget all workers, as a new process has."""
        self._workers.clear()
