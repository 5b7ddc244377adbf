"""What a watermark costs, how long it is found, and what removes it.

Embedded Fashion-MNIST, a frozen head, and two trained segments: linear layers on the features
of `heads.random_conv`, and convolutions on those of a random convolution. Each round has a new
key per segment. The same model is trained with and without marks, in turns by round, on the
same batches; times are CPU seconds of one thread. Segments are trained in one process, which
computes what a chain of clients computes.

    OMP_NUM_THREADS=1 python benchmarks/watermark.py [--seeds 0 1 2] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from benchmarks.watermark_runs import (  # noqa: E402
    BATCH,
    LR,
    SEGMENTS,
    Data,
    Marks,
    Run,
    accuracy,
    data,
    found,
    key_of,
    network,
    pair,
    summary,
    tune,
)
from flwr_clicooper.provenance.realign import NULLS, judge, realign  # noqa: E402
from flwr_clicooper.provenance.watermark import (  # noqa: E402
    BITS,
    Watermark,
    inside,
    is_accepted,
)

TUNING_LR = 0.02
KINDS = ("linear", "conv")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Scale(NamedTuple):
    """How much of everything there is."""

    records: int
    rounds: int
    longer: dict[str, int]
    tuning: tuple[int, int]
    null_epochs: dict[str, int]
    keys: int


FULL = Scale(12_000, 6, {"linear": 30, "conv": 12}, (5, 10), {"linear": 6, "conv": 2}, 10_000)
QUICK = Scale(1024, 2, {"linear": 3, "conv": 3}, (1, 2), {"linear": 1, "conv": 1}, 200)


# -- attacks ---------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim >= 2]


def change(model: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for weight in weights(model):
            weight.copy_(how(weight))


def prune(share: float) -> Callable[[Tensor], Tensor]:
    def smallest(w: Tensor) -> Tensor:
        least = w.abs().flatten().kthvalue(max(1, int(share * w.numel()))).values
        return w * (w.abs() > least)

    return smallest


def quantise(bits: int) -> Callable[[Tensor], Tensor]:
    def rounded(w: Tensor) -> Tensor:
        step = float(w.abs().max()) / (2 ** (bits - 1) - 1)
        return torch.mul(torch.round(w / step), step)

    return rounded


def noise(deviations: float) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda w: w + deviations * w.std() * torch.randn(w.shape, generator=generator)


def overwrite(model: nn.Sequential, given: Data) -> None:
    """Train five rounds more, each with marks of other keys."""
    for number in range(5):
        for module in (model[segment] for segment in SEGMENTS):
            Watermark(key_of("thief", number), module.state_dict()).top_up(module)
        tune(model, given, 1, TUNING_LR)


def remove(model: nn.Sequential, marks: Marks) -> None:
    """Turn every bit round, by the same least change that sets it; the key must be known."""
    for (segment, _), mark in marks.items():
        turned = copy.copy(mark)
        turned._bits = -mark._bits
        turned.top_up(model[segment])


def shuffle(model: nn.Sequential, then: Callable[[nn.Sequential], None] | None = None) -> None:
    """Permute and scale all hidden units; the model computes the same."""
    generator = torch.Generator().manual_seed(3)
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, *NORMS))
    ]
    places = [i for i, layer in enumerate(layers) if not isinstance(layer, NORMS)]
    for place, after in pairwise(places):
        layer, norms, following = layers[place], layers[place + 1 : after], layers[after]
        units = len(layer.weight)
        order = torch.randperm(units, generator=generator)
        factor = torch.rand(units, generator=generator) * 3 + 0.3
        for each in (layer, *norms):
            for tensor in [*each.parameters(), *each.buffers()]:
                if tensor.ndim:
                    tensor.data = tensor.data[order]
        for each in norms or [layer]:
            each.weight.data *= factor.reshape(-1, *[1] * (each.weight.ndim - 1))
            if each.bias is not None:
                each.bias.data *= factor
        grouped = following.weight.data.reshape(len(following.weight), units, -1)
        divided = grouped[:, order] / factor[:, None]
        following.weight.data = divided.reshape(following.weight.shape)
    if then is not None:
        then(model)


def attacks(
    run: Run, given: Data, scale: Scale
) -> Iterator[tuple[str, Callable[[nn.Sequential], None]]]:
    """Yield what thieves do, to a copy of the model."""
    yield "none", partial(tune, given=given, epochs=0, lr=0.0)
    for epochs in scale.tuning:
        how = partial(tune, given=given, epochs=epochs, lr=TUNING_LR)
        yield f"fine-tune last layer, {epochs} epochs", partial(last_layer, then=how)
        yield f"fine-tune all, {epochs} epochs", how
    for percent in (50, 70, 90, 95):
        yield f"prune {percent} %", partial(change, how=prune(percent / 100))
    for bits in (8, 4, 3, 2):
        yield f"quantise, {bits} bit", partial(change, how=quantise(bits))
    for level in (0.5, 1.0, 2.0):
        yield f"noise, {level:g} std", partial(change, how=noise(level))
    yield "overwrite x5 and train", partial(overwrite, given=given)
    last = {at: mark for at, mark in run.marks.items() if at[1] == scale.rounds}
    yield "remove, last key known", partial(remove, marks=last)
    yield "remove, all keys known", partial(remove, marks=run.marks)
    yield "permute and scale", shuffle
    after = partial(tune, given=given, epochs=scale.tuning[0], lr=TUNING_LR)
    yield "permute, scale, fine-tune", partial(shuffle, then=after)
    student = partial(
        tune, given=given, epochs=scale.rounds, lr=LR, teacher=copy.deepcopy(run.model).eval()
    )
    yield "distil", partial(distil, kind=run.name[0], then=student)


def last_layer(model: nn.Sequential, then: Callable[[nn.Sequential], None]) -> None:
    model.requires_grad_(False)
    list(model.modules())[-1].requires_grad_(True)
    then(model)


def distil(model: nn.Sequential, kind: str, then: Callable[[nn.Sequential], None]) -> None:
    student = network(kind, 5000)
    then(student)
    model.load_state_dict(student.state_dict())


def robustness(run: Run, given: Data, scale: Scale) -> list[dict[str, Any]]:
    rows, nulls = [], independent(run.name[0], given, scale)
    probes = given.x_test[:512]
    newest = [(f"{s}.", run.marks[s, scale.rounds]) for s in SEGMENTS]
    for name, attack in track(list(attacks(run, given, scale)), f"attacks, {run.name[0]}"):
        suspect = copy.deepcopy(run.model)
        attack(suspect)
        matches = found(run.marks, dict(suspect.state_dict()))
        row = {
            "attack": name,
            "accuracy": accuracy(suspect, given),
            "matches": [matches[s, scale.rounds] for s in SEGMENTS],
            "accepted": [
                is_accepted(matches[s, scale.rounds], len(matches)) for s in SEGMENTS
            ],
            "keys-accepted": sum(is_accepted(m, len(matches)) for m in matches.values()),
            "keys": len(matches),
        }
        if name.startswith(("permute", "distil")):
            verdicts = judge(newest, run.model, suspect, nulls, probes)
            row["aligned"] = [verdict.as_dict() for verdict in verdicts]
        rows.append(row)
    return [*rows, chance(run, nulls, probes, scale)]


# -- chance ----------------------------------------------------------------------------------


def independent(kind: str, given: Data, scale: Scale) -> list[nn.Sequential]:
    """Return models that nobody marked, from other starts and other orders of batches."""
    models = []
    for number in track(range(NULLS), f"null models, {kind}"):
        null = Run(kind, 1000 + number, given, scale.null_epochs[kind], marked=False)
        for epoch in range(scale.null_epochs[kind]):
            null.round(epoch + 1)
        models.append(null.model)
    return models


def chance(
    run: Run, nulls: list[nn.Sequential], probes: Tensor, scale: Scale
) -> dict[str, Any]:
    """Return what other models and other keys match: nothing is to be found there."""
    plain = [m for null in nulls for m in found(run.marks, dict(null.state_dict())).values()]
    aligned = [
        m for x in nulls for m in found(run.marks, realign(run.model, x, probes)).values()
    ]
    tensors = inside(dict(run.model.state_dict()), "1.")
    keys = [
        Watermark(key_of("wrong", i), tensors).matches(tensors)
        for i in track(range(scale.keys), "wrong keys")
    ]
    row: dict[str, Any] = {"attack": "chance"}
    for name, values in (("nulls", plain), ("nulls, aligned", aligned), ("wrong keys", keys)):
        row[name] = {
            "comparisons": len(values),
            "mean": statistics.fmean(values),
            "max": max(values),
            "accepted": sum(is_accepted(value) for value in values),
        }
    return row


# -- what is shown ---------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="see that it runs; no result")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    console, results = Console(width=110), {}
    for kind in KINDS:
        given = data(kind, scale.records)
        first, cost = pairs(kind, arguments.seeds, given, scale.rounds)
        _, longer = pairs(kind, arguments.seeds, given, scale.longer[kind])
        del longer["runs"]
        results[kind] = {
            **cost,
            "longer": longer,
            "robustness": robustness(first, given, scale),
        }
        for table in (costs, by_round, thieves):
            console.print(table(kind, results[kind]))
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)
    facts = {"seeds": arguments.seeds, **scale._asdict(), "bits": BITS, "batch-size": BATCH}
    if not arguments.quick:
        print(f"raw output: {save('watermark', facts | results).relative_to(ROOT)}")


def pairs(kind: str, seeds: list[int], given: Data, rounds: int) -> tuple[Run, dict[str, Any]]:
    todo = track(seeds, f"{kind}, {rounds} rounds")
    runs = [pair(kind, seed, given, rounds) for seed in todo]
    return runs[0][0], summary([facts for _, facts in runs])


def costs(kind: str, result: dict[str, Any]) -> Table:
    seeds = len(result["runs"])
    table = Table(title=f"{kind}: cost, mean of {seeds} seeds; ms per segment and round")
    for name in ("rounds", "accuracy\nwithout", "with", "points", "by seed", "time\nA/B"):
        table.add_column(name, justify="right")
    for name in ("in marks", "ms", "matches of\nall keys, least"):
        table.add_column(name, justify="right")
    for each in (result, result["longer"]):
        table.add_row(
            str(each["rounds"]),
            *(f"{each[f'accuracy-{name}']:.4f}" for name in ("plain", "marked")),
            f"{each['difference-points']:+.2f}",
            " ".join(f"{value:+.2f}" for value in each["difference-points-by-seed"]),
            f"{each['extra-time-percent']:+.1f} %",
            f"{each['marking-percent']:.1f} %",
            f"{each['marking-milliseconds']:.1f} of {each['plain-milliseconds']:.0f}",
            str(each["matches-in-the-end-least"]),
        )
    return table


def by_round(kind: str, result: dict[str, Any]) -> Table:
    runs = result["runs"]
    table = Table(
        title=f"{kind}: matches of 256 for the keys of rounds 1, 2, ..., least of seeds"
    )
    table.add_column("after round", justify="right")
    names = list(runs[0]["matches-after-round"][0])
    for name in names:
        table.add_column(name)
    for number in range(len(runs[0]["matches-after-round"])):
        each = [run["matches-after-round"][number] for run in runs]
        least = (
            [min(x) for x in zip(*(e[name] for e in each), strict=True)] for name in names
        )
        table.add_row(str(number + 1), *(" ".join(map(str, values)) for values in least))
    return table


def thieves(kind: str, result: dict[str, Any]) -> Table:
    *rows, others = result["robustness"]
    table = Table(title=f"{kind}: the newest keys after an attack, by segment")
    for name in (
        "attack",
        "matches",
        "accepted",
        "of all keys",
        "accuracy",
        "aligned (nulls)",
    ):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for row in rows:
        aligned = (
            f"{x['matches']} {'yes' if x['accepted'] else 'no'} (max {x['nulls-max']})"
            for x in row.get("aligned", [])
        )
        table.add_row(
            row["attack"],
            " ".join(map(str, row["matches"])),
            " ".join("yes" if x else "no" for x in row["accepted"]),
            f"{row['keys-accepted']}/{row['keys']}",
            f"{row['accuracy']:.4f}",
            "\n".join(aligned),
        )
    for name in ("nulls", "nulls, aligned", "wrong keys"):
        x = others[name]
        text = f"{name}, {x['comparisons']:,}: mean {x['mean']:.1f}, max {x['max']}"
        table.add_row(text, "", "", f"{x['accepted']}/{x['comparisons']:,}", "", "")
    return table


if __name__ == "__main__":
    main()
