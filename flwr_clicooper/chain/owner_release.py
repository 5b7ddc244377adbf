"""The activations as they leave the owner, under the run's guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flwr_clicooper.chain.messages import ACTIVATIONS, LABELS
from flwr_clicooper.chain.owner_labels import OwnerLabels
from flwr_clicooper.chain.records import Indices, all_rows
from flwr_clicooper.chain.release_store import ReleaseStore
from flwr_clicooper.errors import MessageError
from flwr_clicooper.options import Options
from flwr_clicooper.privacy.accounting import mu_for, noise_for
from flwr_clicooper.privacy.class_scores import (
    FIT_SHARE,
    SENSITIVITY,
    ClassScores,
    fit_class_scores,
)
from flwr_clicooper.privacy.release import RECORD, GaussianRelease
from flwr_clicooper.privacy.statistics import normalise
from flwr_clicooper.privacy.synthetic import release_synthetic
from flwr_clicooper.split.specs import Tensors, TensorSpec

Bound = Callable[[Tensors], Tensors]
HeadOutputs = Callable[[Indices, tuple[int, ...]], tuple[Tensors, Tensor]]
"""Activations and true labels of some records; random augmentation by what they are for."""


@dataclass
class OwnerRelease:
    """Everything that the owner releases before and between rounds.

    Attributes
    ----------
    options : Options
        The run's options.
    labels : OwnerLabels
        How labels leave.
    store : ReleaseStore
        What was released with noise.
    outputs, features : callable
        What the head gives, and what it gives before its scores, if it has them.
    scores : ClassScores or None
        The end of the head that has to be fitted.
    cut : sequence of TensorSpec
        What crosses the first cut.
    records, chunk_records, rounds : int
        Training records, records per message, rounds of the run.
    """

    options: Options
    labels: OwnerLabels
    store: ReleaseStore
    outputs: HeadOutputs
    features: HeadOutputs
    scores: ClassScores | None
    cut: Sequence[TensorSpec]
    records: int
    chunk_records: int
    rounds: int

    @property
    def allowed(self) -> int:
        """How often each record may be released."""
        return self.rounds if self.options.release == "interactive" else 1

    @property
    def elements(self) -> int:
        """Numbers in a record's activation."""
        return sum(torch.Size(spec.shape).numel() for spec in self.cut)

    @property
    def sensitivity(self) -> float:
        """How far replacing a unit can move a release."""
        if self.scores is not None:
            return SENSITIVITY
        return GaussianRelease(self.options.privacy_unit, self.options.clip, 0.0).sensitivity

    @property
    def mechanism(self) -> GaussianRelease:
        """What is done to each record in `local-dp` and `interactive`."""
        o = self.options
        sigma = noise_for(o.epsilon, o.delta, self.sensitivity, self.allowed)
        if self.scores is not None:  # scores have a norm below 1: nothing is clipped
            return GaussianRelease(RECORD, 1.0, sigma / math.sqrt(1.0 - FIT_SHARE))
        return GaussianRelease(o.privacy_unit, o.clip, sigma)

    def fit(self) -> None:
        """Fit the class scores, once, or load how they were fitted."""
        if self.scores is None:
            return
        mu = mu_for(self.options.epsilon, self.options.delta) * math.sqrt(FIT_SHARE)
        classes = self.options.class_scores
        fitted = self.store.get(
            "class-scores", 0, 1, lambda: fit_class_scores(self._features, classes, mu)
        )
        self.scores.load_state_dict(fitted)

    def chunk(self, number: int, release: int) -> tuple[Tensors, Tensor]:
        """Return a chunk of activations and labels as they may leave.

        Parameters
        ----------
        number : int
            Of the chunk.
        release : int
            0, or the round that a fresh release is for.

        Raises
        ------
        MessageError
            There is no such chunk or release.
        PrivacyBudgetExceeded
            It was released as often as is allowed.
        """
        rows = all_rows(self.records, self.chunk_records)
        last = self.rounds if self.options.release == "interactive" else 0
        if not 0 <= number < len(rows) or not min(1, last) <= release <= last:
            raise MessageError(f"the run has no chunk {number} of release {release}")
        self.fit()
        if not self.options.private:
            outputs, labels = self.outputs(rows[number], (release, number))
            return outputs, self.labels.leaving(labels, rows[number])
        if self.options.release == "central-dp":
            stored = self.store.get("synthetic", 0, 1, self._synthetic)
            here = slice(int(rows[number][0]), int(rows[number][-1]) + 1)
            stored = {name: tensor[here] for name, tensor in stored.items()}
        else:
            name = f"activations-{number}"
            make = partial(self._noised, rows[number], number, release)
            stored = self.store.get(name, release, self.allowed, make)
        tensors = tuple(stored[f"{ACTIVATIONS}/{i}"] for i in range(len(self.cut)))
        return tensors, self.labels.encoded(stored[LABELS], rows[number])

    def _noised(self, rows: Indices, number: int, release: int) -> Mapping[str, Tensor]:
        outputs, labels = self.outputs(rows, (release, number))
        return _named(tuple(self.mechanism.joint(outputs)), self.labels.told(labels, rows))

    def _synthetic(self) -> Mapping[str, Tensor]:
        mu = mu_for(self.options.epsilon, self.options.delta)
        made = release_synthetic(self._features, self.labels.classes, self.records, mu)
        return _named((made.features,), made.labels)

    def _features(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, rows in enumerate(all_rows(self.records, self.chunk_records)):
            (features,), labels = self.features(rows, (0, number))
            yield features, self.labels.told(labels, rows)


def bound_of(options: Options) -> Bound | None:
    """Return how activations are bounded before noise; the delivered model does it too."""
    if not options.private or options.class_scores:
        return None
    if options.release == "central-dp":
        return lambda tensors: (normalise(tensors[0]),)
    clipping = GaussianRelease(options.privacy_unit, options.clip, 0.0)
    return lambda tensors: tuple(clipping.joint(tensors))


def _named(tensors: Tensors, labels: Tensor) -> Mapping[str, Tensor]:
    named = {f"{ACTIVATIONS}/{i}": tensor for i, tensor in enumerate(tensors)}
    return {**named, LABELS: labels}
