"""After a failure: whether to try again, with whom, or to end the run."""

from __future__ import annotations

from logging import WARNING

from flwr.common.logger import log
from flwr.serverapp import Grid

from flwr_clicooper.chain.messages import Action, instruction
from flwr_clicooper.chain.relay import check_answer
from flwr_clicooper.chain.roster import Roster
from flwr_clicooper.chain.rundir import RunFolder
from flwr_clicooper.errors import ClientError, ClientTimeoutError
from flwr_clicooper.grids.exchange import exchange

_SIGN_OF_LIFE = 20.0
"""Seconds in which a node that failed must answer by mailbox to be tried again."""


class Recovery:
    """Decides how a run goes on from its last closed round.

    A party that failed and still answers is tried once more in the same round. A party
    that failed again, is gone or hangs is replaced by a standby. A message that a party
    refused would be refused again, so it ends the run.

    Parameters
    ----------
    grid : Grid
        Flower's own grid.
    roster : Roster
        Who is who; a hand-over changes it.
    folder : RunFolder
        Where retries and hand-overs are noted.
    """

    def __init__(self, grid: Grid, roster: Roster, folder: RunFolder) -> None:
        self.grid = grid
        self.roster = roster
        self.folder = folder
        self._retried: set[tuple[int, int]] = set()

    def goes_on(self, error: ClientError, closed: int) -> bool:
        """Return whether the run can go on after round ``closed``.

        Parameters
        ----------
        error : ClientError
            What ended the last attempt.
        closed : int
            The last closed round, 0 for none.
        """
        if not error.node_id or error.refused:
            return False
        lost = error.node_id
        log(WARNING, "%s", error)
        if (lost, closed) not in self._retried and self._answers(error):
            self._retried.add((lost, closed))
            name = self.roster.name(lost)
            log(WARNING, "%s still answers; trying again after round %d", name, closed)
            self.folder.note("retry", node=lost, after=closed, reason=str(error))
            return True
        standby = self.roster.promote(lost)
        if standby:
            log(WARNING, "node %d takes over from node %d", standby, lost)
            self.folder.note("hand-over", lost=lost, standby=standby, after=closed)
        return bool(standby)

    def _answers(self, error: ClientError) -> bool:
        """Return whether the node of an error answers; one that hangs does not count."""
        node_id = error.node_id
        if isinstance(error, ClientTimeoutError) or node_id not in self.grid.get_node_ids():
            return False
        message = instruction(Action.HELLO, node_id, {}, ttl=_SIGN_OF_LIFE)
        try:
            (reply,) = exchange(self.grid, [message], _SIGN_OF_LIFE)
            check_answer(reply, self.roster.name(node_id))
        except ClientError:
            return False
        return True
