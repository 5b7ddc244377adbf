"""The client's end of a live link: dial, then serve frames until told to stop."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from logging import WARNING

from flwr.app import Message
from flwr.common.logger import log

from flwr_clicooper.errors import LinkError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.frames import Buffer, Frame, Kind
from flwr_clicooper.grids.wire import BROKEN_FOR, Wire

_RETRY_EVERY = 0.5

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
        Seconds to keep dialling after the link broke; a little longer than the relay waits.
    first_patience : float
        Seconds to keep dialling at the beginning.
    """

    def __init__(
        self,
        invitation: dict[str, str],
        node_id: int,
        patience: float = BROKEN_FOR + 10.0,
        first_patience: float = 5.0,
    ) -> None:
        self.address = invitation["address"]
        self._certificate = invitation["certificate"]
        said = {"node": node_id, "token": invitation["token"]}
        self._hello = frames.pack(Kind.HELLO, json.dumps(said).encode())
        self._patience = patience
        self._first_patience = first_patience
        self._answered: tuple[str, list[Buffer]] | None = None

    def serve(self, run: Serve) -> int:
        """Serve requests until the relay says stop; return how many were answered.

        Raises
        ------
        LinkError
            The relay is not there or is not the invited one, it refuses this client, or
            the link stayed broken for too long.
        """
        answered, was_open = 0, False
        deadline = time.monotonic() + self._first_patience
        while True:
            try:
                with closing(self._greet()) as wire:
                    was_open = True
                    try:
                        for _ in self._requests(wire, run):
                            answered += 1
                        return answered
                    finally:
                        deadline = time.monotonic() + self._patience
            except ssl.SSLCertVerificationError as error:
                raise LinkError(
                    f"the live link to {self.address} could not be made: the relay there "
                    "does not have the certificate of the invitation"
                ) from error
            except (OSError, EOFError) as error:
                self._give_up(error, was_open, deadline)
            time.sleep(_RETRY_EVERY)

    def _greet(self) -> Wire:
        """Dial, and show the token."""
        wire = Wire.dial(self.address, self._certificate)
        try:
            wire.send(self._hello)
            self._checked(wire.receive())
            wire.greeted()
        except BaseException:
            wire.close()
            raise
        return wire

    def _requests(self, wire: Wire, run: Serve) -> Iterator[None]:
        """Serve one connection until the relay says stop; yield after each answer."""
        while (frame := self._checked(wire.receive())).kind is not Kind.STOP:
            wire.send(self._answer(frame, run))
            yield

    def _checked(self, frame: Frame) -> Frame:
        if frame.kind is Kind.REFUSAL:
            reason = bytes(frame.header[:500]).decode(errors="replace")
            raise LinkError(f"the relay at {self.address} refused: {reason}")
        return frame

    def _give_up(self, error: Exception, was_open: bool, deadline: float) -> None:
        """Raise unless dialling again makes sense."""
        reason = f"{type(error).__name__}: {error}"[:200]
        if time.monotonic() > deadline:
            what = "broke and did not come back" if was_open else "could not be made"
            raise LinkError(f"the live link to {self.address} {what}: {reason}") from error
        if was_open:
            log(WARNING, "live link to %s broke (%s), dialling again", self.address, reason)

    def _answer(self, frame: Frame, run: Serve) -> list[Buffer]:
        """Run a request, or repeat the answer when the relay asks again."""
        message = frames.decode(frame)
        message_id = message.metadata.message_id
        if self._answered is None or self._answered[0] != message_id:
            self._answered = None  # its tensors may be large
            self._answered = (message_id, frames.encode(run(message)))
        return self._answered[1]
