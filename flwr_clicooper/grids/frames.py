"""Flower messages as bytes for a live link.

A frame is::

    magic "CCF1" | kind u8 | header length u32 | buffers u32 | frame length u64
    buffer lengths u64 ... | header | buffers ...

The header is Flower's own protobuf of the message with the data of its arrays left out;
the buffers are that data, in order. A frame longer than `CHUNK` travels in several gRPC
messages. Every length is checked before anything is allocated or parsed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, recorddict_to_proto
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from flwr_clicooper.errors import FrameError

CHUNK = 32 * 2**20
"""Bytes in one gRPC message at most."""
MAX_FRAME = 2 * 2**30
"""Bytes in one frame at most."""
MAX_HEADER = 16 * 2**20
MAX_BUFFERS = 65_536

_MAGIC = b"CCF1"
_PREFIX = struct.Struct("<4sBIIQ")


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 0
    HELLO = 1
    STOP = 2


class Frame(NamedTuple):
    """A frame taken apart.

    Attributes
    ----------
    kind : Kind
        What it is.
    header : memoryview
        Protobuf of a message, or the text of a hello.
    buffers : list of memoryview
        Data of the arrays; views of what arrived.
    """

    kind: Kind
    header: memoryview
    buffers: list[memoryview]


def pack(kind: Kind, header: bytes, buffers: list[bytes | memoryview] | None = None) -> bytes:
    """Return a frame; one copy of each buffer.

    Raises
    ------
    FrameError
        The frame is larger than the other side accepts.
    """
    buffers = buffers or []
    sizes = struct.pack(f"<{len(buffers)}Q", *map(len, buffers))
    length = _PREFIX.size + len(sizes) + len(header) + sum(map(len, buffers))
    if length > MAX_FRAME or len(header) > MAX_HEADER or len(buffers) > MAX_BUFFERS:
        raise FrameError(
            f"a message of {length:,} bytes in {len(buffers):,} arrays is too large for a "
            f"live link; at most {MAX_FRAME:,} bytes in {MAX_BUFFERS:,} arrays"
        )
    prefix = _PREFIX.pack(_MAGIC, kind, len(header), len(buffers), length)
    return b"".join((prefix, sizes, header, *buffers))


def chunks(frame: bytes) -> Iterator[bytes]:
    """Yield a frame in parts that fit gRPC messages."""
    if len(frame) <= CHUNK:
        yield frame
        return
    view = memoryview(frame)
    for start in range(0, len(frame), CHUNK):
        yield bytes(view[start : start + CHUNK])


def read(parts: Iterator[bytes]) -> Frame:
    """Return the next frame of a stream.

    Raises
    ------
    FrameError
        The parts are not a frame, or it is too large.
    StopIteration
        The stream has ended.
    """
    first = next(parts)
    length = _declared_length(first)
    if len(first) == length:
        return _unpack(memoryview(first))
    whole = bytearray(length)
    filled = len(first)
    whole[:filled] = first
    while filled < length:
        part = next(parts)
        if not part or filled + len(part) > length:
            raise FrameError(f"a frame of {length:,} bytes came with other bytes in it")
        whole[filled : filled + len(part)] = part
        filled += len(part)
    return _unpack(memoryview(whole).toreadonly())


def encode(message: Message) -> bytes:
    """Return a Flower message as a frame."""
    proto = ProtoMessage(metadata=metadata_to_proto(message.metadata))
    buffers: list[bytes | memoryview] = []
    if message.has_error():
        proto.error.CopyFrom(error_to_proto(message.error))
    else:
        bare = RecordDict()
        for name, record in message.content.items():
            if not isinstance(record, ArrayRecord):
                bare[name] = record
                continue
            buffers += [array.data for array in record.values()]
            bare[name] = ArrayRecord({key: _bare(array) for key, array in record.items()})
        proto.content.CopyFrom(recorddict_to_proto(bare))
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


def _bare(array: Array) -> Array:
    return Array(array.dtype, tuple(array.shape), array.stype, b"")


def _declared_length(first: bytes) -> int:
    if len(first) < _PREFIX.size:
        raise FrameError(f"{len(first)} bytes are too few for a frame")
    magic, kind, header, buffers, length = _PREFIX.unpack_from(first)
    if magic != _MAGIC:
        raise FrameError("the bytes do not begin as a frame of this version")
    if kind not in set(Kind):
        raise FrameError(f"there is no frame of kind {kind}")
    if header > MAX_HEADER or buffers > MAX_BUFFERS or length > MAX_FRAME:
        raise FrameError(
            f"a frame of {length:,} bytes with a header of {header:,} bytes and {buffers:,} "
            f"buffers is refused; at most {MAX_FRAME:,}, {MAX_HEADER:,} and {MAX_BUFFERS:,}"
        )
    if len(first) > length or length < _PREFIX.size + 8 * buffers + header:
        raise FrameError(f"a frame says {length:,} bytes, which its parts do not have")
    return int(length)


def _unpack(frame: memoryview) -> Frame:
    _, kind, header, count, length = _PREFIX.unpack_from(frame)
    at = _PREFIX.size
    sizes = struct.unpack_from(f"<{count}Q", frame, at)
    at += 8 * count
    if at + header + sum(sizes) != length:
        raise FrameError(f"a frame says {length:,} bytes, which its parts do not have")
    head = frame[at : at + header]
    at += header
    buffers = []
    for size in sizes:
        buffers.append(frame[at : at + size])
        at += size
    return Frame(Kind(kind), head, buffers)
