"""Differential privacy for arrays that a ClientApp sends, as a Flower mod."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import SType

from flwr_clicooper.errors import (
    DataError,
    MessageError,
    OptionError,
    PrivacyBudgetExceeded,
    StateError,
)
from flwr_clicooper.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

_EVERY_REPLY = "every reply"
_STATE = "clicooper.releases."

# Releases made in this process, by run, node and record: messages that a node serves at
# once each start from the same `context.state`.
_made: dict[tuple[int, int, str], Counter[str]] = {}
_lock = threading.Lock()


class ActivationDPMod:
    """Clips and noises the arrays of one record in every reply that has it.

    Row ``i`` of all arrays together is record ``i``. Replies without that record, and
    error replies, pass as they are. The arrays leave in their dtype; integers leave as
    float32.

    Parameters
    ----------
    record : str
        Name of the ``ArrayRecord`` in the reply.
    epsilon, delta : float
        What all releases of one record may cost together.
    clip : float
        ``unit="record"``: the bound of the L2 norm of a record over all arrays.
        ``unit="element"``: the bound of each number's absolute value.
    unit : str
        ``record``, or ``element`` to protect single numbers only (see `statement`).
    releases : int
        In how many replies a record may appear. The one after the last is refused.
    count_by : callable, optional
        Says from the request which group of records is asked for; releases are counted
        for each group on its own. No record may be in two groups, whatever the request:
        the number of a batch fits if batches are fixed parts of the data. It is called
        before the handler, with every request that the mod sees. Without it every reply
        counts.
    ledger : str or Path, optional
        File in which the releases are counted, one per data holder; it is written before a
        reply leaves. It counts over all runs that share it, so the budget is that of the
        data, not of a run. Its folder must exist; who deletes the file starts anew.

    Raises
    ------
    OptionError
        A value is out of its range.

    Notes
    -----
    The guarantee needs rows that are computed each from its record alone, by an encoder
    that does not depend on the private records; `statement` says so in words.

    Releases are always counted in ``context.state`` and in this process, per run and node.
    That is enough in one process and for a ServerApp that waits for each reply. A SuperNode
    keeps ``context.state`` in memory, stores it after the reply has left, and may start a
    process per message: a crash, a restart or requests in flight together can lose a count
    there. In a deployment use a ``ledger``.

    The first mod of a list is the last to see the reply: mods that compress or encrypt it
    stand before this one.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[ActivationDPMod(record="embeddings", epsilon=2.0, releases=5)])
    """

    def __init__(
        self,
        *,
        record: str = "embeddings",
        epsilon: float = 2.0,
        delta: float = 1e-5,
        clip: float = 1.0,
        unit: str = "record",
        releases: int = 1,
        count_by: Callable[[Message], str | int] | None = None,
        ledger: str | Path | None = None,
    ) -> None:
        from flwr_clicooper.privacy.accounting import noise_for

        if unit not in ("record", "element"):
            raise OptionError(f"unit is {unit!r}; allowed are record and element")
        if not isinstance(releases, int):
            raise OptionError(f"releases is {releases}; allowed is an integer of at least 1")
        self.record, self.unit, self.clip = record, unit, clip
        self.epsilon, self.delta, self.releases = epsilon, delta, releases
        self.sigma = noise_for(epsilon, delta, 2 * clip, releases)
        self._count_by = count_by
        self._ledger = Path(ledger).expanduser() if ledger else None
        self._elements = 0

    def __call__(
        self, message: Message, context: Context, call_next: ClientAppCallable
    ) -> Message:
        """Return the handler's reply with the record clipped and noised.

        Raises
        ------
        PrivacyBudgetExceeded
            The records were released as often as allowed; nothing leaves.
        DataError
            An array is not of real numbers, holds NaN or infinity, or has another number
            of records than the others.
        StateError
            The ledger is damaged.
        MessageError
            What has the record's name is not an ``ArrayRecord``.
        """
        group = str(self._count_by(message)) if self._count_by else _EVERY_REPLY
        reply = call_next(message, context)
        if reply.has_error() or self.record not in reply.content:
            return reply
        record = reply.content[self.record]
        if not isinstance(record, ArrayRecord):
            raise MessageError(
                f"{message.metadata.message_type}: {self.record!r} in the reply is a "
                f"{type(record).__name__}; allowed is an ArrayRecord"
            )
        released = self._release(record)
        self._charge(context, group)
        # A new record dict: the handler may keep the one that it returned.
        reply.content = RecordDict({**reply.content, self.record: released})
        return reply

    def _release(self, record: ArrayRecord) -> ArrayRecord:
        from flwr_clicooper.grids.tensors import encode
        from flwr_clicooper.privacy.release import GaussianRelease

        tensors = [_tensor(array, f"{self.record!r}: {k!r}") for k, array in record.items()]
        noised = GaussianRelease(self.unit, self.clip, self.sigma).joint(tensors)
        elements = sum(tensor[:1].numel() for tensor in tensors)
        self._elements = max(self._elements, elements)
        return encode(dict(zip(record, noised, strict=True)))

    def _charge(self, context: Context, group: str) -> None:
        """Count a release, before anything leaves."""
        key = (context.run_id, context.node_id, self.record)
        with _lock, _locked(self._ledger) as ledger:
            stored = cast("dict[str, int]", context.state.get(_STATE + self.record, {}))
            # The largest of all counts.
            made = Counter(dict(stored)) | _made.get(key, Counter())
            made |= Counter(ledger.get(self.record, {}))
            if made[group] >= self.releases:
                counted = f"group {group!r}" if self._count_by else "every reply counts"
                raise PrivacyBudgetExceeded(
                    f"record {self.record!r} was released {made[group]} times ({counted}); "
                    f"allowed for epsilon {self.epsilon:g} are {self.releases}"
                )
            made[group] += 1
            _made[key] = made
            ledger[self.record] = {**made}
            context.state[_STATE + self.record] = ConfigRecord({**made})

    def statement(self, elements: int = 0) -> str:
        """Return in plain words what the noise guarantees and what it does not.

        Parameters
        ----------
        elements : int
            Numbers in one record over all arrays, for ``unit="element"``; 0 for the
            largest that this mod has released.
        """
        bound = (
            "the row of a record over all arrays of a reply is scaled to an L2 norm of at most"
            if self.unit == "record"
            else "each number is cut to an absolute value of at most"
        )
        counting = (
            "Releases are counted for each group of records that the app names; no record "
            "may be in two groups."
            if self._count_by
            else "Every reply with these arrays counts as a release of every record."
        )
        scope = "all runs that share its ledger" if self._ledger else "one run"
        return "\n".join(
            [
                f"Arrays {self.record!r} leave clipped and with Gaussian noise: {bound} "
                f"{self.clip:g}, then each number gets noise of standard deviation "
                f"{self.sigma:.4g}.",
                f"Guarantee of a node's replies in {scope}: (epsilon, delta) = "
                f"({self.epsilon:g}, {self.delta:g}) per {self.unit}, for at most "
                f"{self.releases} release(s) of each record together, when one "
                f"{self.unit} is replaced by any other.{self._record_level(elements)}",
                f"{counting} The one after the last is refused. What other runs and other "
                "nodes release about the same person adds to it.",
                "It holds if each row is computed from its record alone, by an encoder that "
                "does not depend on the private records: frozen, public or itself trained "
                "with differential privacy, and without BatchNorm in training mode. An "
                "encoder that learns from gradients on these records carries each of them "
                "into the rows of the others; that is not counted here.",
                "Not covered: labels, metrics, loss values and all other records of the "
                "messages; how many records there are and the shapes of the arrays; whether "
                "a reply fails; gradients that flow back to this node; the last bits of "
                "floating-point numbers.",
            ]
        )

    def _record_level(self, elements: int) -> str:
        if self.unit == "record":
            return ""
        if not (elements := elements or self._elements):
            return " Per record it is weaker, by how much is known after the first release."
        from flwr_clicooper.privacy.accounting import epsilon_of, mu_for

        # All numbers of a record may change, each by the sensitivity of one.
        epsilon = epsilon_of(self.delta, mu_for(self.epsilon, self.delta) * elements**0.5)
        return (
            f" Per record of {elements} numbers that is only ({epsilon:.4g}, {self.delta:g})."
        )


@contextmanager
def _locked(path: Path | None) -> Iterator[dict[str, Any]]:
    """Give the counts of a ledger, by record; write them unless the block raises."""
    if path is None:
        yield {}
        return
    import fcntl

    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        try:
            counts = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise StateError(f"the ledger {path} is damaged; nothing is released") from error
        yield counts
        write_atomically(path, json.dumps(counts).encode())


def _tensor(array: Array, what: str) -> Tensor:
    import torch

    from flwr_clicooper.grids.tensors import decode_tensor

    if array.stype != SType.NUMPY:
        return decode_tensor(array, what)
    values = array.numpy()
    if values.dtype.kind in "iu":
        values = values.astype(np.float32)
    if values.dtype.kind != "f" or values.dtype.itemsize > 8:
        raise DataError(f"{what} is {values.dtype}; allowed are floats and integers")
    native = values.dtype.newbyteorder("=")
    return torch.from_numpy(np.asarray(values, dtype=native, order="C"))
