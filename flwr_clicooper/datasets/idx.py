"""The idx format of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flwr_clicooper.errors import DataError

MAX_BYTES = 2**30


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Return the array of an idx file of unsigned bytes.

    Parameters
    ----------
    path : str or Path
        The file; a name that ends in ``.gz`` is decompressed.

    Raises
    ------
    DataError
        The file is not an idx file of unsigned bytes, is cut short, or declares more
        than 1 GiB.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            zeros, dtype, dimensions = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or dtype != 0x08 or not 1 <= dimensions <= 4:
                raise DataError(f"{path.name} is not an idx file of unsigned bytes")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            count = math.prod(shape)
            if count > MAX_BYTES:
                raise DataError(f"{path.name} declares {count:,} bytes; at most 1 GiB is read")
            data = file.read(count + 1)
    except (struct.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path.name} is not an idx file, or it is cut short") from error
    if len(data) != count:
        raise DataError(f"{path.name} does not hold the {count:,} bytes that it declares")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
