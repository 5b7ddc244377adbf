"""A real SuperLink and real SuperNodes on loopback, with stock flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from examples.deployment.federation import Federation
from tests.tasks import ConvTask, nodes
from tests.test_exactness import check, reference

ROOT = Path(__file__).parents[2]
APP = ROOT / "tests" / "simulation" / "app"
ENVIRONMENT: Mapping[str, str] = {"PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.deployment


def the_run(run_dir: Path) -> Path:
    (run,) = (path for path in run_dir.iterdir() if path.is_dir())
    return run


@pytest.mark.parametrize("secure", [False, True], ids=["stock", "tls-and-node-keys"])
def test_exact_in_a_deployment(
    secure: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    federation = Federation(
        tmp_path / "federation", nodes(2), secure=secure, environment=ENVIRONMENT
    )
    with federation:
        record = federation.run(APP, f"run-dir='{runs}'")
    output = capfd.readouterr().out
    assert record["status"] == "finished:completed", output
    assert "Live links to all parties" in output
    task = ConvTask()
    check(the_run(runs), task, *reference(task, "interactive", microbatches=4))


def test_the_quickstart_trains_in_a_deployment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with Federation(tmp_path / "federation", nodes(3)) as federation:
        config = f"num-rounds=2 run-dir='{runs}'"
        record = federation.run(ROOT / "examples" / "quickstart", config)
    output = capfd.readouterr().out
    assert record["status"] == "finished:completed", output
    (line,) = [x for x in output.splitlines() if re.search(r"held-out accuracy +0", x)]
    assert float(line.split()[-1]) > 0.8
