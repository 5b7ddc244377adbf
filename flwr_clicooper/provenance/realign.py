"""Undo a permutation and scaling of a suspect's units before its watermark is looked for.

Units of a hidden layer, or channels, can change places, and with ReLU each can be scaled by
a positive factor, without any change in what a model computes; its weights then no longer
show a watermark. `realign` finds which unit of the suspect does the work of which unit of
the delivered model, by what both answer to public inputs, and puts the weights back.

Matching by weights would look for the watermark itself. Matching by activations uses
the delivered model all the same, so the aligned weights of a model that has nothing to do
with it need not match by chance alone: `judge` compares with at least 30 models that were
trained independently and aligned in the same way, and accepts only what exceeds all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import fmean

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.watermark import (
    Watermark,
    inside,
    is_accepted,
    log2_false_positive,
)

NULLS = 30
"""Independently trained models that a suspect is compared with, at least."""
_ROWS = 20_000
"""Answers per unit that are compared at most."""

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# These treat all units alike, and give c times as much for c times as much.
_PASSED = (
    *(nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)


@dataclass(frozen=True)
class Verdict:
    """What a suspect shows after its alignment.

    Attributes
    ----------
    matches : int
        Of 256 bits.
    nulls : tuple of int
        Matches of each null model.
    log2_false_positive : float
        As `watermark.log2_false_positive`; holds for a model without alignment.
    accepted : bool
        Whether the matches are enough, and more than those of every null model.
    """

    matches: int
    nulls: tuple[int, ...]
    log2_false_positive: float
    accepted: bool

    def as_dict(self) -> dict[str, object]:
        """Return what JSON takes, with mean and maximum of the null models."""
        return {
            "matches": self.matches,
            "nulls": len(self.nulls),
            "nulls-max": max(self.nulls),
            "nulls-mean": fmean(self.nulls),
            "log2-false-positive": self.log2_false_positive,
            "accepted": self.accepted,
        }


def realign(
    reference: nn.Sequential, suspect: nn.Sequential, probes: Tensor
) -> dict[str, Tensor]:
    """Return the suspect's weights with the reference's order and scale of units.

    Units of each linear layer or convolution are matched by the correlation of their
    answers before the activation, one to one (Hungarian method). Their scales are the
    ratios of root mean squares, behind a batch norm where there is one. A whole model as a
    sequential of its segments may be given; alone, a segment must take its inputs in the
    reference's order.

    Parameters
    ----------
    reference, suspect : nn.Sequential
        Of the same layers: linear, convolution without groups, batch norm, ReLU, pooling,
        flatten, dropout, and sequentials of these. They are not changed.
    probes : Tensor
        Public inputs ``[n, ...]``; a few hundred, like those of the task.

    Returns
    -------
    dict of str to Tensor
        Weights of the linear layers and convolutions by their names in the suspect.

    Raises
    ------
    EvidenceError
        A layer is of another kind, the two differ in their layers, or answers are NaN.
    """
    weights: dict[str, Tensor] = {}
    order, scale = torch.arange(0), torch.ones(0)
    for name, layer, theirs, ours in _answers(reference, suspect, probes):
        if isinstance(layer, _WEIGHTED):
            weight = layer.weight.detach().cpu().float()
            if len(order):
                weight = _undo_inputs(weight, order, scale)
            order = _matched(ours, theirs)
            scale = _ratio(ours, theirs[:, order])
            shape = (-1, *[1] * (weight.ndim - 1))
            weights[f"{name}.weight"] = weight[order] / scale.reshape(shape)
        elif isinstance(layer, _NORMS) and len(order):
            scale = _ratio(ours, theirs[:, order])
    return weights


def can_follow(module: nn.Module) -> bool:
    """Return whether a module has only layers that `realign` takes."""
    try:
        return bool(list(_layers(module)))
    except EvidenceError:
        return False


def check_nulls(count: int) -> None:
    """Refuse fewer than `NULLS` null models.

    Raises
    ------
    EvidenceError
        There are fewer.
    """
    if count < NULLS:
        raise EvidenceError(
            f"{count} null models; allowed are at least {NULLS}, independently trained"
        )


def judge(
    marks: Sequence[tuple[str, Watermark]],
    reference: nn.Sequential,
    suspect: nn.Sequential,
    nulls: Iterable[nn.Sequential],
    probes: Tensor,
    *,
    tests: int = 0,
) -> list[Verdict]:
    """Align a suspect and the null models, and say which watermarks the suspect has.

    Parameters
    ----------
    marks : sequence of (str, Watermark)
        Each with what the names of the marked segment's weights begin with in the modules:
        ``1.`` for segment 1 of a whole model, nothing for a segment alone.
    reference, suspect, probes
        As in `realign`.
    nulls : iterable of nn.Sequential
        At least `NULLS` models of the same layers, trained by nobody who saw the reference.
    tests : int
        Comparisons that are made in all, for the bound; at least one for each mark.

    Returns
    -------
    list of Verdict
        One for each mark.

    Raises
    ------
    EvidenceError
        There are too few null models, or as in `realign` and `Watermark.matches`.
    """
    matches: list[list[int]] = [[] for _ in marks]
    for module in chain([suspect], nulls):
        weights = realign(reference, module, probes)
        for found, (prefix, mark) in zip(matches, marks, strict=True):
            found.append(mark.matches(inside(weights, prefix)))
    check_nulls(min(map(len, matches), default=1) - 1)
    return [_verdict(found, max(tests, len(marks))) for found in matches]


def _verdict(matches: Sequence[int], tests: int) -> Verdict:
    found, *others = matches
    return Verdict(
        matches=found,
        nulls=tuple(others),
        log2_false_positive=log2_false_positive(found, tests),
        accepted=is_accepted(found, tests) and found > max(others),
    )


def _answers(
    reference: nn.Sequential, suspect: nn.Sequential, probes: Tensor
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Yield each layer of the suspect, and what both answer there, ``[rows, units]``."""
    chains = [list(_layers(copy.deepcopy(module).eval())) for module in (reference, suspect)]
    if [_kind(layer) for _, layer in chains[0]] != [_kind(layer) for _, layer in chains[1]]:
        raise EvidenceError("the suspect's layers are not those of the reference")
    ours, theirs = probes.clone(), probes.clone()  # a layer may work in place
    for (_, own), (name, layer) in zip(*chains, strict=True):
        with torch.no_grad():
            ours, theirs = own(ours), layer(theirs)
        if isinstance(layer, nn.Linear) and ours.ndim != 2:
            raise EvidenceError(
                f"linear layer {name!r} gives {ours.ndim} dimensions; allowed are 2"
            )
        yield name, layer, _rows(theirs), _rows(ours)


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all layers of nested sequentials in the order in which they run."""
    children = module.named_children() if isinstance(module, nn.Sequential) else None
    if isinstance(module, fx.GraphModule):
        children = _traced(module)
    if children is not None:
        for name, child in children:
            yield from _layers(child, f"{prefix}.{name}" if prefix else name)
        return
    grouped = getattr(module, "groups", 1) != 1
    if grouped or not isinstance(module, (*_WEIGHTED, *_NORMS, *_PASSED)):
        kind = f"{type(module).__name__} with groups" if grouped else type(module).__name__
        raise EvidenceError(
            f"units cannot be followed through {prefix or 'the module'!r}, a {kind}; allowed "
            "are sequentials of linear layers, convolutions without groups, batch norm, "
            "ReLU, pooling, flatten and dropout"
        )
    yield prefix, module


def _traced(module: fx.GraphModule) -> Iterator[tuple[str, nn.Module]] | None:
    """Return the layers of a traced segment if each has the one before as its only input."""
    start, *nodes, end = module.graph.nodes
    for before, node in pairwise([start, *nodes]):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return None
    last = [start, *nodes][-1]
    if end.args[0] not in (last, (last,)):
        return None
    return ((str(node.target), module.get_submodule(str(node.target))) for node in nodes)


def _kind(layer: nn.Module) -> tuple[type[nn.Module], tuple[torch.Size, ...]]:
    return type(layer), tuple(p.shape for p in layer.parameters())


def _rows(answers: Tensor) -> Tensor:
    """Return answers with one column per unit or channel."""
    if answers.ndim > 2:
        answers = answers.flatten(2).transpose(1, 2).flatten(0, 1)
    answers = answers[:: -(-len(answers) // _ROWS)].double()
    if not bool(torch.isfinite(answers).all()):
        raise EvidenceError("a model answers NaN or infinity to the probes")
    return answers


def _matched(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return for each of our units the one of theirs that answers like it."""
    one, two = (_standardised(x) for x in (ours, theirs))
    _, columns = linear_sum_assignment(-(one.T @ two).numpy())
    return torch.from_numpy(np.asarray(columns))


def _standardised(answers: Tensor) -> Tensor:
    return nn.functional.normalize(answers - answers.mean(dim=0), dim=0)


def _ratio(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return how much larger their answers are, 1 for units that are silent."""
    one, two = ours.square().mean(dim=0).sqrt(), theirs.square().mean(dim=0).sqrt()
    silent = (one == 0.0) | (two == 0.0)
    return torch.where(silent, 1.0, two / one.clamp_min(1e-300)).float()


def _undo_inputs(weight: Tensor, order: Tensor, scale: Tensor) -> Tensor:
    """Return weights with their inputs in our order and scale; a channel may be many."""
    inputs = weight.shape[1]
    if inputs % len(order):
        raise EvidenceError(
            f"a layer has {inputs} inputs after one of {len(order)} units; allowed are layers "
            "that follow one another"
        )
    grouped = weight.reshape(len(weight), len(order), -1)
    return (grouped[:, order] * scale[:, None]).reshape(weight.shape)
