"""What a trainer opened of a round, believed only as far as its signed statement goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from flwr_clicooper.chain.records import Indices, StoredRecords
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.grids.tensors import encode, raw_arrays
from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.opening import (
    KEY_FILE,
    STATES,
    find_arrays,
    load_leaves,
    read_opened,
    round_folder,
)
from flwr_clicooper.provenance.streams import Position as Place
from flwr_clicooper.provenance.streams import Streams, arrays_digest
from flwr_clicooper.provenance.watermark import KEY_BYTES, commitment
from flwr_clicooper.split.batches import Position
from flwr_clicooper.split.specs import Tensors, TensorSpec, check_tensors

_HEADER = 2**16
"""Bytes in a file besides its tensors at most, and once more per tensor of a state."""
_LABELS = 2**30
"""Bytes in a file of labels at most: the job does not say what a label is."""

_MISSING = (
    "Nothing shows that these steps were trained. A trainer that cannot open what it signed "
    "has lost it, or never had it."
)
_ALTERED = "What was opened is not what was committed to before anybody knew of the challenge."


class AuditError(EvidenceError):
    """Some steps did not pass; the text says what is off, `meaning` what that means."""

    def __init__(self, text: str, meaning: str) -> None:
        super().__init__(text)
        self.meaning = meaning


class NotOpenedError(AuditError):
    """What must be opened is not there."""


class OpenedRound:
    """The evidence of one segment in one round.

    Parameters
    ----------
    run_dir : Path
        Has ``evidence-<segment>/``.
    statement : RoundStatement
        The trainer's, already verified.

    Raises
    ------
    AuditError
        The leaves are missing, or are not those that were signed.
    """

    def __init__(self, run_dir: Path, statement: RoundStatement) -> None:
        self.run_dir = run_dir
        self.segment, self.round = statement.segment, statement.round
        self.who = f"trainer {self.segment}"
        folder = round_folder(run_dir, self.segment, self.round)
        try:
            self.leaves: Streams = load_leaves(folder)
        except EvidenceError as error:
            raise self._missing(str(error)) from None
        roots = self.leaves.roots()
        for stream in sorted({*roots, *statement.roots}):
            if roots.get(stream) != statement.roots.get(stream):
                raise AuditError(
                    f"the opened leaves of {stream!r} do not give the root that {self.who} "
                    f"signed for round {self.round}",
                    _ALTERED,
                )

    def tensors(self, stream: str, place: Place, limit: int) -> dict[str, Tensor]:
        """Return the arrays of a leaf.

        Parameters
        ----------
        limit : int
            Bytes in its file at most.

        Raises
        ------
        AuditError
            They are missing, or not those of the leaf.
        """
        what = f"{stream} at {_words(stream, place)} of round {self.round}"
        path = find_arrays(self.run_dir, self.segment, self.round, (stream, place))
        try:
            found = load(read_opened(path, limit))
            digest = arrays_digest(raw_arrays(encode(found)))
        except EvidenceError as error:
            raise self._missing(f"{what}: {error}") from None
        except Exception:  # a SafetensorError, or whatever a hostile header leads to
            raise AuditError(
                f"what {self.who} opened as {what} is not a safetensors file", _ALTERED
            ) from None
        if digest != self.leaves.digest(stream, place):
            raise AuditError(f"{what} is not what {self.who} committed to", _ALTERED)
        return found

    def batch(
        self, stream: str, at: Position, specs: Sequence[TensorSpec] | None, rows: int
    ) -> Tensors:
        """Return what came for a micro-batch, by place.

        Parameters
        ----------
        specs : sequence of TensorSpec, or None
            What each record has; None for a label.
        rows : int
            Records in the micro-batch.

        Raises
        ------
        AuditError
            As `tensors`, or it is something else.
        """
        return self._rows(stream, (at.round, at.step, at.microbatch), specs, rows)

    def gradients(
        self, at: Position, specs: Sequence[TensorSpec], rows: int
    ) -> dict[int, Tensor]:
        """Return the gradients that came for a micro-batch, by the output's place.

        Raises
        ------
        AuditError
            As `tensors`.
        """
        limit = _HEADER + rows * sum(spec.nbytes for spec in specs)
        place = (at.round, at.step, at.microbatch)
        return _by_place(self.tensors("gradients-in", place, limit))

    def state(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the segment and its optimizer before a step.

        Parameters
        ----------
        weights : mapping of str to Tensor
            Weights of this segment, whatever they are: an optimizer keeps a few tensors of
            their size.

        Raises
        ------
        AuditError
            As `tensors`.
        """
        size = sum(it.numel() * max(4, it.element_size()) for it in weights.values())
        limit = 16 * size + _HEADER * (1 + len(weights))
        return self.tensors(STATES, (self.round, step, 0), limit)

    def whole(
        self, stream: str, specs: Sequence[TensorSpec] | None, records: int
    ) -> list[StoredRecords]:
        """Return what was uploaded in chunks, each tensor's rows by its place.

        Parameters
        ----------
        specs : sequence of TensorSpec, or None
            As in `batch`.
        records : int
            Records of the run.

        Raises
        ------
        AuditError
            As `tensors`, or the chunks do not hold these records.
        """
        places = self.leaves.positions(stream)
        chunks = [self._rows(stream, place, specs, records, whole=False) for place in places]
        sizes = [len(chunk[0]) for chunk in chunks]
        if sum(sizes) != records or len({*sizes[:-1]}) > 1 or sizes[-1] > sizes[0]:
            raise AuditError(
                f"{stream} has {sum(sizes):,} records; the job has {records:,}", _ALTERED
            )
        columns = zip(*chunks, strict=True)
        return [
            StoredRecords([{"0": part} for part in column], sizes[0]) for column in columns
        ]

    def key(self, committed: str) -> str:
        """Return the key of the round's watermark in hex; empty where none was committed to.

        Parameters
        ----------
        committed : str
            SHA-256 of the key, from the segment's statement before this round's.

        Raises
        ------
        AuditError
            It is missing, or not the one that was committed to.
        """
        if not committed:
            return ""
        path = round_folder(self.run_dir, self.segment, self.round) / KEY_FILE
        try:
            key = bytes.fromhex(read_opened(path, 2 * KEY_BYTES).decode())
        except EvidenceError as error:
            raise self._missing(str(error)) from None
        except ValueError:
            key = b""
        if commitment(key) != committed:
            raise AuditError(
                f"the key that {self.who} opened for its watermark of round {self.round} is "
                "not the one that it committed to before the round",
                _ALTERED,
            )
        return key.hex()

    def _rows(
        self,
        stream: str,
        place: Place,
        specs: Sequence[TensorSpec] | None,
        rows: int,
        *,
        whole: bool = True,
    ) -> Tensors:
        """Return tensors of so many rows; of at most so many, if that is not the whole."""
        limit = _LABELS if specs is None else rows * sum(spec.nbytes for spec in specs)
        found = _by_place(self.tensors(stream, place, _HEADER + limit))
        tensors = tuple(found[i] for i in sorted(found))
        what = f"{stream} at {_words(stream, place)}"
        if not tensors or any(not it.dim() or len(it) != len(tensors[0]) for it in tensors):
            raise AuditError(f"{what}: there are no rows", _ALTERED)
        given = [TensorSpec.of(it) for it in tensors] if specs is None else specs
        check_tensors(tensors, given, rows if whole else len(tensors[0]), what)
        return tensors

    def _missing(self, reason: str) -> NotOpenedError:
        return NotOpenedError(
            f"{self.who} did not open round {self.round}: {reason}", _MISSING
        )


def rows_of(columns: Sequence[StoredRecords], rows: Indices) -> Tensors:
    """Return some records of what `OpenedRound.whole` gave."""
    return tuple(column.rows("0", rows) for column in columns)


def _by_place(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {int(name): tensor for name, tensor in tensors.items()}


def _words(stream: str, place: Place) -> str:
    if place[0] == 0:
        return f"chunk {place[1]}"
    return f"step {place[1]}" + ("" if stream == STATES else f", micro-batch {place[2]}")
