"""Who is in the federation, and whether they form a chain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from flwr_clicooper.chain.messages import PROTOCOL, Action, Header, instruction
from flwr_clicooper.chain.relay import check_answer
from flwr_clicooper.chain.roles import OWNER, STANDBY
from flwr_clicooper.errors import ClientTimeoutError, CooperError, RoleError
from flwr_clicooper.grids.exchange import Exchange

_POLL = 0.05
_REMIND = 10.0
_GRACE = 5.0
"""Seconds that a whole chain waits for others to say who they are."""


@dataclass
class Roster:
    """The parties by role.

    Attributes
    ----------
    owner : int
        Node ID, 0 while unknown.
    trainers : dict of int to int
        Node ID by stage.
    standbys : list of int
        Node IDs of trainers without a stage.
    needed : int
        How many trainers the owner's model needs, 0 while unknown.
    """

    owner: int = 0
    trainers: dict[int, int] = field(default_factory=dict)
    standbys: list[int] = field(default_factory=list)
    needed: int = 0
    known: set[int] = field(default_factory=set)
    simulated: int = 0

    def add(self, node_id: int, header: Header) -> None:
        """Note what a node said of itself.

        Raises
        ------
        RoleError
            It speaks another protocol, or its place is taken.
        """
        self.known.add(node_id)
        if header.get("protocol", int) != PROTOCOL:
            raise RoleError(
                f"node {node_id} speaks protocol {header.get('protocol', int)}, the relay "
                f"{PROTOCOL}: install the same version of flwr-clicooper on both"
            )
        role, stage = header.get("role", str), header.get("stage", int)
        self.simulated = header.get("simulated", int)
        if role == OWNER:
            if self.owner:
                raise RoleError(
                    f"nodes {self.owner} and {node_id} are both owner; a chain has one owner"
                )
            self.owner, self.needed = node_id, header.get("trainers", int)
        elif role == STANDBY:
            self.standbys.append(node_id)
        elif stage in self.trainers:
            raise RoleError(
                f"nodes {self.trainers[stage]} and {node_id} are both trainer of stage "
                f"{stage}; leave 'stage' out to make one of them a standby"
            )
        else:
            self.trainers[stage] = node_id

    def missing(self) -> list[str]:
        """Return who is needed and not there."""
        if not self.owner:
            return ['an owner (role="owner")']
        absent = [s for s in range(1, self.needed + 1) if s not in self.trainers]
        return [f'a trainer of stage {s} (role="trainer" stage={s})' for s in absent]

    def settle(self) -> None:
        """Make simulated nodes beyond the chain standbys; refuse others.

        Raises
        ------
        RoleError
            A trainer's stage is beyond the model's segments.
        """
        for stage in [s for s in self.trainers if s > self.needed]:
            if not self.simulated:
                raise RoleError(
                    f"node {self.trainers[stage]} is trainer of stage {stage}; the owner's "
                    f"model has segments for {self.needed} trainers"
                )
            self.standbys.append(self.trainers.pop(stage))

    def promote(self, lost: int) -> int:
        """Give the stage of a lost trainer to a standby; return the standby, or 0."""
        for stage, trainer in self.trainers.items():
            if trainer == lost and self.standbys:
                self.trainers[stage] = self.standbys.pop(0)
                return self.trainers[stage]
        return 0

    def names(self) -> dict[int, str]:
        """Return what people call the parties of the chain, the owner first."""
        chain = [self.owner, *(self.trainers[stage] for stage in sorted(self.trainers))]
        return {node_id: self.name(node_id) for node_id in chain}

    def name(self, node_id: int) -> str:
        """Return how people call a node."""
        if node_id == self.owner:
            return f"owner (node {node_id})"
        for stage, trainer in self.trainers.items():
            if trainer == node_id:
                return f"trainer {stage} (node {node_id})"
        return f"node {node_id}"


def discover(grid: Grid, timeout: float, say: Callable[[str], None]) -> Roster:
    """Ask every node who it is until the chain is whole.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    timeout : float
        Seconds to wait for nodes that are missing.
    say : callable
        Gets a sentence now and then on who is missing.

    Raises
    ------
    RoleError
        Nodes are missing, doubled, or do not fit the owner's model.
    """
    roster, flight = Roster(), Exchange(grid, timeout)
    asked: set[int] = set()
    started = reminded = whole = time.monotonic()
    while True:
        for node_id in set(grid.get_node_ids()) - asked:
            asked.add(node_id)
            flight.push(instruction(Action.HELLO, node_id, {}, ttl=timeout))
        for _, node_id, reply in flight.poll():
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                say(f"node {node_id} has left the federation")
                continue
            roster.add(node_id, check_answer(reply, f"node {node_id}"))
        now, missing = time.monotonic(), roster.missing()
        if missing:
            whole = now
            everybody = getattr(grid, "complete", False) or (
                roster.simulated and len(roster.known) >= roster.simulated
            )
            if (everybody and not len(flight)) or now - started > timeout:
                raise RoleError(
                    _incomplete(roster, missing, flight.waiting_for, now - started)
                )
        elif not len(flight) or now - whole > _GRACE:
            roster.settle()
            return roster
        if now - reminded > _REMIND:
            reminded = now
            mute = f"; no answer yet from {_nodes(flight.waiting_for)}" if len(flight) else ""
            say(f"waiting for {', '.join(missing) or 'standbys'}{mute}")
        time.sleep(_POLL)


def find_owner(grid: Grid, roster: Roster, timeout: float) -> int:
    """Return the node that is the owner now; wait for one if there is none.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    roster : Roster
        Its owner is asked again and again, and everyone who joined since is asked too.
    timeout : float
        Seconds to wait.

    Raises
    ------
    ClientTimeoutError
        No owner came in time.
    """
    owner, flight = roster.owner, Exchange(grid, timeout)
    asked = roster.known - {owner}
    started = time.monotonic()
    ask_again = remind = started
    while (now := time.monotonic()) - started < timeout:
        if now >= ask_again:
            ask_again = now + _REMIND
            asked.discard(owner)
        here = set(grid.get_node_ids())
        for node_id in here - asked:
            asked.add(node_id)
            flight.push(instruction(Action.HELLO, node_id, {}, ttl=timeout))
        for _, node_id, reply in flight.poll():
            try:
                if check_answer(reply, f"node {node_id}").get("role", str) == OWNER:
                    return node_id
            except CooperError as error:
                log(WARNING, "%s", error)
        if now >= remind + _REMIND:
            remind = now
            log(INFO, "waiting for the owner (node %d) to take delivery", owner)
        time.sleep(_POLL)
    raise ClientTimeoutError(
        f"no owner came within {timeout:g} s to take delivery (option 'owner-timeout')", owner
    )


def _nodes(node_ids: list[int]) -> str:
    return ", ".join(f"node {n}" for n in node_ids)


def _incomplete(roster: Roster, missing: list[str], mute: list[int], waited: float) -> str:
    text = f"the chain is not whole: {', '.join(missing)} is missing after {waited:.0f} s"
    if mute:
        text += f"; {_nodes(mute)} did not answer"
    if roster.needed:
        have = ", ".join(map(str, sorted(roster.trainers))) or "none"
        text += f"; the owner's model needs {roster.needed} trainers, stages here: {have}"
    if roster.simulated:
        needed = f"{roster.needed + 1}" if roster.needed else "one owner and all trainers"
        text += f". Set num-supernodes = {needed} (now {roster.simulated})"
    return text
