"""Push and pull on any Flower ``Grid``.

Flower's ``send_and_receive`` sleeps for seconds between pulls. This pulls at once, and
then every 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from flwr_clicooper.errors import ClientTimeoutError

POLL = 0.05
"""Seconds between two pulls."""


@dataclass(frozen=True)
class _Pending:
    node_id: int
    message_type: str
    deadline: float


class Arrival(NamedTuple):
    """A reply, and the node that was asked.

    Flower's own error replies do not say which node they speak for.
    """

    message_id: str
    node_id: int
    reply: Message


class Exchange:
    """Messages in flight on a grid.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    timeout : float
        Seconds to wait for each reply.
    interval : float
        Seconds between two pulls.
    names : mapping of int to str, optional
        What errors call each node.
    """

    def __init__(
        self,
        grid: Grid,
        timeout: float,
        interval: float = POLL,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.grid = grid
        self.timeout = timeout
        self.interval = interval
        self.names = names or {}
        self.wait: Callable[[float], None] = getattr(grid, "wait", time.sleep)
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, message: Message) -> str:
        """Send a message; return its ID.

        Raises
        ------
        ClientTimeoutError
            The grid did not take the message, since the node has left; or, on a grid that
            serves a message at once, serving it took too long.
        """
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        started = time.monotonic()
        ids = [i for i in self.grid.push_messages([message]) if i]
        if not ids:
            raise ClientTimeoutError(
                f"{self._name(node_id)} cannot be reached for {kind}: Flower did not take "
                "the message",
                node_id,
            )
        now = time.monotonic()
        if now - started > self.timeout:
            raise self._late(node_id, kind)
        self._pending[ids[0]] = _Pending(node_id, kind, now + self.timeout)
        return ids[0]

    def poll(self) -> list[Arrival]:
        """Return the replies that are there, without waiting."""
        if not self._pending:
            return []
        found = []
        for reply in self.grid.pull_messages(list(self._pending)):
            message_id = reply.metadata.reply_to_message_id
            pending = self._pending.pop(message_id, None)
            if pending is not None:
                found.append(Arrival(message_id, pending.node_id, reply))
        return found

    def pull(self) -> list[Arrival]:
        """Wait for at least one reply; return all that are there.

        Raises
        ------
        ClientTimeoutError
            A node did not answer in time; its late answer is not used.
        """
        while self._pending:
            if arrivals := self.poll():
                return arrivals
            now = time.monotonic()
            for pending in self._pending.values():
                if now > pending.deadline:
                    raise self._late(pending.node_id, pending.message_type)
            self.wait(self.interval)
        return []

    @property
    def waiting_for(self) -> list[int]:
        """The nodes whose replies are due."""
        return [pending.node_id for pending in self._pending.values()]

    def _late(self, node_id: int, kind: str) -> ClientTimeoutError:
        return ClientTimeoutError(
            f"{self._name(node_id)} did not answer {kind} within {self.timeout:g} s "
            "(option 'timeout')",
            node_id,
        )

    def _name(self, node_id: int) -> str:
        return self.names.get(node_id, f"node {node_id}")


def exchange(
    grid: Grid, messages: Iterable[Message], timeout: float, interval: float = POLL
) -> list[Message]:
    """Send messages and wait for all replies, in the order of the messages.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    messages : iterable of Message
        At most one per node, since Flower runs a node's messages concurrently.
    timeout : float
        Seconds to wait for each reply.
    interval : float
        Seconds between two pulls.

    Raises
    ------
    ClientTimeoutError
        A node cannot be reached or does not answer in time.
    """
    flight = Exchange(grid, timeout, interval)
    ids = [flight.push(message) for message in messages]
    replies: dict[str, Message] = {}
    while len(flight):
        for arrival in flight.pull():
            replies[arrival.message_id] = arrival.reply
    return [replies[i] for i in ids]
