"""Data sets for examples: the embedded Fashion-MNIST, and its original files."""

from flwr_clicooper.datasets.fashion_mnist import CLASSES, fashion_mnist, load_arrays
from flwr_clicooper.datasets.idx import read_idx

__all__ = ["CLASSES", "fashion_mnist", "load_arrays", "read_idx"]
