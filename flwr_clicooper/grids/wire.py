"""One TCP connection that carries frames, with TLS 1.3 where there is a certificate."""

from __future__ import annotations

import selectors
import socket
import ssl
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flwr_clicooper.errors import FrameError
from flwr_clicooper.grids import frames
from flwr_clicooper.grids.certificate import SERVER_NAME, Certificate
from flwr_clicooper.grids.frames import Buffer, Frame, Kind

GREETING_TIMEOUT = 10.0
"""Seconds for the TLS handshake and the hellos."""
BROKEN_FOR = 20.0
"""Seconds that a link may be broken while a request waits for it."""
_FAREWELL_TIMEOUT = 1.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A peer whose machine vanished is noticed after 25 seconds."""


class Wire:
    """Frames over a connected socket; one thread at a time sends or receives.

    Parameters
    ----------
    connection : socket
        Connected, with TLS done; it has `GREETING_TIMEOUT` until `greeted`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def dial(cls, address: str, certificate: str) -> Wire:
        """Connect to a relay.

        Parameters
        ----------
        address : str
            ``host:port``.
        certificate : str
            The only certificate (PEM) that is trusted; empty for no TLS.

        Raises
        ------
        OSError
            Nobody answers, or the relay has not the key to this certificate.
        """
        host, port = address.rsplit(":", 1)
        connection = socket.create_connection((host.strip("[]"), int(port)), GREETING_TIMEOUT)
        try:
            _tune(connection)
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.load_verify_locations(cadata=certificate)
                connection = context.wrap_socket(connection, server_hostname=SERVER_NAME)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @classmethod
    def answer(cls, connection: socket.socket, tls: ssl.SSLContext | None) -> Wire:
        """Take a caller's connection.

        Raises
        ------
        OSError
            The caller does not speak TLS, or has gone.
        """
        connection.settimeout(GREETING_TIMEOUT)
        try:
            _tune(connection)
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def greeted(self) -> None:
        """Wait without limit from here on: the schedule decides what comes when."""
        self._socket.settimeout(None)

    def send(self, frame: Iterable[Buffer]) -> None:
        """Send a frame.

        Raises
        ------
        OSError
            The connection broke.
        """
        for part in frame:
            self._socket.sendall(part)

    def receive(self, limit: int = frames.MAX_FRAME) -> Frame:
        """Wait for a frame of at most ``limit`` bytes.

        Raises
        ------
        FrameError
            What came is not a frame, or it is too large.
        EOFError, OSError
            The connection was closed or broke.
        """
        return frames.read(self._fill, limit)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the other side closed the connection")
            view = view[count:]

    def has_news(self) -> bool:
        """Return whether something came, or the connection was closed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return bool(selector.select(0))

    def refuse(self, error: FrameError) -> None:
        """Tell the other side why it is refused; let it read that before the end."""
        with suppress(OSError):
            self._socket.settimeout(_FAREWELL_TIMEOUT)
            self.send(frames.pack(Kind.REFUSAL, str(error).encode()))
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(2**16):  # closing with unread bytes would reset it
                pass

    def hang_up(self) -> None:
        """End the connection for whoever waits on it, in another thread too."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def listen(address: str, port: int, *, exactly: bool = False) -> socket.socket:
    """Return a socket that listens: on loopback for a loopback address, else everywhere.

    Parameters
    ----------
    exactly : bool
        Listen on the address itself, whichever it is.

    Raises
    ------
    OSError
        The port is not free.
    """
    try:
        if exactly or is_loopback(address):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return socket.create_server((address.strip("[]"), port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", port))
    except OSError as error:
        raise OSError(f"cannot listen on {address}:{port}: {error}") from error


def server_tls(certificate: Certificate) -> ssl.SSLContext:
    """Return the relay's TLS context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python loads a key from a file only: this one is owner-only and gone at once.
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(certificate.key + certificate.certificate)
        context.load_cert_chain(file.name)
    return context


def is_loopback(address: str) -> bool:
    """Return whether an address is of this machine only."""
    return address in ("localhost", "::1", "[::1]") or address.startswith("127.")


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
