"""Step time, messages and bytes per step of the quickstart's chain.

The same model and the same batches in one process, over a LocalGrid, and in a Flower
simulation (mailbox and live links), 3 trainers, without sealing, one after the other on the
same machine; the first 60 steps are left out, as in `throughput.py`.

    python benchmarks/chain.py [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "quickstart")]

from quickstart.task import FashionTask  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from benchmarks.one_process import step_seconds  # noqa: E402
from examples.simulate import simulate  # noqa: E402
from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client  # noqa: E402

BATCH, TRAINERS, ROUNDS, WARM_UP = 256, 3, 3, 60


class Few(FashionTask):
    """The quickstart's task on as many records as the steps need."""

    records = 0

    def datasets(self, config: Any) -> Any:
        train, test = super().datasets(config)
        return type(train)(*(t[: self.records] for t in train.tensors)), test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="per round of three, at most 46")
    steps = min(parser.parse_args().steps, 46)
    Few.records = steps * BATCH
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = []
    for release in ("clean", "interactive"):
        rows.append(one_process(release))
        for microbatches in (1, 4):
            rows.append(local(release, microbatches))
        rows += [simulation(release, link) for link in ("mailbox", "live")]
    show(rows)
    path = save(
        "chain",
        {
            "seed": 0,
            "steps": steps * ROUNDS,
            "warm-up": WARM_UP,
            "batch-size": BATCH,
            "rows": rows,
        },
    )
    print(f"raw output: {path.relative_to(ROOT)}")


def one_process(release: str) -> dict[str, Any]:
    config = {"release": release, "batch-size": BATCH, "num-rounds": ROUNDS}
    config["learning-rate"] = 0.1
    return row("one process", release, 1, step_seconds(Few(), config), 0, 0)


def local(release: str, microbatches: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as run_dir:
        config: dict[str, Any] = {
            "release": release,
            "batch-size": BATCH,
            "microbatches": microbatches,
            "num-rounds": ROUNDS,
            "learning-rate": 0.1,
            "run-dir": run_dir,
            "seal": False,
            "attest": False,
            "watermark": False,
        }
        nodes: list[dict[str, Any]] = [{"role": "owner"}]
        nodes += [{"role": "trainer", "stage": i + 1} for i in range(TRAINERS)]
        grid = LocalGrid(cooper_client(Few()), nodes, config)
        CooperStrategy.from_config(config).start(grid)
        return measured("LocalGrid", release, microbatches, Path(run_dir))


def simulation(release: str, link: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as run_dir:
        config = f"release='{release}' link='{link}' num-rounds={ROUNDS} run-dir='{run_dir}' "
        config += "seal=false attest=false watermark=false"
        run = simulate(ROOT / "examples" / "quickstart", TRAINERS + 1, config)
        if run["status"] != "finished:completed":
            raise RuntimeError(f"the simulation ended as {run['status']}")
        return measured(f"simulation, {link}", release, 1, Path(run_dir))


def measured(where: str, release: str, microbatches: int, run_dir: Path) -> dict[str, Any]:
    (run,) = run_dir.iterdir()
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    messages = statistics.median(line["messages"] for line in steps)
    nbytes = statistics.median(line["bytes"] for line in steps)
    times = [line["seconds"] for line in steps]
    return row(where, release, microbatches, times, messages, nbytes)


def row(
    where: str,
    release: str,
    microbatches: int,
    times: list[float],
    messages: float,
    nbytes: float,
) -> dict[str, Any]:
    kept = times[WARM_UP:]
    return {
        "where": where,
        "release": release,
        "microbatches": microbatches,
        "step-seconds-median": statistics.median(kept),
        "step-seconds-min": min(kept),
        "step-seconds-max": max(kept),
        "messages-per-step": messages,
        "bytes-per-step": nbytes,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Quickstart CNN, batch {BATCH}, {TRAINERS} trainers")
    for name in ("", "release", "micro-\nbatches", "step, ms\n(median)", "min", "max"):
        table.add_column(name, justify="right" if "m" in name else "left")
    for name in ("x one\nprocess", "messages\nper step", "MB per\nstep"):
        table.add_column(name, justify="right")
    base = {
        r["release"]: r["step-seconds-median"] for r in rows if r["where"] == "one process"
    }
    for each in rows:
        ms = [each[f"step-seconds-{k}"] * 1000 for k in ("median", "min", "max")]
        table.add_row(
            each["where"],
            each["release"],
            str(each["microbatches"]),
            *(f"{value:.1f}" for value in ms),
            f"{each['step-seconds-median'] / base[each['release']]:.2f}",
            f"{each['messages-per-step']:.0f}",
            f"{each['bytes-per-step'] / 1e6:.2f}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


if __name__ == "__main__":
    main()
