from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from flwr_clicooper.datasets import CLASSES, fashion_mnist, load_arrays, read_idx
from flwr_clicooper.errors import DataError


def test_the_embedded_subset_is_whole_and_balanced() -> None:
    arrays = load_arrays()
    assert arrays["x_train"].shape == (12000, 28, 28)
    assert arrays["x_test"].shape == (2000, 28, 28)
    assert np.bincount(arrays["y_train"]).tolist() == [1200] * len(CLASSES)
    assert np.bincount(arrays["y_test"]).tolist() == [200] * len(CLASSES)


def test_images_are_normalised_and_labels_are_indices() -> None:
    train, test = fashion_mnist()
    x, y = train.tensors
    assert x.shape == (12000, 1, 28, 28)
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02
    assert y.dtype.is_signed
    assert len(test) == 2000


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_all(folder: Path, compress: bool) -> None:
    for name, array in [
        ("train-images-idx3-ubyte", np.full((3, 28, 28), 7)),
        ("train-labels-idx1-ubyte", np.array([0, 1, 2])),
        ("t10k-images-idx3-ubyte", np.zeros((2, 28, 28))),
        ("t10k-labels-idx1-ubyte", np.array([3, 4])),
    ]:
        data = idx(array)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [True, False])
def test_the_original_files_are_read(compress: bool, tmp_path: Path) -> None:
    write_all(tmp_path, compress)
    arrays = load_arrays(tmp_path)
    assert arrays["x_train"][2, 5, 5] == 7
    assert arrays["y_test"].tolist() == [3, 4]


def test_missing_files_and_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte\.gz nor"):
        load_arrays(tmp_path)
    write_all(tmp_path, False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([1])))
    with pytest.raises(DataError, match="train files"):
        load_arrays(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04....", "not an idx file of unsigned bytes"),
        (idx(np.zeros((2, 3)))[:-1], "does not hold the 6 bytes"),
        (idx(np.zeros((2, 3))) + b"x", "does not hold the 6 bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 1), "at most 1 GiB"),
        (struct.pack(">HBBI", 0, 0x0D, 1, 1) + b"\0" * 4, "unsigned bytes"),
    ],
)
def test_files_that_are_not_idx_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_a_gz_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(idx(np.zeros(3)))
    with pytest.raises(DataError, match="not an idx file"):
        read_idx(path)
    path.write_bytes(gzip.compress(idx(np.zeros(300)))[:-9])
    with pytest.raises(DataError, match="cut short"):
        read_idx(path)
