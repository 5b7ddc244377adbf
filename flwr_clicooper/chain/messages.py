"""The chain's messages: actions, the header, and errors that travel back.

Tensors travel in ``ArrayRecord``s; everything else in one ``ConfigRecord`` named
``clicooper``, the header. This module does not import PyTorch: the relay passes
tensors on without ever decoding them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from flwr_clicooper.errors import CooperError, MessageError, StateError

HEADER = "clicooper"
PROTOCOL = 1

ACTIVATIONS = "activations"
GRADIENTS = "gradients"
LABELS = "labels"
WEIGHTS = "weights"
ESCROW = "escrow"
WATERMARK_KEY = "watermark-key"
IDENTITY = "identity"
INTRODUCTION = "introduction"
INTRODUCTIONS = "introductions"

T = TypeVar("T", int, float, str, bool)


class Action(str, Enum):
    """Everything that the relay may ask of a client."""

    HELLO = "query.hello"
    LIVE = "train.live"
    SETUP = "train.setup"
    MEET = "train.meet"
    RESEAL = "train.reseal"
    RESTORE = "train.restore"
    AGREE = "train.agree"
    RELEASE = "train.release"
    UPLOAD = "train.upload"
    FORWARD = "train.forward"
    BACKWARD = "train.backward"
    LOCAL_EPOCH = "train.local_epoch"
    OUTPUTS = "train.outputs"
    CLOSE_ROUND = "train.close_round"
    ATTEST = "train.attest"
    DELIVER = "query.deliver"
    COLLECT = "train.collect"
    EVALUATE = "evaluate.delivered"
    FINISH = "train.finish"

    def __str__(self) -> str:
        return self.value


class Header:
    """The header of a message, with a clear error for each field that is wrong."""

    def __init__(self, fields: Mapping[str, Any], who: str = "") -> None:
        self._fields = fields
        self._who = f"{who}: " if who else ""

    @classmethod
    def of(cls, message: Message, who: str = "") -> Header:
        """Return the header of a message; ``who`` sent it, for errors.

        Raises
        ------
        MessageError
            The message has no header.
        """
        records = message.content.config_records
        if HEADER not in records:
            kind = message.metadata.message_type
            text = f"the message {kind} has no {HEADER!r} record"
            raise MessageError(f"{who}: {text}" if who else text)
        return cls(records[HEADER], who)

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str, kind: type[T]) -> T:
        """Return a field.

        Raises
        ------
        MessageError
            The field is missing or of another type.
        """
        value = self._fields.get(name)
        if type(value) is not kind:
            found = "missing" if value is None else f"of type {type(value).__name__}"
            raise MessageError(
                f"{self._who}header field {name!r} is {found}, not {kind.__name__}"
            )
        return value

    def optional(self, name: str, default: T) -> T:
        """Return a field, or the default where it is absent."""
        return self.get(name, type(default)) if name in self._fields else default

    def as_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return dict(self._fields)

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts.

        Raises
        ------
        MessageError
            The field is missing or of another type.
        """
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise MessageError(f"{self._who}header field {name!r} is not a list of texts")
        return value


def instruction(
    action: Action,
    node_id: int,
    fields: Mapping[str, Any],
    records: Mapping[str, ArrayRecord] | None = None,
    *,
    ttl: float,
) -> Message:
    """Return a message from the relay to a client.

    Parameters
    ----------
    ttl : float
        Seconds after which Flower may drop the message.
    """
    return Message(_content(fields, records), node_id, str(action), ttl=ttl)


def answer(
    message: Message,
    fields: Mapping[str, Any],
    records: Mapping[str, ArrayRecord] | None = None,
) -> Message:
    """Return a client's reply."""
    return Message(_content(fields, records), reply_to=message)


def refusal(message: Message, error: BaseException) -> Message:
    """Return a reply that carries an error.

    The text of our own errors travels; all of them but a lost state are refusals, which
    the same message would meet again. Of any other exception only the type and the
    place travel, since its text may hold data; the client's log has it in full.
    """
    if isinstance(error, CooperError):
        text = str(error)
    else:
        text = f"{type(error).__name__} at {_place(error)}; its text is in that client's log"
    refused = isinstance(error, CooperError) and not isinstance(error, StateError)
    return answer(message, {"error": text, "refused": refused})


def _place(error: BaseException) -> str:
    """Return the innermost place in code that is not a library's."""
    place, trace = "an unknown place", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename or place == "an unknown place":
            name = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
            place = f"{name}:{trace.tb_lineno} ({code.co_name})"
        trace = trace.tb_next
    return place


def array_record(message: Message, name: str) -> ArrayRecord:
    """Return the ``ArrayRecord`` of a message by name.

    Raises
    ------
    MessageError
        The message does not have it.
    """
    records = message.content.array_records
    if name not in records:
        raise MessageError(
            f"{message.metadata.message_type}: the message has no {name!r} record"
        )
    return records[name]


def payload_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays."""
    return sum(len(array.data) for array in record.values())


def _content(
    fields: Mapping[str, Any], records: Mapping[str, ArrayRecord] | None
) -> RecordDict:
    content = RecordDict({HEADER: ConfigRecord(dict(fields))})
    for name, record in (records or {}).items():
        content[name] = record
    return content
