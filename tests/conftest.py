"""Set before PyTorch loads, here and in every process that a test starts.

Tensors of tests are tiny: threads that wait for each other would only make a busy machine
slow.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
