"""A Flower ``Grid`` over connections that the clients open.

The relay listens; each client dials from inside one long ``train.live`` handler, so
clients need no open port. A link carries one request at a time, which keeps the relay's
memory to what the schedule has in flight. When a link breaks and the client dials again, the
request without a reply is sent again; a client that had answered it does so from memory.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from logging import WARNING

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from flwr_clicooper.errors import FrameError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.certificate import make_certificate
from flwr_clicooper.grids.exchange import exchange
from flwr_clicooper.grids.frames import Buffer, Kind
from flwr_clicooper.grids.wire import BROKEN_FOR, Wire, listen, server_tls

TOKEN_BYTES = 32
MAX_CALLERS = 256
"""Connections at the same time; further callers are turned away."""
HELLO_BYTES = 4096
"""What a caller may send before it has shown its token."""
_SHORT = 8192
_LOOK_EVERY = 1.0
_GRACE = 1.0


class LiveGrid(Grid):
    """Sends to linked nodes over their links, to all others by Flower's own grid.

    Parameters
    ----------
    grid : Grid
        Flower's own grid.
    address : str
        What clients dial. Any address but a loopback one makes the relay listen on all
        interfaces.
    port : int
        Port to listen on; 0 takes a free one.
    listen_on : str
        ``host:port`` to listen on, where clients dial another address or port that a
        forwarder brings here.
    insecure : bool
        Without TLS. Tensors and tokens then cross the network in the clear.

    Raises
    ------
    OSError
        The port is not free.
    """

    warm = True  # a linked node stays in one process

    def __init__(
        self,
        grid: Grid,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        listen_on: str = "",
        insecure: bool = False,
    ) -> None:
        self.mailbox = grid
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._links: dict[int, _Link] = {}
        self._replies: dict[str, Message] = {}
        self._closed = False
        self._look_again = 0.0
        certificate = None if insecure else make_certificate()
        self._certificate = certificate.certificate.decode() if certificate else ""
        self._tls = server_tls(certificate) if certificate else None
        self._callers = threading.BoundedSemaphore(MAX_CALLERS)
        if listen_on:
            host, own_port = listen_on.rsplit(":", 1)
            self._listener = listen(host, int(own_port), exactly=True)
        else:
            self._listener = listen(address, port)
        self.address = address
        self.port: int = port or self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="live-accept", daemon=True).start()

    # -- links -------------------------------------------------------------------

    def invite(self, node_id: int) -> dict[str, str | int]:
        """Return what a node needs to dial; it is good for this node and this run only."""
        token = secrets.token_hex(TOKEN_BYTES)
        link = self._links[node_id] = _Link(node_id, token, self._lock)
        return {
            "address": f"{self.address}:{self.port}",
            "certificate": self._certificate,
            "token": link.token,
        }

    def expect(self, node_id: int, invitation_id: str) -> None:
        """Note the mailbox message that invited a node; its reply means the link's end."""
        self._links[node_id].invitation = invitation_id

    def linked(self) -> set[int]:
        """Return the nodes whose link is open."""
        with self._changed:
            return {node_id for node_id, link in self._links.items() if link.wire}

    def redials(self) -> int:
        """Return how often links broke and came back."""
        with self._changed:
            return sum(max(0, link.dialled - 1) for link in self._links.values())

    def wait(self, seconds: float) -> None:
        """Wait until a reply or a link comes, at most some seconds."""
        with self._changed:
            if not self._replies:
                self._changed.wait(seconds)

    def ended(self) -> dict[int, Message]:
        """Return the replies of invited nodes that do not serve any more, each once."""
        invited = {x.invitation: n for n, x in self._links.items() if x.invitation}
        found: dict[int, Message] = {}
        for reply in self.mailbox.pull_messages(list(invited)) if invited else []:
            node_id = invited[reply.metadata.reply_to_message_id]
            self._links[node_id].invitation = ""
            found[node_id] = reply
        return found

    def close(self, patience: float = 10.0) -> None:
        """End all links, refuse new ones, and wait until clients left their handlers."""
        with self._changed:
            self._closed = True
            for link in self._links.values():
                link.changed.notify_all()
        deadline = time.monotonic() + patience
        while any(x.invitation for x in self._links.values()) and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.05)
        with suppress(OSError):  # wakes who waits in accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            self._changed.wait_for(lambda: not self.linked(), _GRACE)
            for link in self._links.values():
                if link.wire is not None:
                    link.wire.hang_up()

    # -- Grid --------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run of Flower's own grid."""
        self.mailbox.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self.mailbox.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the IDs of all nodes, linked or not."""
        return self.mailbox.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their IDs."""
        ids: list[str] = []
        for message in messages:
            link = self._links.get(message.metadata.dst_node_id)
            if link is None:
                ids += self.mailbox.push_messages([message])
                continue
            message_id = f"live-{uuid.uuid4()}"
            message.metadata.__dict__["_message_id"] = message_id
            request = _Request(message_id, frames.encode(message), message)
            with self._changed:
                link.take(request)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come, each once."""
        wanted = list(message_ids)
        self._look_for_lost_nodes()
        with self._changed:
            found = [self._replies.pop(i) for i in wanted if i in self._replies]
        others = [i for i in wanted if not i.startswith("live-")]
        if others:
            found += self.mailbox.pull_messages(others)
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for their replies."""
        return exchange(self, messages, float("inf") if timeout is None else timeout)

    def _look_for_lost_nodes(self) -> None:
        """Once a second: a node that left its handler, or does not dial again, is lost."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + _LOOK_EVERY
        for node_id, reply in self.ended().items():
            reason = f"the node left the live link: {_reason(reply)}"
            self._lose(node_id, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        for node_id, link in list(self._links.items()):
            if link.request is not None and now > link.broke_at + BROKEN_FOR:
                reason = f"the live link broke and did not come back within {BROKEN_FOR:g} s"
                self._lose(node_id, ErrorCode.NODE_UNAVAILABLE, reason)

    def _lose(self, node_id: int, code: int, reason: str) -> None:
        """Forget a link, so that what comes next goes by mailbox; fail its request."""
        with self._changed:
            link = self._links.pop(node_id)
            lost, link.request = link.request, None
            if lost is not None:
                error = Error(code=code, reason=reason)
                self._replies[lost.message_id] = Message(error, reply_to=lost.message)

    # -- a connection ------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log(WARNING, "a caller could not be taken: %s", error)
                time.sleep(_LOOK_EVERY)
                continue
            if not self._callers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=self._take, args=(connection,), name="live-link", daemon=True
            ).start()

    def _take(self, connection: socket.socket) -> None:
        """Serve a connection to its end, in a thread of its own."""
        try:
            with closing(Wire.answer(connection, self._tls)) as wire:
                try:
                    self._serve(wire)
                except FrameError as error:
                    wire.refuse(error)
        except (OSError, EOFError):
            return  # the caller hung up; it may dial again
        finally:
            self._callers.release()

    def _serve(self, wire: Wire) -> None:
        link = self._admit(wire.receive(HELLO_BYTES))
        wire.send(frames.pack(Kind.HELLO, b""))
        wire.greeted()
        self._attach(link, wire)
        try:
            while request := self._next(link, wire):
                if request.sent_on is not wire:
                    wire.send(request.frame)
                self._resolve(link, request.message_id, frames.decode(wire.receive()))
            if self._closed:
                wire.send(frames.pack(Kind.STOP, b""))
        finally:
            self._detach(link, wire)

    def _admit(self, hello: frames.Frame) -> _Link:
        """Return the link of a client that shows its token."""
        if hello.kind is not Kind.HELLO or hello.buffers:
            raise FrameError("a link begins with a hello")
        try:
            said = json.loads(bytes(hello.header))
            node_id, token = said["node"], said["token"]
        except (ValueError, KeyError, TypeError) as error:
            raise FrameError("the hello is malformed") from error
        link = self._links.get(node_id) if isinstance(node_id, int) else None
        known = link.token if link else "0" * 2 * TOKEN_BYTES
        right = isinstance(token, str) and hmac.compare_digest(known.encode(), token.encode())
        if self._closed:
            raise FrameError("the relay does not serve by live links")
        if link is None or not right:
            raise FrameError("the token is not the one of this node")
        return link

    def _attach(self, link: _Link, wire: Wire) -> None:
        with self._changed:
            older, link.wire = link.wire, wire
            link.broke_at = math.inf
            link.dialled += 1
            link.changed.notify_all()
            self._changed.notify_all()
        if link.dialled > 1:
            log(WARNING, "the live link of node %d is back", link.node_id)
        if older is not None:
            older.hang_up()

    def _detach(self, link: _Link, wire: Wire) -> None:
        with self._changed:
            broke = link.wire is wire and not self._closed
            if link.wire is wire:
                link.wire, link.broke_at = None, time.monotonic()
            self._changed.notify_all()
        if broke:
            log(WARNING, "the live link of node %d broke", link.node_id)

    def _next(self, link: _Link, wire: Wire) -> _Request | None:
        """Wait for the next request; None when the link must end."""
        with self._changed:
            while not self._closed and link.wire is wire:
                if link.request is not None:
                    return link.request
                # A client says nothing unasked: whatever comes now is the end.
                if not link.changed.wait(_LOOK_EVERY) and wire.has_news():
                    return None
        return None

    def _resolve(self, link: _Link, message_id: str, reply: Message) -> None:
        if reply.metadata.reply_to_message_id != message_id:
            raise FrameError("the reply is not the one to the request")
        with self._changed:
            if link.request is not None and link.request.message_id == message_id:
                link.request = None
                self._replies[message_id] = reply
                self._changed.notify_all()


@dataclass
class _Request:
    """What a node is asked; `sent_on` is the connection that has carried it already."""

    message_id: str
    frame: list[Buffer]
    message: Message
    sent_on: Wire | None = None


class _Link:
    """What the relay knows of one node's link.

    `dialled` counts its connections, `broke_at` is when the last one ended. `wire` is the
    one that is open, if one is; a new one supersedes an older one. `request` stays until
    its reply has come. `invitation` is the mailbox message that invited the node, while
    it has no reply. `changed` wakes the thread of this link alone.
    """

    def __init__(self, node_id: int, token: str, lock: threading.RLock) -> None:
        self.node_id = node_id
        self.token = token
        self.changed = threading.Condition(lock)
        self.dialled = 0
        self.broke_at = math.inf
        self.wire: Wire | None = None
        self.request: _Request | None = None
        self.invitation = ""

    def take(self, request: _Request) -> None:
        """Take a request, with the lock held; send it at once if it is short.

        The link is idle and what is short fits into the empty send buffer, so this does
        not wait, and saves the time until the link's thread wakes.
        """
        self.request = request
        if self.wire is not None and sum(map(len, request.frame)) <= _SHORT:
            with suppress(OSError):  # the link's thread meets the same error and ends it
                self.wire.send(request.frame)
                request.sent_on = self.wire
        self.changed.notify_all()


def _reason(reply: Message) -> str:
    """Return why a node left its handler."""
    if reply.has_error():
        return reply.error.reason or f"Flower error {reply.error.code}"
    records = reply.content.config_records
    return str(records["clicooper"].get("error", "")) if "clicooper" in records else ""
