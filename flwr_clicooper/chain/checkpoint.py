"""Closed rounds on the relay's disk: what resuming and standbys start from.

After each round every trainer escrows its segment and optimizer. The relay stores the
bytes as they came, without decoding them. The owner keeps its own part on its own disk.
A round is closed when all parts are there; only then the older one is deleted.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from flwr_clicooper.chain.messages import ESCROW
from flwr_clicooper.errors import OptionError, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.options import TASK_PREFIX

FOLDER = "checkpoints"
CLOSED = "closed.json"


class Checkpoint:
    """The last closed round of a run.

    Parameters
    ----------
    run_folder : Path
        The run's folder on the relay.

    Attributes
    ----------
    round : int
        The last closed round, 0 for none.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_id = run_folder.name
        self._folder = run_folder / FOLDER
        self.round = 0
        path = self._folder / CLOSED
        if path.exists():
            try:
                self.round = int(json.loads(path.read_text())["round"])
            except (ValueError, KeyError, TypeError) as error:
                raise StateError(f"{path} is damaged: it does not name a round") from error

    @classmethod
    def of_run(cls, folder: str, options: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint of an earlier run that a new one resumes.

        Raises
        ------
        OptionError
            The folder is not a run's, the run closed no round, or it had other options.
        """
        path = Path(folder).expanduser().absolute()
        try:
            record = tomllib.loads((path / "run.toml").read_text())
        except (OSError, ValueError) as error:
            raise OptionError(
                f"option 'resume' is {folder!r}, which is not a run's folder: it has no "
                "readable run.toml"
            ) from error
        own = {key for key in record["options"] if key.startswith(TASK_PREFIX)}
        for key in sorted(own - set(options)):
            raise OptionError(f"option {key!r} is missing, but the run to resume had it")
        for key, value in options.items():
            if record["options"].get(key) != value:
                raise OptionError(
                    f"option {key!r} is {value!r}, but the run to resume had "
                    f"{record['options'].get(key)!r}; only link, timeout and paths may change"
                )
        found = cls(path)
        if not found.round:
            raise OptionError(
                f"option 'resume' is {folder!r}: that run closed no round; start a new one"
            )
        return found

    def close(self, round_: int, parts: Mapping[int, ArrayRecord]) -> None:
        """Store what the trainers escrowed after a round, by segment."""
        new = self._folder / f"round-{round_}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True, mode=0o700)
        for segment, record in parts.items():
            # What came over a live link is a view of its frame; protobuf takes only bytes.
            whole = {
                name: Array(a.dtype, tuple(a.shape), a.stype, bytes(a.data))
                for name, a in record.items()
            }
            records = RecordDict({ESCROW: ArrayRecord(whole)})
            data = recorddict_to_proto(records).SerializeToString()
            write_atomically(new / f"segment-{segment}.pb", data)
        write_atomically(self._folder / CLOSED, json.dumps({"round": round_}).encode())
        self.round = round_
        for old in self._folder.glob("round-*"):
            if old != new:
                shutil.rmtree(old, ignore_errors=True)

    def part(self, segment: int) -> ArrayRecord:
        """Return what a segment's trainer escrowed.

        Raises
        ------
        StateError
            It is missing or damaged.
        """
        path = self._folder / f"round-{self.round}" / f"segment-{segment}.pb"
        try:
            records = recorddict_from_proto(ProtoRecordDict.FromString(path.read_bytes()))
            return records.array_records[ESCROW]
        except Exception as error:  # protobuf and Flower raise many kinds
            raise StateError(f"the checkpoint {path} is missing or damaged") from error

    def delete(self) -> None:
        """Delete the checkpoint: the run is delivered."""
        shutil.rmtree(self._folder, ignore_errors=True)
