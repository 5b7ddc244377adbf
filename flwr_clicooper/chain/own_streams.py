"""What the owner itself gave and got, measured: on its own disk until the delivery."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from flwr_clicooper.errors import EvidenceError, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.provenance.streams import Streams


class OwnStreams:
    """One file of leaves per round and segment, so a message that is asked again adds nothing.

    Parameters
    ----------
    folder : Path
        Made with owner-only permissions when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take_over(self, earlier: Path) -> None:
        """Begin with what an earlier run had, which this one resumes."""
        if earlier.is_dir() and not self.folder.exists():
            shutil.copytree(earlier, self.folder)

    def of(self, round_: int, segment: int) -> Streams:
        """Return the leaves of a round (0 for what is given once) and a segment.

        Raises
        ------
        StateError
            The file is damaged.
        """
        path = self._path(round_, segment)
        try:
            return Streams.from_bytes(path.read_bytes()) if path.exists() else Streams()
        except EvidenceError as error:
            raise StateError(f"{path} is damaged") from error

    def keep(self, round_: int, segment: int, streams: Streams) -> None:
        """Store the leaves of a round and a segment."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self._path(round_, segment), streams.to_bytes())

    def roots(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield round, segment, stream and root of everything that is stored."""
        for path in sorted(self.folder.glob("*-*.leaves")):
            round_, segment = map(int, path.stem.split("-"))
            for stream, root in self.of(round_, segment).roots().items():
                yield round_, segment, stream, root

    def _path(self, round_: int, segment: int) -> Path:
        return self.folder / f"{round_}-{segment}.leaves"
