"""Data sets for examples: embedded Fashion-MNIST and UCI Adult, and original idx files."""

from flwr_clicooper.datasets.fashion_mnist import CLASSES, fashion_mnist, load_arrays
from flwr_clicooper.datasets.idx import read_idx
from flwr_clicooper.datasets.uci_adult import uci_adult

__all__ = ["CLASSES", "fashion_mnist", "load_arrays", "read_idx", "uci_adult"]
