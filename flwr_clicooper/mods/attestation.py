"""Signed statements of what a ClientApp got and gave, as a Flower mod."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import SType

from flwr_clicooper.errors import MessageError, OptionError
from flwr_clicooper.provenance.fields import now
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.replies import ReplyFile, ReplyStatement
from flwr_clicooper.provenance.statement import versions
from flwr_clicooper.provenance.streams import Data, arrays_digest

RECORD = "attestation"
"""Name of the ``ConfigRecord`` of a reply that has the statement, as its ``envelope``."""

_ACTION = re.compile(r"(train|evaluate|query)(\.[A-Za-z_][A-Za-z0-9_]*)?")


class AttestationMod:
    """Signs, for every reply, what arrays came and what arrays went.

    The statement goes along with the reply, in a ``ConfigRecord`` named ``attestation``,
    and is kept in a file. Each has the digest of the one before, so none can be taken out
    or put in later. ``flwr_clicooper.provenance.replies.verify_replies`` checks the file.

    Error replies and messages of other types pass as they are.

    Parameters
    ----------
    identity : str or Path
        The key to sign with, as ``clicooper keygen`` writes it.
    record : str or sequence of str
        Names of the ``ArrayRecord``s to measure. A reply must have them all; a request,
        any of them.
    file : str or Path
        Where the statements are kept. Nodes and processes of one identity may share it.
    actions : sequence of str
        Message types, such as ``query.features``; ``train`` stands for all its actions.

    Raises
    ------
    OptionError
        ``record`` or ``actions`` are not such names.

    Notes
    -----
    It measures what it sees: put it first in the list of mods, and that is what came over
    the network and what leaves. A statement proves who gave which arrays in answer to
    which, in this order; not that they are the result of honest training. Records that
    are not named, metrics among them, are not covered.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[AttestationMod(identity="key.pem", record="arrays")])
    """

    def __init__(
        self,
        *,
        identity: str | Path,
        record: str | Sequence[str] = "arrays",
        file: str | Path = "attestations.jsonl",
        actions: Sequence[str] = ("train",),
    ) -> None:
        self.records = (record,) if isinstance(record, str) else tuple(record)
        self.actions = (actions,) if isinstance(actions, str) else tuple(actions)
        if not self.records or not all(isinstance(n, str) and n for n in self.records):
            raise OptionError("'record' must be one or more names of records")
        if not self.actions or not all(map(_is_action, self.actions)):
            raise OptionError(
                "'actions' must be message types: 'train', 'evaluate' or 'query', or one of "
                "their actions such as 'query.features'"
            )
        self._identity = Path(identity).expanduser()
        self._file = Path(file).expanduser()

    def __call__(
        self, message: Message, context: Context, call_next: ClientAppCallable
    ) -> Message:
        """Return the handler's reply with a statement about it.

        Raises
        ------
        MessageError
            A named record is missing in the reply, is not an ``ArrayRecord``, or holds
            an array that cannot be read; or the reply has an ``attestation`` already.
        EvidenceError
            The file's last line is damaged or is not of this identity.
        StateError
            The key cannot be read, or the file not be opened or written.
        """
        kind = message.metadata.message_type
        if not any(kind == it or kind.startswith(f"{it}.") for it in self.actions):
            return call_next(message, context)
        self._replies.check()  # rather than after an hour of training
        inputs = self._measured(message, "the request")
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        outputs = self._measured(reply, "the reply")
        if missing := sorted({*self.records} - {*outputs}):
            raise MessageError(f"{kind}: the reply has no {missing[0]!r} to attest")
        if RECORD in reply.content:
            raise MessageError(f"{kind}: the reply has a record {RECORD!r} already")
        envelope = self._replies.append(
            lambda previous: ReplyStatement(
                outputs=outputs,
                inputs=inputs,
                message=kind,
                node=str(context.node_id),
                previous=previous,
                run=str(context.run_id),
                time=now(),
                versions=self._versions,
            )
        )
        said = ConfigRecord({"envelope": envelope.to_json()})
        reply.content = RecordDict({**reply.content, RECORD: said})
        return reply

    @cached_property
    def _replies(self) -> ReplyFile:
        return ReplyFile(self._file, Identity.load(self._identity))

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions("flwr")

    def _measured(self, message: Message, what: str) -> dict[str, str]:
        """Return the digests of the named records that a message has."""
        found = {}
        for name in self.records:
            if name in message.content:
                where = f"{message.metadata.message_type}: {name!r} in {what}"
                found[name] = _digest(message.content[name], where)
        return found


def _is_action(text: object) -> bool:
    return isinstance(text, str) and bool(_ACTION.fullmatch(text))


def _digest(record: object, where: str) -> str:
    if not isinstance(record, ArrayRecord):
        raise MessageError(f"{where} is a {type(record).__name__}, not an ArrayRecord")
    return arrays_digest(
        (name, *_opened(array, f"{where}: {name!r}")) for name, array in record.items()
    ).hex()


def _opened(array: Array, where: str) -> tuple[str, Sequence[int], Data]:
    """Return dtype, shape and bytes, row-major and little-endian, without header.

    What is not NumPy's has the dtype, shape and bytes that it says it has.
    """
    if array.stype != SType.NUMPY:
        return array.dtype, array.shape, array.data
    try:
        shape, fortran, dtype, data = _npy(array.data)
    except Exception as error:  # NumPy reads the header as Python, in many ways to stumble
        raise MessageError(f"{where} is not an array that NumPy wrote") from error
    little = dtype.newbyteorder("<")
    if fortran or dtype != little:
        values = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        data = memoryview(values.astype(little).tobytes("C"))
    return str(dtype.newbyteorder("=")), shape, data


def _npy(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], memoryview]:
    """Return what a file of NumPy's says, and its data, which are not copied."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError("unknown version")
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("objects, or a negative size")
    size = math.prod(shape) * dtype.itemsize
    values = memoryview(data)[file.tell() :][:size]
    if len(values) < size:
        raise ValueError("too few bytes")
    return shape, fortran, dtype, values
