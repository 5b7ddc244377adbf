"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence).

The embedded file holds 12,000 training and 2,000 held-out images, balanced by class,
from the original split of 60,000 and 10,000.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flwr_clicooper.datasets.idx import read_idx
from flwr_clicooper.errors import DataError

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_EMBEDDED = "fashion_mnist_12k.npz"
_IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Mean and standard deviation of the original 60,000 training images, public constants.
_MEAN, _STD = 0.2860, 0.3530


def load_arrays(data_dir: str | Path = "") -> dict[str, NDArray[np.uint8]]:
    """Return the images and labels as unsigned bytes.

    Parameters
    ----------
    data_dir : str or Path
        Folder with the four original idx files, gzipped or not. Empty for the embedded
        subset.

    Returns
    -------
    dict
        ``x_train`` and ``x_test`` of shape ``[n, 28, 28]``, ``y_train`` and ``y_test`` of
        shape ``[n]``.

    Raises
    ------
    DataError
        A file is missing or damaged, or the shapes do not fit.
    """
    if not data_dir:
        with as_file(files(__package__) / _EMBEDDED) as path, np.load(path) as arrays:
            return {name: arrays[name] for name in _IDX}
    folder = Path(data_dir).expanduser()
    arrays = {}
    for key, name in _IDX.items():
        found = [p for p in (folder / f"{name}.gz", folder / name) if p.is_file()]
        if not found:
            raise DataError(f"{folder} has neither {name}.gz nor {name}")
        arrays[key] = read_idx(found[0])
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.shape[1:] != (28, 28) or y.shape != x.shape[:1]:
            raise DataError(
                f"the {part} files in {folder} have shapes {x.shape} and {y.shape}"
            )
    return arrays


def fashion_mnist(data_dir: str | Path = "") -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the held-out set, normalised with public constants.

    Parameters
    ----------
    data_dir : str or Path
        As in `load_arrays`.

    Returns
    -------
    tuple of TensorDataset
        Images float32 ``[n, 1, 28, 28]``, labels int64 ``[n]``.
    """
    import torch
    from torch.utils.data import TensorDataset

    arrays = load_arrays(data_dir)

    def part(name: str) -> TensorDataset:
        images = torch.from_numpy(arrays[f"x_{name}"].copy()).float().div_(255.0)
        images.sub_(_MEAN).div_(_STD)
        labels = torch.from_numpy(arrays[f"y_{name}"].astype(np.int64))
        return TensorDataset(images.unsqueeze(1), labels)

    return part("train"), part("test")
