"""What a user writes: the model, the data, the optimizer, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import Dataset

Config = Mapping[str, Any]


def outputs_for(classes: int, config: Config) -> int:
    """Return how many outputs a model needs: more than classes with ``label-expansion``.

    Parameters
    ----------
    classes : int
        True classes.
    config : mapping
        What `SplitTask.segments` gets.
    """
    return classes * max(1, int(config["label-expansion"]))


class SplitTask:
    """One training job: subclass it and give the segments and the data.

    Every party runs the same task. ``config`` holds the run options with their
    defaults, the user's own ``task.*`` keys, and the node's ``data-dir``.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import TensorDataset
    >>> class Toy(SplitTask):
    ...     def segments(self, config):
    ...         return [nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2))]
    ...     def datasets(self, config):
    ...         x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    ...         return TensorDataset(x, y), TensorDataset(x, y)
    """

    def segments(self, config: Config) -> Sequence[nn.Module]:
        """Return ``[head, segment 1, ..., segment N]``, and the tail if the owner keeps it.

        With ``label-side = "trainer"`` there are N + 1 segments for N trainers; with
        ``"owner"`` there are N + 2, and the last one stays with the owner. PyTorch's
        generator is seeded with the run's seed before the call, so all parties start
        from the same weights. A segment takes one positional argument per tensor that
        crosses the cut before it, and returns a tensor or a tuple of tensors; the last
        one returns one tensor. Segments train in ``train()`` mode; a layer that must stay
        frozen overrides ``train()``.

        Called once per process that needs it, so it must give the same each time.
        """
        raise NotImplementedError(f"{type(self).__name__} must define segments(config)")

    def datasets(self, config: Config) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return the training and the held-out set; called on the owner only.

        Both have a length, and each item is ``(input, label)``; the input is a tensor
        or a tuple of tensors. For the default loss a label is a class index.

        Called once per process that needs it, with PyTorch's, NumPy's and Python's
        generators seeded, so it must give the same data each time. Random augmentation in
        ``__getitem__`` is seeded too, by the place of the micro-batch in the run.
        """
        raise NotImplementedError(f"{type(self).__name__} must define datasets(config)")

    def optimizer(self, segment: nn.Module, config: Config) -> Optimizer:
        """Return the optimizer of one segment; SGD with momentum 0.9 by default.

        Not called for a segment without trainable parameters.
        """
        import torch

        trainable = [p for p in segment.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=config["learning-rate"], momentum=0.9)

    def lr_factor(self, progress: float, config: Config) -> float:
        """Return what the learning rate is multiplied by; 1 by default.

        ``progress`` is the share of the run's optimizer steps that are done, from 0 to
        below 1. The factor depends on nothing else, so it survives a lost process.
        """
        return 1.0

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the records; cross-entropy by default.

        It must be a mean over records, else micro-batches would change the result.
        """
        from torch.nn import functional

        return functional.cross_entropy(outputs, labels)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return which records are right, for accuracy; the top class by default."""
        classes = labels.argmax(dim=1) if labels.shape == outputs.shape else labels
        return outputs.argmax(dim=1) == classes

    @property
    def classifies(self) -> bool:
        """Whether labels are class indices below the width of the outputs.

        True for the default loss; then labels out of range are refused before training.
        """
        return type(self).loss is SplitTask.loss

    @property
    def measures_accuracy(self) -> bool:
        """Whether accuracy means something: for class labels, or with an own `correct`."""
        return self.classifies or type(self).correct is not SplitTask.correct
