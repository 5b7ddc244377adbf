"""A grid that calls the ClientApp in this process, for tests and notebooks."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Runs every node's ClientApp in this process, one message at a time.

    Parameters
    ----------
    app : ClientApp
        What every node runs, with its mods.
    node_configs : sequence of mapping
        One per node, such as ``{"role": "trainer", "stage": 1}``.
    run_config : mapping
        The run config that every node sees.

    Examples
    --------
    >>> from flwr_clicooper import CooperStrategy, LocalGrid
    >>> grid = LocalGrid(app, [{"role": "owner"}, {"role": "trainer", "stage": 1}], config)
    ... # doctest: +SKIP
    >>> CooperStrategy.from_config(config).start(grid)  # doctest: +SKIP
    """

    warm = True
    """All messages of a node are served by one process."""
    complete = True
    """No node will join later."""

    def __init__(
        self,
        app: ClientApp,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any],
    ) -> None:
        self.app = app
        self._run = Run.create_empty(secrets.randbelow(2**62) + 1)
        if TaskIdentity._run_id is None:  # outside Flower, Message() needs an identity
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.contexts = {
            node_id: Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=dict(node_config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node_id, node_config in enumerate(node_configs, start=101)
        }
        self._replies: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

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
        """Return the IDs of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run each message on its node at once; return the message IDs."""
        ids = []
        for message in messages:
            message_id = self._stamp(message)
            self._replies[message_id] = self._serve(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _stamp(self, message: Message) -> str:
        """Give a message its ID and the run's, as Flower's grids do; return the ID."""
        self._count += 1
        message_id = f"local-{self._count}"
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_run_id"] = self._run.run_id
        return message_id

    def _serve(self, message: Message) -> Message:
        """Run the ClientApp as a Flower node does: an exception becomes an error reply."""
        try:
            context = self.contexts[message.metadata.dst_node_id]
            return self.app(message=message, context=context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=reason), reply_to=message)
