"""What a run's options and its account amount to, as a statement."""

from __future__ import annotations

from flwr_clicooper.chain.owner_release import OwnerRelease
from flwr_clicooper.options import Options
from flwr_clicooper.privacy.accounting import composed, epsilon_of, mu_for
from flwr_clicooper.privacy.class_scores import FIT_SHARE
from flwr_clicooper.privacy.statement import Guarantee, Mechanism, Statement
from flwr_clicooper.privacy.statistics import ROUNDS

_FLOATS = (
    "how noise is made: attacks on the rounding of floating-point noise (Mironov, 2012) are "
    "not excluded. Noise is made of the key stream of AES-256, with a new key from the system "
    "for each block of 262,144 numbers."
)
_OWN_FIGURES = (
    "the held-out accuracy and loss that the owner reports; they are computed without noise."
)
_LOSSES = "the training losses and times that trainers report to the relay."
_GROUPS = (
    "which records share a class. The key hides the names of classes, not the groups: who "
    "compares the activations of pseudo-classes can merge those that belong together."
)
_HEAD_TRAINS = (
    "the data: activations of each step and the gradients that return to the owner are "
    "functions of single records, and can be inverted."
)


def statement_of(release: OwnerRelease, made: int) -> Statement:
    """Return the statement of a run.

    Parameters
    ----------
    release : OwnerRelease
        What the owner releases.
    made : int
        How often each record's activation has been released, or will be.
    """
    options = release.options
    mechanism, activations = _activations(release, made) if options.private else (None, ())
    labels, label_words = _labels(options)
    return Statement(
        release=options.release,
        records=release.records,
        head=options.head if options.private else "",
        mechanism=mechanism,
        activations=activations,
        labels=labels,
        both=_both(options, activations, labels),
        label_words=label_words,
        not_covered=_not_covered(options),
    )


def _activations(release: OwnerRelease, made: int) -> tuple[Mechanism, tuple[Guarantee, ...]]:
    options = release.options
    if options.release == "central-dp":
        name = (
            "synthetic records, which follow from Gaussian-noised sums over all records alone "
            "(class counts, mean and second moment of the features, and what a linear "
            f"classifier gets wrong, {ROUNDS} times); no record's activation or label itself"
        )
        parameters = {"mu": mu_for(options.epsilon, options.delta)}
        guarantee = Guarantee("record", options.epsilon, options.delta)
        return Mechanism(name, parameters, 1), (guarantee,)
    if release.scores is not None:
        return _class_scores(release)
    noise = release.mechanism
    # The noise was chosen for all releases that are allowed; fewer cost less.
    mu = composed([release.sensitivity / noise.sigma] * max(1, made))
    unit = Guarantee(options.privacy_unit, epsilon_of(options.delta, mu), options.delta)
    guarantees: tuple[Guarantee, ...] = (unit,)
    if options.privacy_unit == "element":
        whole = mu * release.elements**0.5
        guarantees += (Guarantee("record", epsilon_of(options.delta, whole), options.delta),)
    name = f"activations clipped per {options.privacy_unit} with Gaussian noise added"
    parameters = {"clip": noise.clip, "sigma": noise.sigma}
    return Mechanism(name, parameters, max(1, made)), guarantees


def _class_scores(release: OwnerRelease) -> tuple[Mechanism, tuple[Guarantee, ...]]:
    options = release.options
    name = (
        "of each the Gaussian-noised scores of a classifier, which was fitted to "
        "Gaussian-noised sums over all records"
    )
    parameters = {"sigma": release.mechanism.sigma, "share of fitting": FIT_SHARE}
    guarantee = Guarantee("record", options.epsilon, options.delta)
    return Mechanism(name, parameters, 1), (guarantee,)


def _labels(options: Options) -> tuple[tuple[Guarantee, ...], str]:
    if options.release == "central-dp":
        secret = " Their classes have secret names." if options.label_expansion else ""
        return (), f"Labels are synthetic and covered by the same guarantee.{secret}"
    guarantees: tuple[Guarantee, ...] = ()
    words = []
    if options.label_epsilon:
        guarantees = (Guarantee("label", options.label_epsilon, 0.0),)
        words.append(
            "Each label was replaced once by randomised response before anything was computed "
            f"from it: (epsilon, delta) = {guarantees[0]}."
        )
    if options.label_side == "owner":
        words.append("Labels stay with the owner, which computes the loss.")
    elif options.label_expansion:
        words.append(
            f"The last trainer gets pseudo-classes, {options.label_expansion} for each class, "
            "whose names only the owner's key gives."
        )
    else:
        words.append("The last trainer gets the labels under their names.")
    return guarantees, " ".join(words)


def _both(
    options: Options, activations: tuple[Guarantee, ...], labels: tuple[Guarantee, ...]
) -> tuple[Guarantee, ...]:
    if options.release == "central-dp":
        return activations
    if not (activations and labels):
        return ()
    record, label = activations[-1], labels[0]
    return (Guarantee("record", record.epsilon + label.epsilon, record.delta),)


def _not_covered(options: Options) -> tuple[str, ...]:
    found = []
    if options.head_trains:
        found.append(_HEAD_TRAINS)
    elif not options.private:
        found.append("the data: activations as they are can be inverted.")
    if options.release != "central-dp":
        if options.label_side == "owner" and not options.label_epsilon:
            found.append("labels: the gradients that the owner sends back depend on them.")
        if options.label_side == "trainer" and not options.label_epsilon:
            plain = "labels: the last trainer sees the label of each record."
            found.append(_GROUPS if options.label_expansion else plain)
    if not options.private:
        found.append(_LOSSES)
    else:
        found.append(_FLOATS)
    return (*found, _OWN_FIGURES)
