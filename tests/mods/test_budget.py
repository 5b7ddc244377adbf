"""How often the activation mod releases: never more than allowed."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, RecordDict

from flwr_clicooper.errors import CooperError, DataError, StateError
from flwr_clicooper.errors import PrivacyBudgetExceeded as Exceeded
from flwr_clicooper.mods import ActivationDPMod, activation_dp
from tests.mods.node import Node, arrays, random


@pytest.fixture
def spent() -> Iterator[Node]:
    """A node that has made both of its releases."""
    node = Node(arrays(x=random(4, 3)), ActivationDPMod(releases=2))
    node.ask()
    node.ask()
    yield node
    activation_dp._made.clear()


def test_the_release_after_the_last_is_refused(spent: Node) -> None:
    for _ in range(2):
        with pytest.raises(Exceeded, match="was released 2 times") as caught:
            spent.ask()
    assert isinstance(caught.value, CooperError)


def test_a_new_process_counts_on_from_the_state(spent: Node) -> None:
    assert dict(spent.context.state["clicooper.releases.embeddings"]) == {"every reply": 2}
    activation_dp._made.clear()
    with pytest.raises(Exceeded):
        Node(spent.content, ActivationDPMod(releases=2)).ask(spent.context)


def test_a_state_that_was_lost_is_remembered_by_the_process(spent: Node) -> None:
    spent.context.state = RecordDict()
    with pytest.raises(Exceeded):
        spent.ask()


def test_another_run_has_a_budget_of_its_own(spent: Node) -> None:
    spent.ask(spent.another_context())


def test_other_records_have_a_budget_of_their_own(spent: Node) -> None:
    content = RecordDict({"features": ArrayRecord([random(2, 2)])})
    Node(content, ActivationDPMod(record="features")).ask(spent.context)


def test_a_reply_that_is_refused_is_no_release() -> None:
    node = Node(arrays(x=np.float32([math.nan])), ActivationDPMod())
    with pytest.raises(DataError):
        node.ask()
    node.content = arrays(x=random(1))
    node.ask()


def test_replies_at_once_do_not_pass_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the state of before, as Flower gives it to messages in flight together."""

    class Slow(Counter[str]):
        def __or__(self, other: Any) -> Any:
            try:
                return super().__or__(other)
            finally:
                time.sleep(0.01)  # between reading a count and writing it

    monkeypatch.setattr(activation_dp, "Counter", Slow)
    node = Node(arrays(x=random(50, 50)), ActivationDPMod(releases=3))

    def ask(_: int) -> bool:
        context = Context(node.context.run_id, node.context.node_id, {}, RecordDict(), {})
        try:
            return bool(node.ask(context))
        except Exceeded:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(16))) == 3


def test_a_ledger_counts_over_processes_and_runs(tmp_path: Path) -> None:
    def new_process() -> Node:
        activation_dp._made.clear()
        mod = ActivationDPMod(releases=2, ledger=tmp_path / "ledger.json")
        return Node(arrays(x=random(4, 3)), mod)

    for _ in range(2):
        new_process().ask()  # each with a context of its own
    with pytest.raises(Exceeded):
        new_process().ask()
    content = RecordDict({"features": ArrayRecord([random(2, 2)])})
    mod = ActivationDPMod(record="features", ledger=tmp_path / "ledger.json")
    Node(content, mod).ask()
    with pytest.raises(Exceeded):
        new_process().ask()


def test_a_ledger_holds_between_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.mods.test_budget import *\n"
        "mod = ActivationDPMod(releases=30, ledger=sys.argv[1])\n"
        "node = Node(arrays(x=random(4, 3)), mod)\n"
        "for _ in range(20):\n"
        "    try: node.ask(node.another_context()); print('released')\n"
        "    except Exceeded: pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ledger.json")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    released = sum(process.communicate()[0].count(b"released") for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert released == 30


@pytest.mark.parametrize("text", ["", "{", "no ledger"])
def test_a_damaged_ledger_lets_nothing_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(StateError, match="is damaged"):
        Node(arrays(x=random(4, 3)), ActivationDPMod(ledger=tmp_path / "ledger.json")).ask()


def test_a_ledger_that_cannot_be_written_lets_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Node(arrays(x=random(4, 3)), ActivationDPMod(ledger=tmp_path / "none" / "x")).ask()


def test_groups_of_records_are_counted_each_on_its_own() -> None:
    mod = ActivationDPMod(releases=2, count_by=lambda m: m.content["config"]["batch"])
    node = Node(arrays(x=random(4, 3)), mod)
    for batch in (0, 1, 0, 1, 2):
        node.ask(batch=batch)
    for batch in (0, 1):
        with pytest.raises(Exceeded, match=f"group '{batch}'"):
            node.ask(batch=batch)
    activation_dp._made.clear()
    with pytest.raises(Exceeded):
        node.ask(batch=1)
    node.ask(batch=2)


def test_a_request_that_names_no_group_is_not_answered() -> None:
    mod = ActivationDPMod(count_by=lambda m: m.content["config"]["batch"])
    with pytest.raises(KeyError, match="batch"):
        Node(arrays(x=random(4, 3)), mod).ask()
