"""Small split models on Fashion-MNIST, trained with watermarks or without."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper.datasets import fashion_mnist
from flwr_clicooper.heads import random_conv
from flwr_clicooper.privacy.statistics import normalise
from flwr_clicooper.provenance.watermark import EVERY, Watermark, inside

BATCH, LR, CLASSES = 256, 0.05, 10
SEGMENTS = (1, 2)
Marks = dict[tuple[int, int], Watermark]
"""By segment and round."""


class Data(NamedTuple):
    """What the head gives: training and held-out inputs of the first segment, and labels."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def data(kind: str, records: int) -> Data:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
    head = random_conv(1, 28, 256) if kind == "linear" else conv
    found: list[Tensor] = []
    for part in fashion_mnist():
        images, labels = (tensor[:records] for tensor in part.tensors)
        with torch.no_grad():
            outputs = torch.cat([head(some) for some in torch.split(images, 1000)])
        found += [normalise(outputs) if kind == "linear" else outputs, labels]
    return Data(*found)


def network(kind: str, seed: int) -> nn.Sequential:
    """Return a delivered model: a head, which did its work before, and two segments."""
    torch.manual_seed(seed)
    if kind == "linear":
        first = [nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()]
        second = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)]
    else:
        first = [*convolution(16, 32), *convolution(32, 64)]
        second = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, 128), nn.ReLU()]
        second.append(nn.Linear(128, CLASSES))
    return nn.Sequential(nn.Identity(), nn.Sequential(*first), nn.Sequential(*second))


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def key_of(*what: object) -> bytes:
    return hashlib.sha256(repr(what).encode()).digest()


# -- training --------------------------------------------------------------------------------


class Run:
    """A model in training, with marks or without."""

    def __init__(self, kind: str, seed: int, given: Data, rounds: int, marked: bool) -> None:
        self.model = network(kind, seed)
        self.name, self.given, self.marked = (kind, seed), given, marked
        self.optimizer = sgd(self.model, LR)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.steps, self.done = rounds * -(-len(given.x) // BATCH), 0
        self.marks: Marks = {}
        self.seconds, self.marking = 0.0, 0.0

    def round(self, number: int) -> None:
        started = time.process_time()
        current = self._mark(lambda: [self._new(segment, number) for segment in SEGMENTS])
        for step, rows in enumerate(batches(self.given, self.shuffle)):
            loss = functional.cross_entropy(self.model(self.given.x[rows]), self.given.y[rows])
            torch.autograd.backward(loss)
            if step == 0:
                self._mark(lambda: [mark.top_up(module) for mark, module in current])
            elif step % EVERY == 0:
                self._mark(lambda: [mark.push(module) for mark, module in current])
            self.optimizer.param_groups[0]["lr"] = LR * (1 - self.done / self.steps)
            self.done += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._mark(lambda: [mark.top_up(module) for mark, module in current])
        self.seconds += time.process_time() - started

    def _new(self, segment: int, number: int) -> tuple[Watermark, nn.Module]:
        module = self.model[segment]
        mark = Watermark(key_of(*self.name, segment, number), module.state_dict())
        self.marks[segment, number] = mark
        return mark, module

    def _mark(self, call: Callable[[], list[Any]]) -> list[Any]:
        if not self.marked:
            return []
        started = time.process_time()
        result = call()
        self.marking += time.process_time() - started
        return result


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(learning, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def batches(given: Data, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.split(torch.randperm(len(given.x), generator=generator), BATCH)


def tune(
    model: nn.Sequential, given: Data, epochs: int, lr: float, teacher: nn.Module | None = None
) -> None:
    """Train on labels, or on what a teacher answers."""
    model.train()
    optimizer, generator = sgd(model, lr), torch.Generator().manual_seed(77)
    for _ in range(epochs):
        for rows in batches(given, generator):
            target = given.y[rows]
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(given.x[rows]).softmax(dim=1)
            torch.autograd.backward(functional.cross_entropy(model(given.x[rows]), target))
            optimizer.step()
            optimizer.zero_grad()


def accuracy(model: nn.Module, given: Data) -> float:
    model.eval()
    with torch.no_grad():
        right = model(given.x_test).argmax(dim=1) == given.y_test
    model.train()
    return float(right.float().mean())


def found(marks: Marks, tensors: dict[str, Tensor]) -> dict[tuple[int, int], int]:
    return {at: mark.matches(inside(tensors, f"{at[0]}.")) for at, mark in marks.items()}


def pair(kind: str, seed: int, given: Data, rounds: int) -> tuple[Run, dict[str, Any]]:
    """Train with and without marks, in turns; return the marked run and what it shows."""
    plain, marked = (Run(kind, seed, given, rounds, m) for m in (False, True))
    after = []
    for number in range(1, rounds + 1):
        for run in (plain, marked) if number % 2 else (marked, plain):
            run.round(number)
        now = found(marked.marks, dict(marked.model.state_dict()))
        after.append(
            {f"segment {s}": [now[s, r] for r in range(1, number + 1)] for s in SEGMENTS}
        )
    other = found(marked.marks, dict(plain.model.state_dict()))
    return marked, {
        "seed": seed,
        "accuracy-plain": accuracy(plain.model, given),
        "accuracy-marked": accuracy(marked.model, given),
        "seconds-plain": plain.seconds,
        "seconds-marked": marked.seconds,
        "seconds-marking": marked.marking,
        "matches-after-round": after,
        "matches-in-plain-model-max": max(other.values()),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    plain, marked, marking = (
        sum(run[f"seconds-{name}"] for run in runs) for name in ("plain", "marked", "marking")
    )
    differences = [100 * (run["accuracy-marked"] - run["accuracy-plain"]) for run in runs]
    rounds = len(runs[0]["matches-after-round"])
    count = len(runs) * rounds * len(SEGMENTS)
    ends = [matches for run in runs for matches in run["matches-after-round"][-1].values()]
    return {
        "rounds": rounds,
        "matches-in-the-end-least": min(map(min, ends)),
        "accuracy-plain": statistics.fmean(run["accuracy-plain"] for run in runs),
        "accuracy-marked": statistics.fmean(run["accuracy-marked"] for run in runs),
        "difference-points": statistics.fmean(differences),
        "difference-points-by-seed": differences,
        "extra-time-percent": 100 * (marked / plain - 1),
        "marking-percent": 100 * marking / (marked - marking),
        "marking-milliseconds": 1000 * marking / count,
        "plain-milliseconds": 1000 * plain / count,
        "runs": runs,
    }
