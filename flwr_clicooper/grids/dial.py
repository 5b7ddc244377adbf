"""The client's end of a live link: dial, then serve frames until told to stop."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from logging import WARNING
from typing import Any

import grpc
from flwr.app import Message
from flwr.common.logger import log

from flwr_clicooper.errors import LinkError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.certificate import SERVER_NAME
from flwr_clicooper.grids.frames import Frame, Kind
from flwr_clicooper.grids.live import CHANNEL_OPTIONS, METHOD

_RETRY_EVERY = 0.5
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)

Serve = Callable[[Message], Message]


class Line:
    """A client's link to the relay.

    Parameters
    ----------
    invitation : mapping
        ``address``, ``certificate`` (PEM, empty for none) and ``token`` from the relay.
    node_id : int
        Who dials.
    patience : float
        Seconds to keep dialling after the link broke.
    first_patience : float
        Seconds to keep dialling at the beginning.
    """

    def __init__(
        self,
        invitation: dict[str, str],
        node_id: int,
        patience: float,
        first_patience: float = 5.0,
    ) -> None:
        self.address = invitation["address"]
        self._certificate = invitation["certificate"].encode()
        said = {"node": node_id, "token": invitation["token"]}
        self._hello = frames.pack(Kind.HELLO, json.dumps(said).encode())
        self._patience = patience
        self._first_patience = first_patience
        self._answered: tuple[str, bytes] | None = None

    def serve(self, run: Serve) -> int:
        """Serve requests until the relay says stop; return how many were answered.

        Raises
        ------
        LinkError
            The relay cannot be reached, its certificate is not the pinned one, it refuses
            this client, or the link stayed broken for too long.
        """
        answered, connected = 0, False
        deadline = time.monotonic() + self._first_patience
        while True:
            channel = self._channel()
            try:
                for _ in self._stream(channel, run):
                    answered, connected = answered + 1, True
                    deadline = time.monotonic() + self._patience
                return answered
            except grpc.RpcError as error:
                self._give_up(error, connected, deadline)
            finally:
                channel.close()
            time.sleep(_RETRY_EVERY)

    def _give_up(self, error: grpc.RpcError, connected: bool, deadline: float) -> None:
        """Raise unless dialling again makes sense."""
        code, details = error.code(), error.details() or ""
        if code in _FINAL:
            raise LinkError(f"the relay at {self.address} {details}") from error
        if time.monotonic() > deadline:
            what = "broke and did not come back" if connected else "could not be made"
            raise LinkError(
                f"the live link to {self.address} {what}: {code.name} {details[:200]}"
            ) from error
        if connected:
            log(WARNING, "live link to %s broke (%s), dialling again", self.address, code.name)

    def _channel(self) -> grpc.Channel:
        if not self._certificate:
            return grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(root_certificates=self._certificate)
        name = ("grpc.ssl_target_name_override", SERVER_NAME)
        return grpc.secure_channel(self.address, credentials, options=[*CHANNEL_OPTIONS, name])

    def _stream(self, channel: grpc.Channel, run: Serve) -> Iterator[None]:
        """Serve one stream; yield after each answer."""
        outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        outgoing.put(self._hello)
        call: Any = channel.stream_stream(METHOD)(iter(outgoing.get, None))
        try:
            while (frame := _read(call)) is not None and frame.kind is not Kind.STOP:
                for chunk in frames.chunks(self._answer(frame, run)):
                    outgoing.put(chunk)
                yield
        finally:
            outgoing.put(None)
            call.cancel()

    def _answer(self, frame: Frame, run: Serve) -> bytes:
        """Run a request, or repeat the answer when the relay asks again."""
        message = frames.decode(frame)
        message_id = message.metadata.message_id
        if self._answered is None or self._answered[0] != message_id:
            self._answered = (message_id, frames.encode(run(message)))
        return self._answered[1]


def _read(call: Iterator[bytes]) -> Frame | None:
    try:
        return frames.read(call)
    except StopIteration:
        return None
