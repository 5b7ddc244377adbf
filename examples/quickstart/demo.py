"""``make demo``: the quickstart in a Flower simulation, and the same model un-split."""

from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from quickstart.task import FashionTask  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from examples.simulate import simulate  # noqa: E402
from examples.unsplit import train_task_unsplit  # noqa: E402
from flwr_clicooper.cli import main as cli  # noqa: E402

TRAINERS = 3
WANTED = 0.88
MARGIN = 0.005


def main() -> int:
    console = Console()
    run_dir = ROOT / "runs"
    before = set(run_dir.glob("*"))
    console.rule("1. One owner and three trainers, in a Flower simulation")
    started = time.monotonic()
    # A watermark changes weights, and training would no longer equal the un-split model's.
    run = simulate(HERE, TRAINERS + 1, f"run-dir='{run_dir}' watermark=false")
    chain_seconds = time.monotonic() - started
    if run["status"] != "finished:completed":
        console.print(f"[red]The run failed:[/] {run['status']} {run.get('status-details')}")
        return 1
    (folder,) = set(run_dir.glob("*")) - before
    console.rule("2. The same model in one process, un-split, same seed and steps")
    started = time.monotonic()
    config = tomllib.loads((folder / "run.toml").read_text())["options"]
    accuracy, losses = unsplit(console, config)
    seconds = time.monotonic() - started
    passed = summarise(console, folder, accuracy, losses, chain_seconds, seconds)
    console.rule("3. Who trained what: the evidence of the run, checked from its files")
    return max(cli(["inspect", str(folder)]), 0 if passed else 1)


def unsplit(console: Console, config: dict[str, Any]) -> tuple[float, list[float]]:
    columns = (TextColumn("un-split"), BarColumn(), TextColumn("{task.fields[facts]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, facts="")
        _, losses, accuracy = train_task_unsplit(
            FashionTask(),
            config,
            on_step=lambda at, loss: progress.update(
                task, facts=f"round {at.round} step {at.step + 1}  loss {loss:.4f}"
            ),
        )
    return accuracy, losses


def summarise(
    console: Console,
    folder: Path,
    accuracy: float,
    losses: list[float],
    chain_seconds: float,
    seconds: float,
) -> bool:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    chain_losses = [line["loss"] for line in lines if line["kind"] == "step"]
    last = [line for line in lines if line["kind"] == "round"][-1]
    delivered = lines[-1]["accuracy"]
    apart = max(abs(a - b) for a, b in zip(chain_losses, losses, strict=True))
    table = Table(title="Fashion-MNIST, 12,000 training and 2,000 held-out records")
    for name in ("", "held-out accuracy", "time"):
        table.add_column(name)
    table.add_row("chain of 3 trainers", f"{delivered:.4f}", f"{chain_seconds:.0f} s")
    table.add_row("un-split, one process", f"{accuracy:.4f}", f"{seconds:.0f} s")
    console.print(table)
    console.print(f"Largest difference of a step's loss: {apart:.1e} over {len(losses)} steps")
    for link, nbytes in last["link_bytes"].items():
        console.print(f"sent {link:<24} {nbytes / 1e6:8.1f} MB", highlight=False)
    console.print(f"Run directory: {folder}", highlight=False, soft_wrap=True)
    console.print(
        "Load the model: load_delivered(run_dir, FashionTask()) from flwr_clicooper",
        highlight=False,
    )
    passed = delivered >= WANTED and abs(delivered - accuracy) <= MARGIN
    if not passed:
        console.print(
            f"[red]Not as it should be:[/] at least {WANTED} and within {MARGIN} of "
            "un-split training are expected"
        )
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
