"""Push and pull on any Flower ``Grid``.

Flower's ``send_and_receive`` sleeps for seconds between pulls. This pulls at once, and
then every 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


class Exchange:
    """Messages in flight on a grid.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    timeout : float
        Seconds to wait for each reply.
    poll : float
        Seconds between two pulls.
    names : mapping of int to str, optional
        What errors call each node.
    """

    def __init__(
        self,
        grid: Grid,
        timeout: float,
        poll: float = POLL,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.grid = grid
        self.timeout = timeout
        self.poll = poll
        self.names = names or {}
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, message: Message) -> str:
        """Send a message; return its ID.

        Raises
        ------
        ClientTimeoutError
            The grid did not take the message: the node has left.
        """
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        deadline = time.monotonic() + self.timeout
        ids = [i for i in self.grid.push_messages([message]) if i]
        if not ids:
            raise ClientTimeoutError(
                f"{self._name(node_id)} cannot be reached for {kind}: Flower did not take "
                "the message"
            )
        self._pending[ids[0]] = _Pending(node_id, kind, deadline)
        return ids[0]

    def pull(self) -> list[Message]:
        """Wait for at least one reply; return all that are there.

        Raises
        ------
        ClientTimeoutError
            A node did not answer in time; its late answer is not used.
        """
        while self._pending:
            replies = list(self.grid.pull_messages(list(self._pending)))
            self._refuse_late()
            for reply in replies:
                del self._pending[reply.metadata.reply_to_message_id]
            if replies:
                return replies
            time.sleep(self.poll)
        return []

    def _name(self, node_id: int) -> str:
        return self.names.get(node_id, f"node {node_id}")

    def _refuse_late(self) -> None:
        now = time.monotonic()
        for late in self._pending.values():
            if now > late.deadline:
                raise ClientTimeoutError(
                    f"{self._name(late.node_id)} did not answer {late.message_type} within "
                    f"{self.timeout:g} s (option 'timeout')"
                )


def exchange(
    grid: Grid, messages: Iterable[Message], timeout: float, poll: float = POLL
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
    poll : float
        Seconds between two pulls.

    Raises
    ------
    ClientTimeoutError
        A node cannot be reached or does not answer in time.
    """
    flight = Exchange(grid, timeout, poll)
    ids = [flight.push(message) for message in messages]
    replies: dict[str, Message] = {}
    while len(flight):
        for reply in flight.pull():
            replies[reply.metadata.reply_to_message_id] = reply
    return [replies[i] for i in ids]
