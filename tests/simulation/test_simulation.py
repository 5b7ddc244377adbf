"""The chain in a real Flower simulation, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from tests.tasks import ConvTask
from tests.test_exactness import check, reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.simulation


def simulate(
    run_dir: Path, nodes: int, actors: int, config: str, app: str = "tests/simulation/app"
) -> tuple[subprocess.CompletedProcess[str], Path]:
    command = [sys.executable, "examples/simulate.py", app, "--nodes", str(nodes)]
    command += ["--cpus", "1", "--actors", str(actors)]
    command += ["-c", f"run-dir='{run_dir}' {config}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    (run,) = (path for path in run_dir.iterdir() if path.is_dir())
    return done, run


def test_exact_with_two_actors_and_nodes_that_move_between_them(tmp_path: Path) -> None:
    done, run = simulate(tmp_path, nodes=3, actors=2, config="link='mailbox'")
    assert done.returncode == 0, done.stdout + done.stderr
    processes = defaultdict(set)
    for line in (tmp_path / "processes").read_text().splitlines():
        node, pid = line.split()
        processes[node].add(pid)
    assert any(len(pids) > 1 for pids in processes.values())
    task = ConvTask()
    losses, weights = reference(task, "interactive", microbatches=4)
    check(run, task, losses, weights)


def test_exact_over_live_links(tmp_path: Path) -> None:
    done, run = simulate(tmp_path, nodes=3, actors=3, config="link='live'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Live links to all parties at 127.0.0.1" in done.stdout
    task = ConvTask()
    check(run, task, *reference(task, "interactive", microbatches=4))


def test_too_few_actors_for_live_links_go_on_by_mailbox(tmp_path: Path) -> None:
    config = "link='live' release='clean' num-rounds=1 microbatches=1 batch-size=32"
    done, _ = simulate(tmp_path, nodes=3, actors=1, config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("going on by mailbox") == 1
    assert "did not dial within" in done.stdout


def test_the_quickstart_learns_and_equals_one_process(tmp_path: Path) -> None:
    config = "num-rounds=1 watermark=false"  # a watermark changes weights
    done, run = simulate(tmp_path, 4, 4, config, app="examples/quickstart")
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import sys, tomllib; sys.path[:0] = ['.', 'examples/quickstart']\n"
        "from quickstart.task import FashionTask\n"
        "from examples.unsplit import train_task_unsplit\n"
        "config = tomllib.load(open(sys.argv[1], 'rb'))['options']\n"
        "print(train_task_unsplit(FashionTask(), config)[2])"
    )
    command = [sys.executable, "-c", code, str(run / "run.toml")]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["accuracy"] > 0.6
    apart = round(abs(line["accuracy"] - float(alone.stdout)), 9)  # of 2,000 records
    assert apart <= 0.005


def test_a_run_that_fails_says_so_and_leaves_no_process_behind(tmp_path: Path) -> None:
    before = flower_processes()
    done, run = simulate(tmp_path, nodes=3, actors=3, config="task.fail='yes'")
    assert done.returncode == 1
    assert "The run failed" in done.stderr
    record = tomllib.loads((run / "run.toml").read_text())["run"]
    assert record["status"] == "failed"
    assert "owner" in record["error"]
    assert "RuntimeError at client_app.py" in record["error"]
    assert flower_processes() <= before


def flower_processes() -> set[str]:
    """The pid of every process of Flower or Ray on this machine, zombies left out."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if any(name in arguments for name in (b"flower-", b"flwr-", b"raylet", b"gcs_server")):
            found.add(folder.name)
    return found
