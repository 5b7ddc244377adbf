"""Held-out accuracy of the delivered model by release mode and epsilon.

Full Fashion-MNIST where Debian's package ``dataset-fashion-mnist`` (or ``--data-dir``) has it,
else the 12,000 embedded records. Head: `heads.random_conv` with 256 features, which does not
depend on the data. Its features are computed once, and every run is a whole chain of an
owner and two trainers over a LocalGrid.

    python benchmarks/privacy_utility.py [--seeds 0 1 2] [--epsilons 0.5 1 2 4 8] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from benchmarks.machine import RESULTS, machine, save  # noqa: E402
from flwr_clicooper import CooperStrategy, LocalGrid, SplitTask, cooper_client  # noqa: E402
from flwr_clicooper.datasets import fashion_mnist  # noqa: E402
from flwr_clicooper.heads import random_conv  # noqa: E402
from flwr_clicooper.privacy.statistics import normalise  # noqa: E402
from flwr_clicooper.task import outputs_for  # noqa: E402

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FEATURES, CLASSES, DELTA = 256, 10, 1e-5
PLOT = ROOT / "docs" / "privacy_utility.png"


class Recipe(NamedTuple):
    """How trainers learn: what their two segments are, and their hyper-parameters."""

    segments: str
    epochs: int
    batch_size: int
    weight_decay: float


MLP = Recipe("mlp", 8, 256, 5e-4)
LINEAR = Recipe("linear", 8, 256, 5e-4)
NOISY = Recipe("noisy", 12, 512, 1e-3)
SCORES = Recipe("scores", 12, 512, 1e-3)


class Run(NamedTuple):
    """One row of the table."""

    name: str
    epsilon: float
    recipe: Recipe
    options: dict[str, Any]


class Features(SplitTask):
    """Trainers on the features of a public head, which stays with the owner."""

    def __init__(self, train: TensorDataset, test: TensorDataset, recipe: Recipe) -> None:
        self.train, self.test, self.recipe = train, test, recipe

    def segments(self, config: Any) -> list[nn.Module]:
        outputs = outputs_for(CLASSES, config)
        parts: dict[str, list[nn.Module]] = {
            "mlp": [
                nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU()),
                nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, outputs)),
            ],
            "linear": [nn.Linear(FEATURES, 128, bias=False), nn.Linear(128, outputs)],
            # Under heavy noise: bring it to unit scale, then few directions, no kinks.
            "noisy": [
                nn.Sequential(
                    nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, 32, bias=False)
                ),
                nn.Linear(32, outputs),
            ],
            "scores": [
                nn.Sequential(
                    nn.BatchNorm1d(CLASSES, affine=False), nn.Linear(CLASSES, 10, bias=False)
                ),
                nn.Linear(10, outputs),
            ],
        }
        return [nn.Identity(), *parts[self.recipe.segments]]

    def datasets(self, config: Any) -> tuple[TensorDataset, TensorDataset]:
        return self.train, self.test

    def optimizer(self, segment: nn.Module, config: Any) -> torch.optim.Optimizer:
        decay = self.recipe.weight_decay
        return torch.optim.SGD(segment.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)

    def lr_factor(self, progress: float, config: Any) -> float:
        return 1.0 - progress


def runs(epsilons: list[float]) -> Iterator[Run]:
    """Yield what is compared."""
    yield Run("clean", math.inf, MLP, {"release": "clean"})
    yield Run("clean, linear trainers", math.inf, LINEAR, {"release": "clean"})
    for gamma in (1, 2, 4):
        options = {"release": "clean", "label-expansion": gamma}
        yield Run(f"clean, secret labels, gamma {gamma}", math.inf, MLP, options)
    for epsilon in epsilons:
        private = {"epsilon": epsilon, "delta": DELTA, "head": "public"}
        local = private | {"release": "local-dp", "clip": math.sqrt(FEATURES)}
        central = private | {"release": "central-dp"}
        yield Run("central-dp", epsilon, MLP, central)
        yield Run("central-dp, linear trainers", epsilon, LINEAR, central)
        yield Run("local-dp, class scores", epsilon, SCORES, local | {"class-scores": CLASSES})
        yield Run("local-dp, record", epsilon, NOISY, local)
        element = {"privacy-unit": "element", "clip": 1.0}
        yield Run("local-dp, element", epsilon, NOISY, local | element)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 1, 2, 4, 8])
    default = str(DEBIAN) if DEBIAN.is_dir() else ""
    parser.add_argument("--data-dir", default=default, help="four idx files of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", help="these releases; the others stay as saved")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    train, test = features(arguments.data_dir)
    wanted = [
        run for run in runs(arguments.epsilons) if run.name in (arguments.only or [run.name])
    ]
    todo = [(run, seed) for run in wanted for seed in arguments.seeds]
    found: dict[tuple[str, float], list[float]] = {}
    records: dict[tuple[str, float], float] = {}
    for run, seed in track(todo, "chains"):
        accuracy, record_epsilon = measure(run, seed, train, test)
        found.setdefault((run.name, run.epsilon), []).append(accuracy)
        records[run.name, run.epsilon] = record_epsilon
    rows = [
        {
            "release": name,
            "epsilon": None if math.isinf(epsilon) else epsilon,
            "record-epsilon": records[name, epsilon] if epsilon < math.inf else None,
            "accuracy-mean": statistics.fmean(values),
            "accuracy": [round(v, 4) for v in values],
        }
        for (name, epsilon), values in found.items()
    ]
    facts = {"seeds": arguments.seeds, "records": len(train), "held-out": len(test)}
    if arguments.only:
        rows = saved(facts, arguments.only) + rows
    show(rows, facts)
    plot(rows, len(train))
    facts |= {"delta": DELTA, "head": f"random_conv, {FEATURES} features"}
    print(f"raw output: {save('privacy_utility', {**facts, 'rows': rows}).relative_to(ROOT)}")


def saved(facts: dict[str, Any], measured: list[str]) -> list[dict[str, Any]]:
    """Return the rows of earlier results that were not measured now."""
    results = json.loads((RESULTS / "privacy_utility.json").read_text())
    if {name: results[name] for name in facts} != facts or results["machine"] != machine():
        raise ValueError("the saved results are of other seeds, data, versions or machine")
    rows: list[dict[str, Any]] = results["rows"]
    return [row for row in rows if row["release"] not in measured]


def features(data_dir: str) -> tuple[TensorDataset, TensorDataset]:
    """Return the head's features of both sets, normalised as every release does it."""
    head = random_conv(1, 28, FEATURES)

    def extract(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([normalise(head(part)) for part in torch.split(images, 1000)])

    parts = (part.tensors for part in fashion_mnist(data_dir))
    train, test = (TensorDataset(extract(x), y) for x, y in parts)
    return train, test


def measure(
    run: Run, seed: int, train: TensorDataset, test: TensorDataset
) -> tuple[float, float]:
    """Return held-out accuracy of the delivered model, and the epsilon of a record."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "num-rounds": run.recipe.epochs,
            "batch-size": run.recipe.batch_size,
            "seed": seed,
            "run-dir": folder,
            "seal": False,
            **run.options,
        }
        nodes: list[dict[str, Any]] = [{"role": "owner"}]
        nodes += [{"role": "trainer", "stage": stage} for stage in (1, 2)]
        app = cooper_client(Features(train, test, run.recipe))
        result = CooperStrategy.from_config(config).start(LocalGrid(app, nodes, config))
    accuracy = result.evaluate_metrics_clientapp[run.recipe.epochs]["accuracy"]
    guarantees = result.privacy["activations"]
    record = guarantees[-1]["epsilon"] if guarantees else math.inf
    return float(accuracy), float(record)  # type: ignore[arg-type]


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    title = f"Held-out accuracy, Fashion-MNIST, {facts['records']:,} records, delta {DELTA:g}"
    table = Table(title=title)
    for name in ("release", "epsilon", "per record", "mean", "by seed"):
        table.add_column(name, justify="left" if name == "release" else "right")
    for row in rows:
        table.add_row(
            row["release"],
            "" if row["epsilon"] is None else f"{row['epsilon']:g}",
            "" if row["epsilon"] is None else f"{row['record-epsilon']:.3g}",
            f"{row['accuracy-mean']:.4f}",
            " ".join(f"{value:.4f}" for value in row["accuracy"]),
        )
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


def plot(rows: list[dict[str, Any]], records: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    private = [row for row in rows if row["epsilon"] is not None]
    for name in dict.fromkeys(row["release"] for row in private):
        own = [row for row in private if row["release"] == name]
        x, y = [r["epsilon"] for r in own], [r["accuracy-mean"] for r in own]
        low = [r["accuracy-mean"] - min(r["accuracy"]) for r in own]
        high = [max(r["accuracy"]) - r["accuracy-mean"] for r in own]
        dashed = "--" if "element" in name else "-"
        axes.errorbar(x, y, yerr=[low, high], fmt=f"o{dashed}", capsize=3, label=name)
    for name, style in (("clean", "-"), ("clean, linear trainers", ":")):
        (clean,) = (row["accuracy-mean"] for row in rows if row["release"] == name)
        axes.axhline(clean, color="gray", linestyle=style, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["epsilon"] for row in private})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("epsilon (of one record; of one element where it says so), delta 1e-5")
    axes.set_ylabel("held-out accuracy")
    axes.set_title(f"Fashion-MNIST, {records:,} records, a head that saw none of them")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(PLOT, dpi=130)


if __name__ == "__main__":
    main()
