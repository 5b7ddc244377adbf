"""The owner's own part of a closed round, on its own disk: it never leaves it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from flwr_clicooper.chain.roles import OWN_FOLDER, run_folder
from flwr_clicooper.chain.stage import Stage
from flwr_clicooper.errors import StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.options import Options

_KEPT = 2
"""Rounds that are kept: the relay may not have closed the newest one."""


class OwnCheckpoints:
    """Head and tail after the last rounds.

    Parameters
    ----------
    folder : Path
        Made with owner-only permissions when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, options: Options, run_id: int | str) -> OwnCheckpoints:
        """Return the owner's checkpoints of a run on this machine."""
        return cls(run_folder(options, run_id) / OWN_FOLDER)

    def delete(self) -> None:
        """Delete them: the run is delivered."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self, round_: int, stages: Sequence[Stage]) -> None:
        """Store the stages after a round."""
        if not stages:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stage in stages:
            write_atomically(self._path(round_, stage), save(stage.escrow()))
            self._path(round_ - _KEPT, stage).unlink(missing_ok=True)

    def restore(self, round_: int, stages: Sequence[Stage]) -> None:
        """Set the stages to what they were after a round.

        Raises
        ------
        StateError
            The round is not here or is damaged.
        """
        for stage in stages:
            path = self._path(round_, stage)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise StateError(
                    f"the owner's checkpoint {path} is missing or damaged; resume on the "
                    "machine and with the run-dir of the first run"
                ) from error
            stage.restore(tensors)

    def _path(self, round_: int, stage: Stage) -> Path:
        return self.folder / f"round-{round_}-{stage.name}.safetensors"
