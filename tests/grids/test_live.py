from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from flwr_clicooper import LocalGrid
from flwr_clicooper.errors import ClientTimeoutError, LinkError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids import live as lives
from flwr_clicooper.grids import wire as wires
from flwr_clicooper.grids.certificate import make_certificate
from flwr_clicooper.grids.dial import Line
from flwr_clicooper.grids.exchange import exchange
from flwr_clicooper.grids.live import LiveGrid
from flwr_clicooper.grids.wire import Wire, is_loopback
from tests.cable import Cable

NODE = 101


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def ask(number: int = 0, node_id: int = NODE) -> Message:
    content = RecordDict({"clicooper": ConfigRecord({"n": number}), "a": ArrayRecord()})
    return Message(content, node_id, "train.forward", ttl=60.0)


class Dialled:
    """A line served in a thread, and how it ended."""

    def __init__(self, invitation: Any, serve: Callable[[Message], Message] = echo) -> None:
        self.line = Line(invitation, NODE, patience=5, first_patience=1)
        self.ended: int | LinkError | None = None
        self.thread = threading.Thread(target=self._run, args=(serve,), daemon=True)
        self.thread.start()

    def _run(self, serve: Callable[[Message], Message]) -> None:
        try:
            self.ended = self.line.serve(serve)
        except LinkError as error:
            self.ended = error

    def end(self) -> Any:
        self.thread.join(10)
        return self.ended


@pytest.fixture(params=[False, True], ids=["tls", "insecure"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveGrid]:
    grid = LiveGrid(LocalGrid(ClientApp(), [{}, {}], {}), insecure=request.param)
    yield grid
    grid.close(patience=0)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_are_answered_in_one_process_until_the_relay_stops(live: LiveGrid) -> None:
    node = Dialled(live.invite(NODE))
    for number in range(20):
        (reply,) = exchange(live, [ask(number)], timeout=5)
        assert reply.content["clicooper"]["n"] == number
        assert reply.metadata.src_node_id == NODE
    assert live.linked() == {NODE}
    live.close(patience=0)
    assert node.end() == 20


def test_nodes_without_a_link_are_reached_by_the_mailbox(live: LiveGrid) -> None:
    (reply,) = exchange(live, [ask(node_id=102)], timeout=5)
    assert reply.has_error()  # the empty app answers, in this process


def test_a_client_that_does_not_answer_is_named(live: LiveGrid) -> None:
    stop = threading.Event()
    Dialled(live.invite(NODE), lambda m: (stop.wait(5), echo(m))[1])
    with pytest.raises(ClientTimeoutError, match=r"node 101 did not answer train\.forward"):
        exchange(live, [ask()], timeout=0.3)
    stop.set()


# -- who may dial ----------------------------------------------------------------------


def speak(invitation: Any, *sent: bytes) -> str:
    """Speak to the relay as a stranger may; return its refusal."""
    wire = Wire.dial(invitation["address"], invitation["certificate"])
    wire.send(sent)
    while (frame := wire.receive()).kind is not frames.Kind.REFUSAL:
        pass
    with pytest.raises((EOFError, OSError)):
        wire.receive()
    wire.close()
    return bytes(frame.header).decode()


def hello(text: bytes) -> bytes:
    return whole(frames.pack(frames.Kind.HELLO, text))


def whole(frame: list[frames.Buffer]) -> bytes:
    return b"".join(frame)


def oversized(size: int) -> bytes:
    return struct.pack("<4sBIIQ", b"CCF1", frames.Kind.HELLO, 0, 0, size)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([b"x" * 100], "do not begin as a frame"),
        ([hello(b"not json")], "hello is malformed"),
        ([hello(b"[1]")], "hello is malformed"),
        ([hello(b'{"node": 101, "token": ""}')], "token is not the one"),
        ([hello(b'{"node": 101, "token": 7}')], "token is not the one"),
        ([hello(b'{"node": "101", "token": "x"}')], "token is not the one"),
        ([hello(b'{"node": 999, "token": "%s"}' % (b"0" * 64))], "token is not the one"),
        ([whole(frames.pack(frames.Kind.STOP, b""))], "begins with a hello"),
        ([oversized(2**30)], "frame of 1,073,741,824 bytes .* is refused; at most 4,096"),
        ([hello(b"x" * 5000)], "is refused; at most 4,096"),
    ],
)
def test_strangers_are_refused_and_the_honest_client_goes_on(
    live: LiveGrid, sent: list[bytes], reason: str
) -> None:
    invitation = live.invite(NODE)
    Dialled(invitation)
    exchange(live, [ask()], timeout=5)
    assert re.search(reason, speak(invitation, *sent))
    (reply,) = exchange(live, [ask(5)], timeout=5)
    assert reply.content["clicooper"]["n"] == 5


def test_a_wrong_token_ends_the_client_with_a_clear_error(live: LiveGrid) -> None:
    node = Dialled(live.invite(NODE) | {"token": "0" * 64})
    assert "token is not the one of this node" in str(node.end())
    assert live.linked() == set()


def test_a_relay_with_another_certificate_is_not_trusted() -> None:
    live = LiveGrid(LocalGrid(ClientApp(), [{}], {}))
    other = make_certificate().certificate.decode()
    node = Dialled(live.invite(NODE) | {"certificate": other})
    assert "does not have the certificate of the invitation" in str(node.end())
    assert live.linked() == set()
    live.close(patience=0)


def test_a_client_that_expects_tls_does_not_speak_to_a_relay_without() -> None:
    live = LiveGrid(LocalGrid(ClientApp(), [{}], {}), insecure=True)
    certificate = make_certificate().certificate.decode()
    node = Dialled(live.invite(NODE) | {"certificate": certificate})
    assert "could not be made" in str(node.end())
    live.close(patience=0)


def test_a_relay_that_is_not_there_is_named() -> None:
    invitation = {"address": "127.0.0.1:1", "certificate": "", "token": "x"}
    assert "127.0.0.1:1 could not be made" in str(Dialled(invitation).end())


def test_a_malformed_answer_ends_that_link_only(live: LiveGrid) -> None:
    Dialled(live.invite(NODE))
    liar = live.invite(102)
    refusals = []

    def lie() -> None:
        said = hello(b'{"node": 102, "token": "%s"}' % str(liar["token"]).encode())
        refusals.append(speak(liar, said, whole(frames.pack(frames.Kind.MESSAGE, b"\xff"))))

    thread = threading.Thread(target=lie)
    thread.start()
    until(lambda: 102 in live.linked())
    list(live.push_messages([ask(node_id=102)]))
    thread.join(5)
    assert "the header of a frame is not" in refusals[0]
    (reply,) = exchange(live, [ask(6)], timeout=5)
    assert reply.content["clicooper"]["n"] == 6


def test_a_caller_that_says_nothing_is_hung_up_on(
    live: LiveGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = live.invite(NODE)
    monkeypatch.setattr(wires, "GREETING_TIMEOUT", 0.3)
    wire = Wire.dial(invitation["address"], invitation["certificate"])
    wire.greeted()
    with pytest.raises((EOFError, OSError)):
        wire.receive()
    wire.close()


def test_more_callers_than_the_relay_takes_are_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lives, "MAX_CALLERS", 2)
    live = LiveGrid(LocalGrid(ClientApp(), [{}], {}))
    invitation = live.invite(NODE)
    Dialled(invitation)
    until(live.linked)
    address = invitation["address"].rsplit(":", 1)
    silent = socket.create_connection((address[0], int(address[1])))
    time.sleep(0.2)
    with pytest.raises(OSError):  # noqa: PT011 - reset or closed, as the system has it
        Wire.dial(invitation["address"], invitation["certificate"])
    (reply,) = exchange(live, [ask(5)], timeout=5)
    assert reply.content["clicooper"]["n"] == 5
    silent.close()
    live.close(patience=0)


def test_a_second_connection_of_a_node_supersedes_the_first(live: LiveGrid) -> None:
    invitation = live.invite(NODE)
    said = hello(b'{"node": 101, "token": "%s"}' % str(invitation["token"]).encode())
    first = Wire.dial(invitation["address"], invitation["certificate"])
    first.send([said])
    first.receive()
    Dialled(invitation)
    with pytest.raises((EOFError, OSError)):
        first.receive()
    (reply,) = exchange(live, [ask(5)], timeout=5)
    assert reply.content["clicooper"]["n"] == 5


def test_only_loopback_is_listened_on_unless_the_user_says_so(live: LiveGrid) -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("relay.example.org")
    assert not is_loopback("10.0.0.7")
    with socket.socket() as outside:
        outside.settimeout(1)
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127."):
            return
        assert outside.connect_ex((address, live.port)) != 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot listen on 127"):
            LiveGrid(LocalGrid(ClientApp(), [{}], {}), port=taken.getsockname()[1])


# -- links that break ------------------------------------------------------------------


def test_a_cut_link_is_dialled_again_and_no_request_runs_twice(live: LiveGrid) -> None:
    invitation = live.invite(NODE)
    cable = Cable(str(invitation["address"]))
    ran: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def work(message: Message) -> Message:
        number = int(message.content["clicooper"]["n"])
        ran.append(number)
        if number == 2:
            started.set()
            go_on.wait(5)
        return echo(message)

    Dialled(invitation | {"address": cable.address}, work)
    exchange(live, [ask(1)], timeout=5)
    ids = list(live.push_messages([ask(2)]))
    assert started.wait(5)
    cable.cut()  # the answer to 2 is computed while there is no link
    until(lambda: not live.linked())
    go_on.set()
    time.sleep(0.5)
    cable.open = True
    replies: list[Message] = []
    until(lambda: replies.extend(live.pull_messages(ids)) or replies)
    assert replies[0].content["clicooper"]["n"] == 2
    (reply,) = exchange(live, [ask(3)], timeout=5)
    assert reply.content["clicooper"]["n"] == 3
    assert ran == [1, 2, 3]


def test_a_client_gives_up_when_the_link_stays_broken(live: LiveGrid) -> None:
    invitation = live.invite(NODE)
    cable = Cable(str(invitation["address"]))
    node = Dialled(invitation | {"address": cable.address})
    node.line._patience = 0.2
    exchange(live, [ask()], timeout=5)
    cable.cut()
    assert "broke and did not come back" in str(node.end())


def test_a_node_that_does_not_dial_again_is_lost(
    live: LiveGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "BROKEN_FOR", 0.5)
    invitation = live.invite(NODE)
    cable = Cable(str(invitation["address"]))
    Dialled(invitation | {"address": cable.address})
    exchange(live, [ask()], timeout=5)
    cable.cut()
    (reply,) = exchange(live, [ask()], timeout=30)
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert "did not come back within 0.5 s" in reply.error.reason


def test_a_node_that_left_its_handler_is_reported_at_once(live: LiveGrid) -> None:
    class Mailbox(LocalGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            if "invitation" not in list(message_ids):
                return []
            content = RecordDict({"clicooper": ConfigRecord({"error": "the disk is full"})})
            reply = Message(content, reply_to=ask())
            reply.metadata.__dict__["_reply_to_message_id"] = "invitation"
            return [reply]

    live.mailbox = Mailbox(ClientApp(), [{}], {})
    live.invite(NODE)
    live.expect(NODE, "invitation")
    started = time.monotonic()
    (reply,) = exchange(live, [ask()], timeout=30)
    assert time.monotonic() - started < 5
    assert "left the live link: the disk is full" in reply.error.reason
