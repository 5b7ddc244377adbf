"""The relay's side of a conversation: versions, errors, and who was sent how much.

The relay passes tensors on without decoding them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flwr_clicooper.chain.messages import Action, Header, instruction, payload_bytes
from flwr_clicooper.errors import ClientError, ClientTimeoutError
from flwr_clicooper.grids.exchange import Exchange

Records = Mapping[str, ArrayRecord]


@dataclass
class Traffic:
    """What a run sent and computed so far.

    Attributes
    ----------
    messages : int
        Requests; each has one reply.
    link_bytes : Counter of str
        Tensor bytes by link, such as ``"owner -> trainer 1"``.
    compute : dict of str to float
        Seconds inside a party's handlers, by party.
    asked : dict of str to float
        Seconds from a request to its reply, by party: computing and travelling.
    """

    messages: int = 0
    link_bytes: Counter[str] = field(default_factory=Counter)
    compute: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    asked: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total_bytes(self) -> int:
        """Tensor bytes over all links."""
        return sum(self.link_bytes.values())


class Relay:
    """Talks to the parties of a chain, one message per node at a time.

    Parameters
    ----------
    grid : Grid
        Any Flower grid. ``grid.warm`` says that each node stays in one process.
    names : mapping of int to str
        What people call each node.
    timeout : float
        Seconds to wait for a reply.
    """

    def __init__(self, grid: Grid, names: Mapping[int, str], timeout: float) -> None:
        self.exchange = Exchange(grid, timeout, names=names)
        self.names = names
        self.persist = not getattr(grid, "warm", False)
        self.traffic = Traffic()
        self.busy: set[int] = set()
        self._sent_at: dict[int, float] = {}
        self._versions: Counter[int] = Counter()

    def send(
        self,
        node_id: int,
        action: Action,
        fields: Mapping[str, Any],
        records: Records | None = None,
        *,
        persist: bool | None = None,
    ) -> str:
        """Send an instruction; return its message ID."""
        header = {
            **fields,
            "version": self._versions[node_id],
            "persist": self.persist if persist is None else persist,
        }
        # The TTL outlives our own timeout, so that a late node is named by us.
        ttl = self.exchange.timeout + 60.0
        message = instruction(action, node_id, header, records, ttl=ttl)
        self.busy.add(node_id)
        self._sent_at[node_id] = time.monotonic()
        self.traffic.messages += 1
        return self.exchange.push(message)

    def receive(self) -> list[tuple[str, Header, Records]]:
        """Return the replies that have come: message ID, header and records.

        Raises
        ------
        ClientError
            A client answered with an error.
        ClientTimeoutError
            A client did not answer in time.
        """
        found: list[tuple[str, Header, Records]] = []
        for message_id, node_id, reply in self.exchange.pull():
            self.busy.discard(node_id)
            header = check_answer(reply, self.names[node_id], node_id)
            self._versions[node_id] = header.optional("version", self._versions[node_id])
            party = short(self.names[node_id])
            self.traffic.compute[party] += header.optional("seconds", 0.0)
            self.traffic.asked[party] += time.monotonic() - self._sent_at[node_id]
            records = dict(reply.content.array_records)
            found.append((message_id, header, records))
        return found

    def ask(
        self,
        node_id: int,
        action: Action,
        fields: Mapping[str, Any],
        records: Records | None = None,
        *,
        persist: bool | None = None,
    ) -> tuple[Header, Records]:
        """Send one instruction and wait for its reply."""
        self.send(node_id, action, fields, records, persist=persist)
        ((_, header, reply),) = self.receive()
        return header, reply

    def ask_all(
        self, node_ids: list[int], action: Action, fields: Mapping[str, Any]
    ) -> dict[int, tuple[Header, Records]]:
        """Send the same instruction to several nodes at once; return the replies by node."""
        return self.ask_each(action, dict.fromkeys(node_ids, fields))

    def ask_each(
        self, action: Action, fields: Mapping[int, Mapping[str, Any]]
    ) -> dict[int, tuple[Header, Records]]:
        """Send each node its own instruction, all at once; return the replies by node."""
        sent = {self.send(n, action, own, persist=True): n for n, own in fields.items()}
        found: dict[int, tuple[Header, Records]] = {}
        while len(found) < len(sent):
            for message_id, header, records in self.receive():
                found[sent[message_id]] = (header, records)
        return found

    def drain(self, seconds: float) -> None:
        """Wait for replies that are still due, and drop them, errors and all."""
        deadline = time.monotonic() + seconds
        while len(self.exchange) and time.monotonic() < deadline:
            if not self.exchange.poll():
                self.exchange.wait(self.exchange.interval)

    def count(self, giver: int, taker: int, record: ArrayRecord) -> None:
        """Note that a record went from one party to another."""
        link = f"{short(self.names[giver])} -> {short(self.names[taker])}"
        self.traffic.link_bytes[link] += payload_bytes(record)


def check_answer(reply: Message, name: str, node_id: int = 0) -> Header:
    """Return the header of a reply.

    Raises
    ------
    ClientError
        The reply is an error of the client or of Flower; the text names the client.
    """
    action = reply.metadata.message_type
    if reply.has_error():
        reason = (reply.error.reason or f"Flower error {reply.error.code}").strip()
        gone = reply.error.code == ErrorCode.NODE_UNAVAILABLE
        kind = ClientTimeoutError if gone else ClientError
        raise kind(f"{name} failed at {action}: {reason}", node_id)
    header = Header.of(reply, name)
    if "error" in header:
        text = f"{name} failed at {action}: {header.get('error', str)}"
        raise ClientError(text, node_id, refused=header.optional("refused", False))
    return header


def required(records: Records, name: str, who: str) -> ArrayRecord:
    """Return a record of a reply.

    Raises
    ------
    ClientError
        The reply does not have it.
    """
    if name not in records:
        raise ClientError(f"{who} answered without {name}: a mod or another version?")
    return records[name]


def short(name: str) -> str:
    """Return what a party is called without its node ID."""
    return name.split(" (", maxsplit=1)[0]
