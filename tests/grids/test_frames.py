from __future__ import annotations

import io
import struct

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


def read(sent: bytes, limit: int = frames.MAX_FRAME) -> frames.Frame:
    """Read one frame from bytes, after which the connection ends."""
    return frames.read(filler(io.BytesIO(sent)), limit)


def filler(stream: io.BytesIO) -> frames.Fill:
    def fill(view: memoryview) -> None:
        if stream.readinto(view) < len(view):
            raise EOFError

    return fill


def whole(frame: list[frames.Buffer]) -> bytes:
    return b"".join(frame)


@given(data=st.lists(st.binary(max_size=300), max_size=5), text=st.text(max_size=20))
def test_messages_arrive_as_they_were_sent(data: list[bytes], text: str) -> None:
    sent = message(data, text)
    got = frames.decode(read(whole(frames.encode(sent))))
    assert got.metadata == sent.metadata
    assert got.content["clicooper"] == sent.content["clicooper"]
    assert got.content["metrics"] == sent.content["metrics"]
    assert [bytes(a.data) for a in got.content["arrays"].values()] == data
    assert [a.shape for a in got.content["arrays"].values()] == [(len(d),) for d in data]


def test_frames_follow_each_other() -> None:
    data = [bytes(range(256)) * 400, b"", b"end"]
    frame = whole(frames.encode(message(data)))
    fill = filler(io.BytesIO(frame + frame))
    for _ in range(2):
        got = frames.decode(frames.read(fill))
        assert [bytes(a.data) for a in got.content["arrays"].values()] == data
    with pytest.raises(EOFError):
        frames.read(fill)


def test_long_arrays_are_sent_from_where_they_lie_and_read_only_where_they_arrive() -> None:
    sent = message([b"a" * 100_000, b"short", b"b" * 70_000])
    frame = frames.encode(sent)
    long = [array.data for array in sent.content["arrays"].values() if len(array.data) > 100]
    assert [part for part in frame if any(part is data for data in long)] == long
    assert len(frame) == 4  # header, long, short, long
    (array, *_) = frames.decode(read(whole(frame))).content["arrays"].values()
    assert isinstance(array.data, memoryview)
    assert array.data.readonly


def test_errors_travel() -> None:
    sent = Message(Error(code=3, reason="why"), reply_to=message([]))
    got = frames.decode(read(whole(frames.encode(sent))))
    assert got.error.reason == "why"


def head(
    magic: bytes = b"CCF1", kind: int = 0, header: int = 0, n: int = 0, size: int = 21
) -> bytes:
    return struct.pack("<4sBIIQ", magic, kind, header, n, size)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "do not begin as a frame"),
        (head(kind=9), "no frame of kind 9"),
        (head(size=2**62), "is refused"),
        (head(header=2**31, size=2**31), "is refused"),
        (head(n=2**31, size=2**31), "is refused"),
        (head(n=1), "which its parts do not have"),
        (head(size=30), "which its parts do not have"),
        (head(n=1, size=37) + struct.pack("<Q", 2**63) + b"x" * 8, "do not have"),
        (head(n=1, size=37) + struct.pack("<Q", 7) + b"x" * 8, "do not have"),
    ],
)
def test_what_is_not_a_frame_is_refused_before_it_is_allocated(
    sent: bytes, reason: str
) -> None:
    with pytest.raises(FrameError, match=reason):
        read(sent)


@pytest.mark.parametrize("sent", [b"", b"CCF1", head(size=22, header=1)])
def test_a_frame_that_breaks_off_is_the_end_of_the_connection(sent: bytes) -> None:
    with pytest.raises(EOFError):
        read(sent)


def test_a_limit_holds_for_the_frame_at_hand() -> None:
    frame = whole(frames.pack(Kind.HELLO, b"x" * 100))
    assert len(read(frame, 121).header) == 100
    with pytest.raises(FrameError, match="at most 120"):
        read(frame, 120)


def test_a_frame_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    with pytest.raises(FrameError, match=r"too large .* at most 1,000 bytes"):
        frames.encode(message([b"x" * 1000]))


@pytest.mark.parametrize(
    ("header", "buffers"), [(b"\xff\xff\xff", []), (b"", []), (b"", [b"stray"])]
)
def test_headers_that_are_no_message_are_refused(header: bytes, buffers: list[bytes]) -> None:
    frame = whole(frames.pack(Kind.MESSAGE, header, buffers))
    with pytest.raises(FrameError):
        frames.decode(read(frame))


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
    frame = bytearray(whole(frames.encode(message([b"abc" * 9, b"z"]))))
    for place, value in edits:
        frame[place % len(frame)] = value
    sent = bytes(frame[: len(frame) - cut]) + more
    try:
        got = frames.decode(read(sent))
    except (FrameError, EOFError):
        return
    assert isinstance(got, Message)
