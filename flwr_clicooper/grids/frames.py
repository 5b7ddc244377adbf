"""Flower messages as bytes for a live link.

A frame is::

    magic "CCF1" | kind u8 | header length u32 | buffers u32 | frame length u64
    buffer lengths u64 ... | header | buffers ...

The header is Flower's own protobuf of the message with the data of its arrays left out;
the buffers are that data, in order. Every length is checked before anything is allocated
or parsed. A buffer is sent from where it lies and received to where it stays.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, recorddict_to_proto
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from flwr_clicooper.errors import FrameError

Buffer = bytes | memoryview
Fill = Callable[[memoryview], None]
"""Receives exactly as many bytes as a view has."""
MAX_FRAME = 2 * 2**30
"""Bytes in one frame at most."""
MAX_HEADER = 16 * 2**20
MAX_BUFFERS = 65_536

_TOGETHER = 64 * 2**10
"""Shorter parts are sent together with their neighbours."""
_MAGIC = b"CCF1"
_PREFIX = struct.Struct("<4sBIIQ")


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 0
    HELLO = 1
    STOP = 2
    REFUSAL = 3


class Frame(NamedTuple):
    """A frame taken apart.

    Attributes
    ----------
    kind : Kind
        What it is.
    header : memoryview
        Protobuf of a message, or the text of a hello or a refusal.
    buffers : list of memoryview
        Data of the arrays; views of what arrived.
    """

    kind: Kind
    header: memoryview
    buffers: list[memoryview]


def pack(kind: Kind, header: bytes, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return a frame as the parts to send, long buffers without a copy.

    Raises
    ------
    FrameError
        The frame is larger than the other side accepts.
    """
    sizes = struct.pack(f"<{len(buffers)}Q", *map(len, buffers))
    length = _PREFIX.size + len(sizes) + len(header) + sum(map(len, buffers))
    if length > MAX_FRAME or len(header) > MAX_HEADER or len(buffers) > MAX_BUFFERS:
        raise FrameError(
            f"a message of {length:,} bytes in {len(buffers):,} arrays is too large for a "
            f"live link; at most {MAX_FRAME:,} bytes in {MAX_BUFFERS:,} arrays"
        )
    prefix = _PREFIX.pack(_MAGIC, kind, len(header), len(buffers), length)
    parts: list[Buffer] = []
    short: list[Buffer] = [prefix, sizes, header]
    for buffer in buffers:
        if len(buffer) < _TOGETHER:
            short.append(buffer)
        else:
            parts += [b"".join(short), buffer]
            short = []
    return [*parts, b"".join(short)] if short else parts


def read(fill: Fill, limit: int = MAX_FRAME) -> Frame:
    """Return the next frame.

    Parameters
    ----------
    fill : callable
        Receives bytes into a view.
    limit : int
        Bytes that the frame may have.

    Raises
    ------
    FrameError
        What comes is not a frame, or it is too large.
    """
    start = bytearray(_PREFIX.size)
    fill(memoryview(start))
    kind, header, count, length = _checked(start, limit)
    head = _received(fill, 8 * count + header)
    sizes = struct.unpack_from(f"<{count}Q", head)
    if _PREFIX.size + len(head) + sum(sizes) != length:
        raise FrameError(f"a frame says {length:,} bytes, which its parts do not have")
    return Frame(kind, head[8 * count :], [_received(fill, size) for size in sizes])


def encode(message: Message) -> list[Buffer]:
    """Return a Flower message as the parts of a frame."""
    proto = ProtoMessage(metadata=metadata_to_proto(message.metadata))
    buffers: list[Buffer] = []
    if message.has_error():
        proto.error.CopyFrom(error_to_proto(message.error))
    else:
        arrays = message.content.array_records
        others = {k: v for k, v in message.content.items() if k not in arrays}
        proto.content.CopyFrom(recorddict_to_proto(RecordDict(others)))
        for name, record in arrays.items():
            item = proto.content.items.add(key=name).array_record
            item.SetInParent()  # a record without arrays is a record still
            for key, array in record.items():
                place = item.items.add(key=key).value
                place.dtype, place.stype = array.dtype, array.stype
                place.shape.extend(array.shape)
                buffers.append(array.data)
    return pack(Kind.MESSAGE, proto.SerializeToString(), buffers)


def decode(frame: Frame) -> Message:
    """Return the Flower message of a frame; its arrays are views of the frame.

    Raises
    ------
    FrameError
        The header is not a message, or its arrays are not those of the frame.
    """
    try:
        proto = ProtoMessage.FromString(bytes(frame.header))
        message = message_from_proto(proto)
    except Exception as error:  # Flower's parser raises many kinds for damaged bytes
        raise FrameError("the header of a frame is not a Flower message") from error
    if message.has_error():
        return message
    if not message.has_content():
        raise FrameError("a frame holds a message without content")
    records = message.content.array_records.values()
    arrays = [array for record in records for array in record.values()]
    if len(arrays) != len(frame.buffers) or any(array.data for array in arrays):
        raise FrameError("the buffers of a frame are not the arrays of its message")
    for array, buffer in zip(arrays, frame.buffers, strict=True):
        # Not a copy; NumPy, PyTorch and Flower's hashing all read a view.
        array.data = buffer  # type: ignore[assignment]
    return message


def _received(fill: Fill, size: int) -> memoryview:
    """Return received bytes, to read only, in memory of their own.

    Not NumPy's: it asks for huge pages above 4 MB, and to find some may take the system
    longer than the transfer.
    """
    view = memoryview(bytearray(size))
    fill(view)
    return view.toreadonly()


def _checked(prefix: bytearray, limit: int) -> tuple[Kind, int, int, int]:
    """Return kind, header length, number of buffers and frame length of a prefix."""
    magic, kind, header, buffers, length = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise FrameError("the bytes do not begin as a frame of this version")
    if kind not in set(Kind):
        raise FrameError(f"there is no frame of kind {kind}")
    if header > MAX_HEADER or buffers > MAX_BUFFERS or length > limit:
        raise FrameError(
            f"a frame of {length:,} bytes with a header of {header:,} bytes and {buffers:,} "
            f"buffers is refused; at most {limit:,}, {MAX_HEADER:,} and {MAX_BUFFERS:,}"
        )
    if length < _PREFIX.size + 8 * buffers + header:
        raise FrameError(f"a frame says {length:,} bytes, which its parts do not have")
    return Kind(kind), header, buffers, length
