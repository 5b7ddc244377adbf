"""``kill -9`` on real processes of a deployment."""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from examples.federation import Federation
from tests.deployment.test_deployment import APP, ENVIRONMENT, the_run
from tests.tasks import ConvTask, nodes
from tests.test_exactness import check, reference

pytestmark = pytest.mark.deployment
# Long enough to be killed in the middle, short enough to notice a dead node soon.
CONFIG = "timeout=15.0 task.pause=0.02"


def kill_node(federation: Federation, index: int) -> None:
    """Kill a SuperNode and everything that it started, at once."""
    marker = f"CLICOOPER_NODE={index}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = marker in entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if found and str(federation.folder).encode() in entry.read_bytes():
            os.kill(int(entry.parent.name), signal.SIGKILL)


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


def assert_equal(run: Path, notes: list[dict[str, Any]]) -> None:
    """The steps that count, the last of each position, are those of one process."""
    last = {(n["round"], n["step"]): n for n in notes if n["kind"] == "step"}
    lines = [json.dumps(last[key]) for key in sorted(last)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    task = ConvTask()
    check(run, task, *reference(task, "interactive", microbatches=4))


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
