from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import FrameError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.frames import Kind


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def message(data: list[bytes], text: str = "x") -> Message:
    arrays = {str(i): Array("uint8", (len(d),), "raw", d) for i, d in enumerate(data)}
    records = {
        "arrays": ArrayRecord(arrays),
        "clicooper": ConfigRecord({"text": text, "n": 3, "list": [1.5, 2.5], "raw": b"\0\1"}),
        "metrics": MetricRecord({"loss": 0.25}),
    }
    return Message(RecordDict(records), 7, "train.forward", ttl=60.0, group_id="g")


def parts(frame: bytes) -> Iterator[bytes]:
    return iter(list(frames.chunks(frame)))


@given(data=st.lists(st.binary(max_size=300), max_size=5), text=st.text(max_size=20))
def test_messages_arrive_as_they_were_sent(data: list[bytes], text: str) -> None:
    sent = message(data, text)
    got = frames.decode(frames.read(parts(frames.encode(sent))))
    assert got.metadata == sent.metadata
    assert got.content["clicooper"] == sent.content["clicooper"]
    assert got.content["metrics"] == sent.content["metrics"]
    assert [bytes(a.data) for a in got.content["arrays"].values()] == data
    assert [a.shape for a in got.content["arrays"].values()] == [(len(d),) for d in data]


def test_large_frames_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "CHUNK", 100)
    data = [bytes(range(256)) * 4, b"", b"end"]
    frame = frames.encode(message(data))
    assert len(list(frames.chunks(frame))) == -(-len(frame) // 100)
    stream = iter([*frames.chunks(frame), *frames.chunks(frame)])
    for _ in range(2):
        got = frames.decode(frames.read(stream))
        assert [bytes(a.data) for a in got.content["arrays"].values()] == data
    with pytest.raises(StopIteration):
        frames.read(stream)


def test_arrays_are_views_of_what_arrived() -> None:
    frame = frames.encode(message([b"a" * 1000]))
    (array,) = frames.decode(frames.read(parts(frame))).content["arrays"].values()
    assert isinstance(array.data, memoryview)
    assert array.data.obj is frame
    assert array.data.readonly


def test_errors_travel() -> None:
    sent = Message(Error(code=3, reason="why"), reply_to=message([]))
    got = frames.decode(frames.read(parts(frames.encode(sent))))
    assert got.error.reason == "why"


def head(
    magic: bytes = b"CCF1", kind: int = 0, header: int = 0, n: int = 0, size: int = 21
) -> bytes:
    return struct.pack("<4sBIIQ", magic, kind, header, n, size)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([b""], "too few"),
        ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], "do not begin as a frame"),
        ([head(kind=9)], "no frame of kind 9"),
        ([head(size=2**62)], "is refused"),
        ([head(header=2**31, size=2**31)], "is refused"),
        ([head(n=2**31, size=2**31)], "is refused"),
        ([head(n=1)], "which its parts do not have"),
        ([head() + b"more"], "which its parts do not have"),
        ([head(size=30) + b"x", b""], "other bytes in it"),
        ([head(size=30) + b"x", b"y" * 30], "other bytes in it"),
        ([head(n=1, size=37) + struct.pack("<Q", 2**63) + b"x" * 8], "do not have"),
    ],
)
def test_what_is_not_a_frame_is_refused_before_it_is_allocated(
    sent: list[bytes], reason: str
) -> None:
    with pytest.raises(FrameError, match=reason):
        frames.read(iter(sent))


def test_a_frame_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    with pytest.raises(FrameError, match=r"too large .* at most 1,000 bytes"):
        frames.encode(message([b"x" * 1000]))


@pytest.mark.parametrize(
    ("header", "buffers"), [(b"\xff\xff\xff", []), (b"", []), (b"", [b"stray"])]
)
def test_headers_that_are_no_message_are_refused(header: bytes, buffers: list[bytes]) -> None:
    frame = frames.pack(Kind.MESSAGE, header, buffers)
    with pytest.raises(FrameError):
        frames.decode(frames.read(iter([frame])))


@settings(max_examples=4000, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6
    ),
    cut=st.integers(0, 40),
    more=st.binary(max_size=8),
)
def test_thousands_of_mutated_frames_are_read_or_refused_by_name(
    edits: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    frame = bytearray(frames.encode(message([b"abc" * 9, b"z"])))
    for place, value in edits:
        frame[place % len(frame)] = value
    sent = bytes(frame[: len(frame) - cut]) + more
    try:
        got = frames.decode(frames.read(iter([sent])))
    except (FrameError, StopIteration):
        return
    assert isinstance(got, Message)
