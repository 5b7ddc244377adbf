"""A Flower ``Grid`` over gRPC streams that the clients open.

The relay listens; each client dials from inside one long ``train.live`` handler, so
clients need no open port. A stream carries one request at a time, which keeps the relay's
memory to what the schedule has in flight. When a stream breaks and the client dials
again, the request without a reply is sent again, and the client answers it from memory if
it had answered already.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from flwr_clicooper.errors import FrameError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.certificate import make_certificate
from flwr_clicooper.grids.exchange import exchange
from flwr_clicooper.grids.frames import Kind

METHOD = "/flwr_clicooper.Live/Link"
TOKEN_BYTES = 32
_SLACK = 2**20
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", frames.CHUNK + _SLACK),
    ("grpc.max_receive_message_length", frames.CHUNK + _SLACK),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
    # A link that broke is dialled anew; no memory of failed attempts may slow that down.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class LiveGrid(Grid):
    """Sends to linked nodes over streams, to all others by Flower's own grid.

    Parameters
    ----------
    grid : Grid
        Flower's own grid.
    address : str
        What clients dial. Any address but a loopback one makes the relay listen on all
        interfaces.
    port : int
        Port to listen on; 0 takes a free one.
    insecure : bool
        Without TLS. Tensors and tokens then cross the network in the clear.

    Raises
    ------
    OSError
        The port is not free.
    """

    warm = True
    """A linked node stays in one process."""

    def __init__(
        self, grid: Grid, address: str = "127.0.0.1", port: int = 0, *, insecure: bool = False
    ) -> None:
        self.mailbox = grid
        self._changed = threading.Condition()
        self._links: dict[int, _Link] = {}
        self._replies: dict[str, Message] = {}
        self._closed = False
        self._look_again = 0.0
        self._certificate = None if insecure else make_certificate()
        # A thread per stream; refused callers need one for a moment.
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=256, thread_name_prefix="live"),
            options=CHANNEL_OPTIONS,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, method = METHOD.strip("/").split("/")
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((generic,))
        self.address = address
        listen = f"{address}:{port}" if is_loopback(address) else f"[::]:{port}"
        self.port = self._listen(listen)
        self._server.start()

    def _listen(self, listen: str) -> int:
        try:
            if self._certificate is None:
                return int(self._server.add_insecure_port(listen))
            pair = (self._certificate.key, self._certificate.certificate)
            return int(
                self._server.add_secure_port(listen, grpc.ssl_server_credentials([pair]))
            )
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listen}: {error}") from error

    # -- links -------------------------------------------------------------------

    def invite(self, node_id: int) -> dict[str, str | int]:
        """Return what a node needs to dial; it is good for this node and this run only."""
        link = self._links[node_id] = _Link(secrets.token_hex(TOKEN_BYTES))
        certificate = self._certificate.certificate.decode() if self._certificate else ""
        return {
            "address": f"{self.address}:{self.port}",
            "certificate": certificate,
            "token": link.token,
        }

    def expect(self, node_id: int, invitation_id: str) -> None:
        """Note the mailbox message that invited a node; its reply means the link's end."""
        self._links[node_id].invitation = invitation_id

    def linked(self) -> set[int]:
        """Return the nodes whose stream is open."""
        with self._changed:
            return {node_id for node_id, link in self._links.items() if link.generation}

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
            self._changed.notify_all()
        deadline = time.monotonic() + patience
        while any(x.invitation for x in self._links.values()) and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.05)
        self._server.stop(grace=1).wait()

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
            frame = frames.encode(message)
            with self._changed:
                link.request = _Request(message_id, frame, message)
                self._changed.notify_all()
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
        """Once a second: a node that left its handler will not answer its request."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + 1.0
        for node_id, reply in self.ended().items():
            link = self._links[node_id]
            reason = f"the node left the live link: {_reason(reply)}"
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
            with self._changed:
                if link.request is not None:
                    lost, link.request = link.request, None
                    self._replies[lost.message_id] = Message(error, reply_to=lost.message)

    # -- a stream ----------------------------------------------------------------

    def _serve(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Serve one stream in a thread of its own."""
        try:
            link = self._admit(frames.read(incoming))
        except (FrameError, StopIteration) as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"refused: {error}")
            return
        generation = self._attach(link, context)
        try:
            while request := self._next(link, generation, context):
                yield from frames.chunks(request.frame)
                reply = frames.decode(frames.read(incoming))
                self._resolve(link, request.message_id, reply)
            if self._closed:
                yield frames.pack(Kind.STOP, b"")
        except FrameError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"refused: {error}")
        except StopIteration:
            return  # the client closed the stream; it may dial again
        finally:
            self._detach(link, generation)

    def _admit(self, hello: frames.Frame) -> _Link:
        """Return the link of a client that shows its token."""
        if hello.kind is not Kind.HELLO or hello.buffers:
            raise FrameError("a stream begins with a hello")
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

    def _attach(self, link: _Link, context: Any) -> int:
        with self._changed:
            link.count += 1
            link.generation = link.count
            self._changed.notify_all()
        context.add_callback(self._wake)
        return link.count

    def _detach(self, link: _Link, generation: int) -> None:
        with self._changed:
            if link.generation == generation:
                link.generation = 0
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next(self, link: _Link, generation: int, context: Any) -> _Request | None:
        """Wait for the next request; None when the stream must end."""
        with self._changed:
            while True:
                if self._closed or link.generation != generation or not context.is_active():
                    return None
                if link.request is not None:
                    return link.request
                self._changed.wait()

    def _resolve(self, link: _Link, message_id: str, reply: Message) -> None:
        if reply.metadata.reply_to_message_id != message_id:
            raise FrameError("the reply is not the one to the request")
        with self._changed:
            if link.request is not None and link.request.message_id == message_id:
                link.request = None
                self._replies[message_id] = reply
                self._changed.notify_all()


class _Request(NamedTuple):
    message_id: str
    frame: bytes
    message: Message


class _Link:
    """What the relay knows of one node's link.

    `generation` is the number of its open stream, 0 while there is none; a new stream
    supersedes an older one. `request` stays until its reply has come. `invitation` is the
    mailbox message that invited the node, while it has no reply.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.count = 0
        self.generation = 0
        self.request: _Request | None = None
        self.invitation = ""


def _reason(reply: Message) -> str:
    """Return why a node left its handler."""
    if reply.has_error():
        return reply.error.reason or f"Flower error {reply.error.code}"
    records = reply.content.config_records
    return str(records["clicooper"].get("error", "")) if "clicooper" in records else ""


def is_loopback(address: str) -> bool:
    """Return whether an address is of this machine only."""
    return address in ("localhost", "::1", "[::1]") or address.startswith("127.")
