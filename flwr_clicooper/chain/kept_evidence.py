"""What a trainer keeps, with `audit-every`, to open its commitments later."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord
from safetensors.torch import save

from flwr_clicooper.files import write_atomically
from flwr_clicooper.grids.tensors import decode
from flwr_clicooper.provenance.opening import (
    KEY_FILE,
    LEAVES_FILE,
    OPENED,
    array_file,
    make_private,
    round_folder,
)
from flwr_clicooper.provenance.streams import Position, Streams


class KeptEvidence:
    """The evidence of one trainer in one run, on its own disk.

    It has no state but its files, so any process of the trainer may go on with it.

    Parameters
    ----------
    run_dir : Path
        The run's folder on the trainer's machine.
    segment : int
        The trainer's.
    """

    def __init__(self, run_dir: Path, segment: int) -> None:
        self.run_dir = run_dir
        self.segment = segment

    def keep(self, stream: str, at: Position, record: ArrayRecord) -> None:
        """Store the arrays of a leaf, if an audit cannot compute them.

        Parameters
        ----------
        stream : str
            The leaf's stream.
        at : (int, int, int)
            Its round (0 for what came once), step or chunk, and micro-batch.
        record : ArrayRecord
            The arrays as they came.
        """
        if stream in OPENED:
            data = save(decode(record, stream))
            # Not durable: a lost file costs an audit, waiting for the disk costs each step.
            self._write(at[0], array_file(stream, at), data, durable=False)

    def close(self, round_: int, leaves: Streams, key: str) -> None:
        """Store the leaves of a round, and the key of its watermark in hex, if it has one."""
        self._write(round_, LEAVES_FILE, leaves.to_bytes(), durable=True)
        self._write(round_, KEY_FILE, key.encode(), durable=True)

    def _write(self, round_: int, name: str, data: bytes, *, durable: bool) -> None:
        folder = round_folder(self.run_dir, self.segment, round_)
        make_private(folder)
        write_atomically(folder / name, data, durable=durable)
