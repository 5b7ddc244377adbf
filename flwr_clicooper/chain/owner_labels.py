"""The labels as they leave the owner, and the way back from what the model answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flwr_clicooper.chain.records import Indices, check_labels
from flwr_clicooper.chain.release_store import ReleaseStore
from flwr_clicooper.chain.roles import run_folder
from flwr_clicooper.errors import OptionError
from flwr_clicooper.options import Options, node_path
from flwr_clicooper.privacy.labels import (
    SecretLabelMap,
    flip,
    load_key,
    new_key,
    save_key,
)
from flwr_clicooper.split.specs import TensorSpec

KEY_FILE = "label.key"


class OwnerLabels:
    """Checks true labels, and gives those that may leave: flipped, then mapped.

    Parameters
    ----------
    options : Options
        The run's options.
    classifies : bool
        Whether labels are class indices.
    scores : TensorSpec
        What the model gives per record.
    key : callable
        Gives the key of the label map; not called without one.

    Raises
    ------
    OptionError
        The task or the model's outputs do not allow what the options ask for.
    """

    def __init__(
        self, options: Options, classifies: bool, scores: TensorSpec, key: Callable[[], bytes]
    ) -> None:
        self.epsilon = options.label_epsilon
        self.map: SecretLabelMap | None = None
        self._told: Tensor | None = None
        self._classifies = classifies
        self._scores = scores
        expansion = options.label_expansion
        if not (expansion or self.epsilon):
            return
        if not classifies or len(scores.shape) != 1:
            raise OptionError(
                "options 'label-expansion' and 'label-epsilon' are for one class index per "
                f"record and the default loss; this task gives {scores}"
            )
        (outputs,) = scores.shape
        if expansion and (outputs % expansion or outputs < 2 * expansion):
            raise OptionError(
                f"the model has {outputs} outputs; label-expansion = {expansion} needs "
                f"{expansion} for each class (in segments(): classes * label-expansion)"
            )
        if expansion:
            self._scores = TensorSpec(scores.dtype, (outputs // expansion,))
            self.map = SecretLabelMap(outputs // expansion, expansion, key())

    @property
    def classes(self) -> int:
        """Number of true classes."""
        return self._scores.shape[0]

    def checked(self, labels: Tensor, name: str) -> Tensor:
        """Return true labels as the loss takes them.

        Raises
        ------
        DataError
            A label is not allowed.
        """
        if not self._classifies:
            return labels
        labels = check_labels(labels, self._scores, name)
        if (self.map or self.epsilon) and labels.is_floating_point():
            raise OptionError(
                "options 'label-expansion' and 'label-epsilon' are for class indices; the "
                f"{name} set's labels are probabilities"
            )
        return labels

    def flip_all(self, store: ReleaseStore, true_labels: Callable[[], Tensor]) -> None:
        """Flip all labels once, or read how they were flipped.

        Raises
        ------
        PrivacyBudgetExceeded
            They were flipped before, and how is not known any more.
        """
        if self.epsilon:
            stored = store.get(
                "labels",
                0,
                1,
                lambda: {"labels": flip(true_labels(), self.classes, self.epsilon)},
            )
            self._told = stored["labels"]

    def told(self, labels: Tensor, rows: Indices) -> Tensor:
        """Return what the owner says are the labels of some records."""
        return labels if self._told is None else self._told[torch.from_numpy(rows)]

    def leaving(self, labels: Tensor, rows: Indices) -> Tensor:
        """Return the labels of some records as they may leave the owner."""
        return self.encoded(self.told(labels, rows), rows)

    def encoded(self, labels: Tensor, rows: Indices) -> Tensor:
        """Return pseudo-classes, where the run has them."""
        return self.map.encode(labels, rows) if self.map else labels


def label_key(
    options: Options, run_id: int | str, node_config: Mapping[str, object], resumed: str = ""
) -> bytes:
    """Return the owner's label key: the node config's, the resumed run's, or a new one.

    Raises
    ------
    OptionError, StateError
        The node config's ``label-key`` is not a path, or the file is not a key.
    """
    given = node_path(node_config, "label-key")
    if given is not None:
        return load_key(given)
    path = run_folder(options, run_id) / KEY_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        old = run_folder(options, resumed) / KEY_FILE
        save_key(path, load_key(old) if resumed else new_key())
    return load_key(path)
