"""Live links for a chain: invite everybody, or go on by mailbox."""

from __future__ import annotations

import time
from collections.abc import Mapping
from logging import INFO, WARNING

from flwr.common.logger import log
from flwr.serverapp import Grid

from flwr_clicooper.chain.messages import Action, instruction
from flwr_clicooper.chain.relay import check_answer
from flwr_clicooper.errors import CooperError
from flwr_clicooper.grids.live import LiveGrid
from flwr_clicooper.options import Options

PATIENCE = 30.0
"""Seconds without a new link after which the run goes on by mailbox."""
_LIFETIME = 30 * 86400.0
"""Seconds that an invitation is good for: the longest run over live links."""


def link_up(grid: Grid, options: Options, names: Mapping[int, str]) -> LiveGrid | None:
    """Return a grid of live links to all nodes, or None to go on by mailbox.

    Parameters
    ----------
    grid : Grid
        Flower's own grid. A grid that is warm already, as `LocalGrid`, needs no links.
    options : Options
        ``link`` and where to listen.
    names : mapping of int to str
        The nodes of the chain and what people call them.
    """
    if options.link == "mailbox" or getattr(grid, "warm", False):
        return None
    try:
        live = LiveGrid(
            grid,
            options.live_address,
            options.live_port,
            listen_on=options.live_listen,
            insecure=options.live_insecure,
        )
    except OSError as error:
        log(WARNING, "no live links (%s); going on by mailbox", error)
        return None
    try:
        reason = _invite(live, grid, names)
    except BaseException:
        live.close()
        raise
    if not reason:
        how = "not encrypted" if options.live_insecure else "TLS"
        log(INFO, "Live links to all parties at %s:%d (%s)", live.address, live.port, how)
        return live
    log(WARNING, "no live links (%s); going on by mailbox", reason)
    live.close()
    return None


def _invite(live: LiveGrid, grid: Grid, names: Mapping[int, str]) -> str:
    """Invite all nodes and wait for their links; return why it failed, or nothing."""
    for node_id in names:
        fields = live.invite(node_id)
        message = instruction(Action.LIVE, node_id, fields, ttl=_LIFETIME)
        (message_id,) = grid.push_messages([message]) or [""]
        live.expect(node_id, message_id)
    linked: set[int] = set()
    last = time.monotonic()
    while linked != set(names):
        live.wait(0.05)
        for node_id, reply in live.ended().items():
            try:
                check_answer(reply, names[node_id])
            except CooperError as error:
                return str(error)
        found = live.linked()
        if found != linked:
            linked, last = found, time.monotonic()
        elif time.monotonic() - last > PATIENCE:
            absent = ", ".join(names[n] for n in names if n not in linked)
            return f"{absent} did not dial within {PATIENCE:.0f} s"
    return ""
