"""What a run protects, in words and as JSON. No epsilon is given without its unit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "flwr-clicooper/privacy/v1"
ADJACENCY = "replace-one"
"""Two data sets are neighbours if one record, or one unit of it, has another value."""


@dataclass(frozen=True)
class Guarantee:
    """A differential privacy guarantee.

    Attributes
    ----------
    unit : str
        What is protected: ``record``, ``element`` (one coordinate of one record's
        activation), or ``label`` (the label of one record).
    epsilon, delta : float
        Of everything that was released together.
    """

    unit: str
    epsilon: float
    delta: float

    def __str__(self) -> str:
        return f"({self.epsilon:.4g}, {self.delta:.3g}) per {self.unit}"


@dataclass(frozen=True)
class Mechanism:
    """How a release was made.

    Attributes
    ----------
    name : str
        In words.
    parameters : dict of str to float
        What fixes it: clip, sigma, and so on.
    releases : int
        How often each record was released.
    """

    name: str
    parameters: dict[str, float]
    releases: int


@dataclass(frozen=True)
class Statement:
    """What a run releases about the owner's data, and what that guarantees.

    Attributes
    ----------
    release : str
        The run's option.
    records : int
        Training records; public, as is the number of classes.
    head : str
        What the owner declared its head to be; empty where no guarantee rests on it.
    mechanism : Mechanism or None
        Of the activations; None where they leave as they are.
    activations, labels, both : tuple of Guarantee
        Per unit; empty for no guarantee. `both` is of one record's activation and label
        together.
    label_words : str
        What happens to the labels, in a sentence.
    not_covered : tuple of str
        What nobody should read into it, a sentence each.
    """

    release: str
    records: int
    head: str
    mechanism: Mechanism | None
    activations: tuple[Guarantee, ...]
    labels: tuple[Guarantee, ...]
    both: tuple[Guarantee, ...]
    label_words: str
    not_covered: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the statement as JSON values, the words among them."""
        values = {key.replace("_", "-"): value for key, value in asdict(self).items()}
        return {"format": FORMAT, "adjacency": ADJACENCY, **values, "words": self.words()}

    def words(self) -> str:
        """Return the statement in plain words, a sentence a line."""
        lines = [self._activations_in_words(), self.label_words]
        if self.both:
            both = " and ".join(map(str, self.both))
            lines.append(f"A record's activation and label together: {both}.")
        if self.activations or self.labels:
            lines.append(
                "It holds against the relay, all trainers together and whoever gets their "
                "files or the model, whatever they compute and for however long: what they "
                "do with a release adds nothing. A further run on the same records does: "
                "its epsilon and delta are added."
            )
        if self.head:
            lines.append(f"It rests on the head being {self.head}, as the owner declared.")
        return "\n".join([*lines, *(f"Not covered: {text}" for text in self.not_covered)])

    def _activations_in_words(self) -> str:
        if self.mechanism is None:
            how = (
                "a new activation of each record every round, from a head that trains"
                if self.release == "interactive"
                else "the activation of each record once"
            )
            return f"The owner sends {how}, as it is: there is no guarantee for activations."
        parameters = ", ".join(f"{k} {v:.4g}" for k, v in self.mechanism.parameters.items())
        times = "once" if self.mechanism.releases == 1 else f"{self.mechanism.releases} times"
        guarantees = "; ".join(map(str, self.activations))
        return (
            f"Of {self.records:,} records the owner released {self.mechanism.name}, {times} "
            f"({parameters}). This is differentially private with (epsilon, delta) = "
            f"{guarantees}, when one record is replaced by any other."
        )
