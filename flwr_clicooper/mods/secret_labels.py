"""Secret class names for labels that a ClientApp sends, as a Flower mod."""

from __future__ import annotations

import hashlib
import hmac
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from flwr_clicooper.errors import DataError, MessageError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from flwr_clicooper.privacy.labels import SecretLabelMap

_HALF = 2**128


class SecretLabelMod:
    """Replaces class labels by secret pseudo-classes in every reply that has them.

    Replies without the labels, and error replies, pass as they are. Pseudo-classes leave
    as int64.

    Parameters
    ----------
    key_file : str or Path
        The secret key, as ``flwr_clicooper.privacy.labels.save_key(path, new_key())``
        writes it. It is read when labels are first sent or decoded, so nodes without
        labels need none.
    record : str
        Name of the ``ArrayRecord`` of labels in the reply, integers ``[n]`` each.
    num_classes, expansion : int
        Classes, and pseudo-classes per class.
    ids : str
        Name of an ``ArrayRecord`` in the same reply that has, for each array of labels, an
        integer array of the same name and length: what names each record, once and for
        all. It is taken out of the reply.
    keep_ids : bool
        Leave the ids in the reply.
    label_epsilon : float
        Above 0 for randomised response: each label is replaced by another one with the
        probability that gives this epsilon; 0 for off.

    Raises
    ------
    OptionError
        ``label_epsilon`` is out of its range.

    Notes
    -----
    Randomised response must not flip a record anew in a later reply: an average over
    replies would show the label. Here what happens to a record follows from its id and
    the key (HMAC-SHA256), so every reply, run and process tells the same and a repetition
    costs nothing. The price: who has the key and the ids can undo it. Another
    ``label_epsilon`` or ``num_classes`` draws anew, and its epsilon adds.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[SecretLabelMod(key_file="label.key", num_classes=10)])
    """

    def __init__(
        self,
        *,
        key_file: str | Path,
        record: str = "labels",
        num_classes: int = 10,
        expansion: int = 2,
        ids: str = "ids",
        keep_ids: bool = False,
        label_epsilon: float = 0.0,
    ) -> None:
        if not 0 <= label_epsilon < math.inf:
            raise OptionError(
                f"label_epsilon is {label_epsilon}; allowed is a number above 0, or 0 for off"
            )
        self.record, self.ids, self.keep_ids = record, ids, keep_ids
        self.num_classes, self.expansion = num_classes, expansion
        self.label_epsilon = float(label_epsilon)
        self._key_file = Path(key_file).expanduser()

    def __call__(
        self, message: Message, context: Context, call_next: ClientAppCallable
    ) -> Message:
        """Return the handler's reply with pseudo-classes in place of the labels.

        Raises
        ------
        MessageError
            The labels or their ids are missing or not ``ArrayRecord``s.
        DataError
            An array is not of integers, a label is not a class, or there is not one id
            per label.
        OptionError
            ``num_classes`` or ``expansion`` is out of its range.
        StateError
            The key file is missing, others may read it, or it does not hold a key.
        """
        reply = call_next(message, context)
        if reply.has_error() or self.record not in reply.content:
            return reply
        labels, ids = (self._record(reply, name) for name in (self.record, self.ids))
        if sorted(labels) != sorted(ids):
            raise MessageError(
                f"{self.record!r} has arrays {sorted(labels)}, {self.ids!r} has "
                f"{sorted(ids)}; allowed is one array of ids per array of labels"
            )
        told = {name: self._encode(labels[name], ids[name], name) for name in labels}
        content = RecordDict({**reply.content, self.record: ArrayRecord(told)})
        if not self.keep_ids:
            del content[self.ids]
        reply.content = content
        return reply

    def decode(self, logits: Tensor) -> Tensor:
        """Return log-probabilities of the classes, from logits of the pseudo-classes.

        Parameters
        ----------
        logits : Tensor
            ``[..., num_classes * expansion]``.

        Returns
        -------
        Tensor
            ``[..., num_classes]``.
        """
        return self._map.decode(logits)

    def statement(self) -> str:
        """Return in plain words what the mapping guarantees and what it does not."""
        lines = [
            f"Labels {self.record!r} leave as {self.num_classes * self.expansion} "
            f"pseudo-classes, {self.expansion} for each of {self.num_classes} classes, by a "
            "secret key.",
            "This hides the names of the classes, also in a stolen model. It does not hide "
            "which records belong together: who sees their activations too can merge "
            "pseudo-classes that look alike.",
        ]
        if self.label_epsilon:
            lines.append(
                f"Randomised response comes first: epsilon = {self.label_epsilon:g} per "
                "label, when the label of one record is replaced by any other. It is drawn "
                "once per record id from the key (HMAC-SHA256), so sending a record again "
                "adds nothing; it holds against everyone who does not have the key."
            )
        else:
            lines.append("There is no differential privacy for labels.")
        lines.append(
            "Not covered: activations, gradients, metrics, loss values and all other records "
            "of the messages" + ("; the record ids." if self.keep_ids else ".")
        )
        return "\n".join(lines)

    @cached_property
    def _key(self) -> bytes:
        from flwr_clicooper.privacy.labels import load_key

        return load_key(self._key_file)

    @cached_property
    def _map(self) -> SecretLabelMap:
        from flwr_clicooper.privacy.labels import SecretLabelMap

        return SecretLabelMap(self.num_classes, self.expansion, self._key)

    def _record(self, reply: Message, name: str) -> ArrayRecord:
        found = reply.content.get(name)
        if not isinstance(found, ArrayRecord):
            kind = "missing" if found is None else f"a {type(found).__name__}"
            raise MessageError(
                f"{reply.metadata.message_type}: {name!r} in the reply is {kind}; labels "
                "and their ids are an ArrayRecord each"
            )
        return found

    def _encode(self, labels: Array, ids: Array, name: str) -> Array:
        import torch

        classes = torch.from_numpy(_integers(labels, f"{self.record!r}: {name!r}"))
        numbers = _integers(ids, f"{self.ids!r}: {name!r}")
        told = self._map.encode(classes, numbers)
        if self.label_epsilon:  # what was encoded is right, so shifted labels are, too
            shifts = torch.tensor(self._shifts(numbers), dtype=torch.int64)
            told = self._map.encode((classes + shifts) % self.num_classes, numbers)
        return Array(told.numpy())

    def _shifts(self, ids: NDArray[np.int64]) -> list[int]:
        """Return how far randomised response moves each label; 0 where it tells the truth."""
        from flwr_clicooper.privacy.labels import keep_probability

        keep = int(keep_probability(self.label_epsilon, self.num_classes) * _HALF)
        use = f"clicooper/mods/flip/v1/{self.num_classes}/{self.label_epsilon!r}"
        shifts = []
        for number in ids.tolist():
            digest = hmac.digest(self._key, f"{use}/{number}".encode(), hashlib.sha256)
            coin, other = (int.from_bytes(half, "big") for half in (digest[:16], digest[16:]))
            shifts.append(0 if coin < keep else 1 + other % (self.num_classes - 1))
        return shifts


def _integers(array: Array, what: str) -> NDArray[np.int64]:
    values = array.numpy()
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise DataError(
            f"{what} is {values.dtype}{list(values.shape)}; allowed are integers [n]"
        )
    return np.asarray(values, dtype=np.int64, order="C")
