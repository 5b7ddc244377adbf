"""``kill -9`` on real processes of a deployment."""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.deployment.federation import Federation
from examples.simulate import free_ports
from flwr_clicooper import load_delivered
from tests.cable import Cable
from tests.deployment.test_deployment import APP, ENVIRONMENT, the_run
from tests.tasks import ConvTask, nodes, run_local
from tests.test_exactness import check, reference

pytestmark = pytest.mark.deployment
# Long enough to be killed in the middle.
CONFIG = "timeout=60.0 task.pause=0.02"


def processes(federation: Federation, *marks: str) -> list[int]:
    """The federation's processes with all marks in their environment or command."""
    wanted = [mark.encode() for mark in (federation.environment["FLWR_HOME"], *marks)]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if all(mark in text for mark in wanted):
            found.append(int(entry.name))
    return found


def kill_node(federation: Federation, index: int) -> None:
    """Kill a SuperNode and everything that it started, at once."""
    for pid in processes(federation, f"CLICOOPER_NODE={index}"):
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def notes_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, round_: int, step: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in run_dir.glob("*/metrics.jsonl"):
            for line in path.read_text().splitlines():
                note: dict[str, Any] = json.loads(line)
                if note["kind"] == "step" and (note["round"], note["step"]) >= (round_, step):
                    return
        time.sleep(0.05)
    raise TimeoutError("training did not get there")


def test_a_killed_trainer_is_replaced_and_the_result_is_the_same(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = tmp_path / "federation"
    with Federation(folder, nodes(2, 1), environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' {CONFIG}")
        wait_for_step(runs, 2, 2)
        kill_node(federation, 2)
        record = federation.wait(200)
    assert record["status"] == "finished:completed"
    notes = [json.loads(x) for x in (the_run(runs) / "metrics.jsonl").read_text().splitlines()]
    (hand_over,) = [note for note in notes if note["kind"] == "hand-over"]
    assert hand_over["after"] == 1
    assert_equal(the_run(runs), notes)


def assert_equal(run: Path, notes: list[dict[str, Any]], release: str = "interactive") -> None:
    """The steps that count, the last of each position, are those of one process."""
    last = {(n["round"], n["step"]): n for n in notes if n["kind"] == "step"}
    lines = [json.dumps(last[key]) for key in sorted(last)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    task = ConvTask()
    check(run, task, *reference(task, release, microbatches=4))


def test_without_a_standby_the_run_stops_and_resumes_to_the_same_result(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = tmp_path / "federation"
    with Federation(folder, nodes(2), environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' {CONFIG}")
        wait_for_step(runs, 2, 2)
        kill_node(federation, 2)
        assert federation.wait(200)["status"] == "finished:failed"
        first = the_run(runs)
        failed = tomllib.loads((first / "run.toml").read_text())["run"]
        assert failed["status"] == "failed"
        assert "trainer 2" in failed["error"]
        federation.supernodes.append(federation.start_supernode(2))
        federation.submit(APP, f"run-dir='{runs}' resume='{first}' {CONFIG}")
        assert federation.wait(200)["status"] == "finished:completed"
    (second,) = (path for path in runs.iterdir() if path.is_dir() and path != first)
    notes = [
        json.loads(line)
        for path in (first, second)
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert_equal(second, notes)


def test_a_killed_serverapp_leaves_a_run_that_resumes_and_no_orphans(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with Federation(tmp_path / "federation", nodes(2), environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' {CONFIG}")
        wait_for_step(runs, 2, 2)
        (relay,) = processes(federation, "flwr-serverapp")
        os.kill(relay, signal.SIGKILL)
        first = the_run(runs)
        # The clients dial for `timeout` seconds, then leave; nobody is left over.
        until(lambda: not processes(federation, "flwr-clientapp"))
        federation.submit(APP, f"run-dir='{runs}' resume='{first}' {CONFIG}")
        assert federation.wait(200)["status"] == "finished:completed"
    (second,) = (path for path in runs.iterdir() if path.is_dir() and path != first)
    assert_equal(second, notes_of(first) + notes_of(second))
    assert not list(runs.rglob("node-*")), "the state of the lost run is deleted"


def test_training_goes_on_without_its_owner_and_delivery_waits(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with Federation(tmp_path / "federation", nodes(2), environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' release='clean' {CONFIG}")
        wait_for_step(runs, 1, 2)
        kill_node(federation, 0)
        run = the_run(runs)
        until(lambda: [n for n in notes_of(run) if n["kind"] == "round" and n["round"] == 2])
        time.sleep(3)
        assert federation.newest_run()["status"] == "running"
        federation.supernodes.append(federation.start_supernode(0))
        assert federation.wait(200)["status"] == "finished:completed"
    (back,) = [note for note in notes_of(run) if note["kind"] == "owner-back"]
    assert back["was"] != back["now"]
    assert_equal(run, notes_of(run), "clean")


def test_a_link_that_is_cut_for_ten_seconds_goes_on_where_it_was(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (port,) = free_ports(1)
    cable = Cable(f"127.0.0.1:{port}")
    live = f"live-port={cable.address.rsplit(':', 1)[1]} live-listen='127.0.0.1:{port}'"
    with Federation(tmp_path / "federation", nodes(2), environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' {live} {CONFIG}")
        wait_for_step(runs, 1, 3)
        cable.cut()
        done = len(notes_of(the_run(runs)))
        time.sleep(10)
        assert len(notes_of(the_run(runs))) <= done + 1
        cable.open = True
        assert federation.wait(200)["status"] == "finished:completed"
    notes = notes_of(the_run(runs))
    assert not [note for note in notes if note["kind"] in ("retry", "hand-over")]
    assert max(note["redials"] for note in notes if note["kind"] == "round") == 3
    assert_equal(the_run(runs), notes)


@pytest.mark.slow
def test_a_supernode_that_restarts_between_messages_goes_on_from_its_files(
    tmp_path: Path,
) -> None:
    """By mailbox, with a registered key, so that it comes back as the same node."""
    runs = tmp_path / "runs"
    runs.mkdir()
    options = {"schedule": "local", "release": "clean", "num_rounds": 1, "microbatches": 1}
    config = "link='mailbox' schedule='local' release='clean' num-rounds=1 microbatches=1"
    folder = tmp_path / "federation"
    with Federation(folder, nodes(2), secure=True, environment=ENVIRONMENT) as federation:
        federation.submit(APP, f"run-dir='{runs}' timeout=120.0 {config}")
        # Once trainer 2 has trainer 1's outputs, trainer 1 waits for the round's end.
        until(lambda: len(list(runs.glob("*/state/*/activations-0-*"))) == 2, 200)
        # Not killed: Flower takes a killed node's key for in use until its heartbeat is late.
        federation.supernodes[1].terminate()
        federation.supernodes[1].wait(30)
        federation.supernodes.append(federation.start_supernode(1))
        record = federation.wait(200)
    assert record["status"] == "finished:completed"
    kinds = [note["kind"] for note in notes_of(the_run(runs))]
    assert "retry" not in kinds
    task = ConvTask()
    whole = run_local(task, 2, tmp_path / "local", seed=3, batch_size=8, **options)
    assert whole.run_dir
    theirs = load_delivered(whole.run_dir, task).state_dict()
    for name, value in load_delivered(the_run(runs), task).state_dict().items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=1e-6), name
