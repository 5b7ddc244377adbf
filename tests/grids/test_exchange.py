from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_clicooper import LocalGrid
from flwr_clicooper.chain.messages import Action, instruction
from flwr_clicooper.errors import ClientTimeoutError
from flwr_clicooper.grids.exchange import Exchange, exchange

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    if context.node_config.get("raises"):
        raise ValueError("no")
    number = ConfigRecord({"node": context.node_id})
    return Message(RecordDict({"clicooper": number}), reply_to=message)


class SlowGrid(LocalGrid):
    """Gives one reply per pull, the newest first, and counts the pulls."""

    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        return list(super().pull_messages(list(message_ids)[-1:]))


def grid(nodes: int, grid_class: type[LocalGrid] = LocalGrid, **config: Any) -> LocalGrid:
    return grid_class(app, [config] * nodes, {})


def hellos(of: LocalGrid) -> list[Message]:
    return [instruction(Action.HELLO, node, {}, ttl=9.0) for node in of.get_node_ids()]


def test_replies_come_in_the_order_of_the_messages() -> None:
    slow = grid(3, SlowGrid)
    replies = exchange(slow, hellos(slow), timeout=5, interval=0.01)
    assert [r.metadata.src_node_id for r in replies] == list(slow.get_node_ids())


def test_a_reply_that_is_there_is_taken_without_sleeping() -> None:
    local = grid(2)
    started = time.perf_counter()
    exchange(local, hellos(local), timeout=5, interval=10)
    assert time.perf_counter() - started < 5


def test_nothing_to_send_is_nothing_to_wait_for() -> None:
    assert exchange(grid(1), [], timeout=5) == []
    assert Exchange(grid(1), 5).pull() == []


def test_a_node_that_does_not_answer_is_called_by_its_name() -> None:
    class Silent(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return []

    silent = grid(1, Silent)
    flight = Exchange(silent, timeout=0.05, interval=0.01, names={101: "trainer 1"})
    flight.push(hellos(silent)[0])
    with pytest.raises(
        ClientTimeoutError, match=r"trainer 1 did not answer query\.hello .*0\.05 s"
    ):
        flight.pull()


def test_local_grid_answers_as_flower_does_when_a_client_raises() -> None:
    raising = grid(1, raises=True)
    (reply,) = raising.send_and_receive(hellos(raising))
    assert reply.has_error()
    assert "ValueError: no" in reply.error.reason


def test_each_reply_is_given_once() -> None:
    local = grid(1)
    ids = list(local.push_messages(hellos(local)))
    assert len(list(local.pull_messages(ids))) == 1
    assert list(local.pull_messages(ids)) == []


def test_messages_carry_the_run_of_the_grid() -> None:
    first, second = grid(1), grid(1)
    assert first.run.run_id != second.run.run_id
    (message,) = hellos(second)
    list(second.push_messages([message]))
    assert message.metadata.run_id == second.run.run_id
