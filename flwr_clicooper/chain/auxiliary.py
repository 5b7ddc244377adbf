"""A trainer's own small classifier, for the `local` schedule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flwr_clicooper.errors import SplitError
from flwr_clicooper.split.batches import derive_seed
from flwr_clicooper.split.modules import seeded
from flwr_clicooper.split.specs import TensorSpec, describe


class WithAuxiliary(nn.Module):
    """A segment followed by a linear classifier on its pooled output.

    Images ``[C, H, W]`` are averaged over H and W, sequences ``[T, D]`` over T. The
    classifier stays with the trainer; only the segment is delivered.

    Parameters
    ----------
    segment : nn.Module
        Trained together with the classifier; its first output is classified.
    outgoing : sequence of TensorSpec
        What the segment gives.
    classes : int
        Width of the model's output.
    seed : int
        The run's public seed.

    Raises
    ------
    SplitError
        The segment's first output is not floating point.
    """

    def __init__(
        self, segment: nn.Module, outgoing: Sequence[TensorSpec], classes: int, seed: int
    ) -> None:
        super().__init__()
        spec = outgoing[0]
        if not spec.dtype.is_floating_point or not spec.shape:
            raise SplitError(
                f"schedule = 'local' needs features to classify; the segment gives "
                f"{describe(outgoing)}"
            )
        self.segment = segment
        self.token_axis = len(spec.shape) == 2
        features = spec.shape[-1] if self.token_axis else spec.shape[0]
        with seeded(derive_seed(seed, "auxiliary")):
            self.classifier = nn.Linear(features, classes, dtype=spec.dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return class scores, shape ``[batch, classes]``."""
        value = self.segment(*inputs)
        features: Tensor = value[0] if isinstance(value, (tuple, list)) else value
        if self.token_axis:
            features = features.mean(dim=1)
        elif features.dim() > 2:
            features = features.flatten(2).mean(dim=2)
        scores: Tensor = self.classifier(features)
        return scores
