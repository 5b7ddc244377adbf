"""Client-cooperative split learning for Flower.

One *owner* keeps the data and the first segment of a model; *trainers* in a chain
train one further segment each; Flower carries cut-layer activations forward and
gradients back. In five minutes:

1. Write a task: the segments, the data sets (`SplitTask`). One ``nn.Module`` and the
   names of cut layers give segments too (`split_model`).
2. ``app = cooper_client(MyTask())`` is the ClientApp of the owner and of all trainers.
3. ``CooperStrategy.from_config(context.run_config).start(grid)`` is the ServerApp.
4. ``LocalGrid(app, node_configs=[...], run_config={...})`` runs the same in one
   process, for tests and notebooks.
5. ``load_delivered(run_dir, task)`` gives the trained model back.

Read in this order: ``task.py``, ``chain/strategy.py``, ``chain/trainer.py``,
``split/segment.py``. Importing this package does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flwr_clicooper.errors import CooperError
from flwr_clicooper.task import SplitTask

if TYPE_CHECKING:
    from flwr_clicooper.chain.client import cooper_client
    from flwr_clicooper.chain.delivered import load_delivered
    from flwr_clicooper.chain.strategy import CooperStrategy
    from flwr_clicooper.grids.live import LiveGrid
    from flwr_clicooper.grids.local import LocalGrid
    from flwr_clicooper.split.plan import SplitPlan, split_model

__version__ = "0.1.0"

_LAZY = {
    "CooperStrategy": "flwr_clicooper.chain.strategy",
    "LiveGrid": "flwr_clicooper.grids.live",
    "LocalGrid": "flwr_clicooper.grids.local",
    "SplitPlan": "flwr_clicooper.split.plan",
    "cooper_client": "flwr_clicooper.chain.client",
    "load_delivered": "flwr_clicooper.chain.delivered",
    "split_model": "flwr_clicooper.split.plan",
}

__all__ = [
    "CooperError",
    "CooperStrategy",
    "LiveGrid",
    "LocalGrid",
    "SplitPlan",
    "SplitTask",
    "cooper_client",
    "load_delivered",
    "split_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
