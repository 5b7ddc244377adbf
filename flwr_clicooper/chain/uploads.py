"""What was uploaded to a trainer: kept on disk, gathered batch by batch."""

from __future__ import annotations

import torch
from flwr.app import Message
from torch import Tensor

from flwr_clicooper.chain.messages import ACTIVATIONS, LABELS, Header, array_record
from flwr_clicooper.chain.records import Indices, StoredRecords
from flwr_clicooper.chain.stage import Changes
from flwr_clicooper.chain.state import StateStore
from flwr_clicooper.errors import MessageError
from flwr_clicooper.grids.tensors import decode_places
from flwr_clicooper.split.specs import Tensors, TensorSpec, check_tensors


class Uploads:
    """Uploaded activations and labels of one trainer.

    Parameters
    ----------
    store : StateStore
        Where the chunks are.
    records : int
        Records in the training set.
    chunk_records : int
        Records per chunk; the last chunk may have fewer.
    activations, labels : list of TensorSpec
        What each record has.
    who : str
        For errors.
    """

    def __init__(
        self,
        store: StateStore,
        records: int,
        chunk_records: int,
        activations: list[TensorSpec],
        labels: list[TensorSpec],
        who: str,
    ) -> None:
        self.store = store
        self.records = records
        self.chunk_records = chunk_records
        self.specs = {ACTIVATIONS: activations, LABELS: labels}
        self.who = who
        self._mapped: dict[str, StoredRecords] = {}

    def accept(self, header: Header, message: Message) -> Changes:
        """Return the parts to store for one chunk of activations, labels or both.

        Raises
        ------
        MessageError
            The chunk is not one of the run, or its tensors are not what must come.
        """
        chunk = header.get("chunk", int)
        rows = min(self.chunk_records, self.records - chunk * self.chunk_records)
        if chunk < 0 or rows < 1:
            raise MessageError(f"{self.who}: the upload has no chunk {chunk}")
        changes: Changes = {}
        for name in set(message.content.array_records) & set(self.specs):
            what = f"{self.who}: chunk {chunk} of the uploaded {name}"
            tensors = decode_places(array_record(message, name), what)
            check_tensors(tuple(tensors.values()), self.specs[name], rows, what)
            changes[f"{name}-{chunk}"] = {str(k): v for k, v in tensors.items()}
            self._mapped.pop(name, None)
        return changes

    def activations(self, rows: Indices) -> Tensors:
        """Return activations of some records.

        Raises
        ------
        MessageError
            The upload is not complete.
        """
        stored = self._chunks(ACTIVATIONS)
        places = range(len(self.specs[ACTIVATIONS]))
        return tuple(stored.rows(str(place), rows) for place in places)

    def labels(self, rows: Indices) -> Tensor:
        """Return labels of some records.

        Raises
        ------
        MessageError
            The upload is not complete.
        """
        return self._chunks(LABELS).rows("0", rows)

    def chunk_rows(self, chunk: int) -> Indices:
        """Return the record indices of a chunk."""
        start = chunk * self.chunk_records
        stop = min(start + self.chunk_records, self.records)
        return torch.arange(start, stop).numpy()

    def _chunks(self, name: str) -> StoredRecords:
        if name not in self._mapped:
            count = -(-self.records // self.chunk_records)
            parts = [f"{name}-{chunk}" for chunk in range(count)]
            missing = [p for p in parts if p not in self.store.manifest.parts]
            if missing:
                raise MessageError(
                    f"{self.who}: {len(missing)} of {count} chunks of the uploaded {name} "
                    "have not come; training cannot start"
                )
            chunks = [self.store.read(part) for part in parts]
            self._mapped[name] = StoredRecords(chunks, self.chunk_records)
        return self._mapped[name]
