"""Records: the owner's data set, and what a trainer stored of an upload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from flwr_clicooper.errors import DataError, StateError
from flwr_clicooper.split.specs import Tensors, TensorSpec

Indices = NDArray[np.int64]


def all_rows(records: int, size: int) -> list[Indices]:
    """Return the indices of all records, some at a time."""
    return [np.arange(i, min(i + size, records)) for i in range(0, records, size)]


class LabelledSet:
    """A data set of (input, label) items, read by lists of indices.

    Parameters
    ----------
    dataset : Dataset
        Has a length; items are ``(input, label)`` with a tensor or a tuple of tensors
        as input. A ``TensorDataset`` is indexed at once.
    name : str
        For errors: "training" or "held-out".

    Raises
    ------
    DataError
        The set is empty or has no length.
    """

    def __init__(self, dataset: Dataset[Any], name: str) -> None:
        self.dataset = dataset
        self.name = name
        try:
            self.records = len(dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError(
                f"the {name} set has no length; give a map-style data set"
            ) from error
        if self.records == 0:
            raise DataError(
                f"the {name} set is empty; datasets() must give at least one record"
            )

    def fetch(self, indices: Indices) -> tuple[Tensors, Tensor]:
        """Return inputs and labels of some records.

        Raises
        ------
        DataError
            An item is not an (input, label) pair of tensors.
        """
        if isinstance(self.dataset, TensorDataset):
            rows = torch.from_numpy(indices)
            items: Any = [tensor[rows] for tensor in self.dataset.tensors]
            *inputs, labels = items
        else:
            items = default_collate([self.dataset[int(i)] for i in indices])
            if not isinstance(items, (list, tuple)) or len(items) != 2:
                raise DataError(f"an item of the {self.name} set is not (input, label)")
            first, labels = items
            inputs = list(first) if isinstance(first, (list, tuple)) else [first]
        if not inputs or not all(isinstance(x, Tensor) for x in [*inputs, labels]):
            raise DataError(
                f"an item of the {self.name} set is not (input, label) with tensors or "
                "numbers only"
            )
        return tuple(inputs), labels


def check_labels(labels: Tensor, scores: TensorSpec, name: str) -> Tensor:
    """Return class labels as int64, or class probabilities as they are.

    Parameters
    ----------
    labels : Tensor
        Class indices, shape ``[n, ...]``, or probabilities, shape ``[n, classes, ...]``.
    scores : TensorSpec
        What the model gives per record: ``[classes, ...]``.

    Raises
    ------
    DataError
        A label is not a class index below ``classes``. The label is not named.
    """
    if not scores.dtype.is_floating_point or not scores.shape:
        raise DataError(
            f"the model gives {scores}; the default loss needs one score per class, such as "
            "float32[10]. Change the last segment, or define loss() in the task"
        )
    classes, *rest = scores.shape
    if labels.is_floating_point() and tuple(labels.shape[1:]) == scores.shape:
        return labels
    if list(labels.shape[1:]) != rest or labels.is_floating_point() or labels.is_complex():
        dtype = str(labels.dtype).removeprefix("torch.")
        raise DataError(
            f"the {name} set's labels are {dtype}{list(labels.shape)}; allowed is one "
            f"integer class index per record"
        )
    if labels.numel() and bool((labels.amin() < 0) | (labels.amax() >= classes)):
        raise DataError(
            f"a label of the {name} set is out of range: the model has {classes} outputs, "
            f"so allowed are 0 to {classes - 1}"
        )
    return labels.long()


class StoredRecords:
    """Rows of uploaded chunks, gathered from files that are mapped, not loaded.

    Parameters
    ----------
    chunks : sequence of dict of str to Tensor
        In order; every chunk but the last has ``rows_per_chunk`` rows.
    rows_per_chunk : int
        Rows per chunk.
    """

    def __init__(self, chunks: Sequence[dict[str, Tensor]], rows_per_chunk: int) -> None:
        self.chunks = chunks
        self.rows_per_chunk = rows_per_chunk
        self.records = sum(len(next(iter(chunk.values()))) for chunk in chunks)

    def rows(self, name: str, indices: Indices) -> Tensor:
        """Return the rows of one tensor, in the order of the indices.

        Raises
        ------
        StateError
            An index is beyond what was uploaded.
        """
        if not len(indices) or indices.max() >= self.records:
            raise StateError(
                f"{self.records} records were uploaded; the batch asks for more: the upload "
                "is not complete"
            )
        first = self.chunks[0][name]
        out = torch.empty((len(indices), *first.shape[1:]), dtype=first.dtype)
        owner = indices // self.rows_per_chunk
        for chunk in np.unique(owner):
            here = np.flatnonzero(owner == chunk)
            rows = torch.from_numpy(indices[here] - chunk * self.rows_per_chunk)
            out[torch.from_numpy(here)] = self.chunks[chunk][name][rows]
        return out
