"""A node of somebody else's app, for the tests of mods."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_clicooper import LocalGrid


class Node:
    """A ClientApp that answers ``query.features`` with given content, and its context."""

    def __init__(self, content: RecordDict | Error, *mods: Any) -> None:
        self.app = ClientApp(mods=list(mods))
        self.content = content
        self.app.query("features")(lambda m, _: Message(self.content, reply_to=m))
        self.context = self.another_context()

    def another_context(self) -> Context:
        """The context of a node in another run."""
        return next(iter(LocalGrid(self.app, [{}], {}).contexts.values()))

    def ask(self, context: Context | None = None, **config: Any) -> RecordDict:
        return self.message(context, **config).content

    def message(self, context: Context | None = None, **config: Any) -> Message:
        content = RecordDict({"config": ConfigRecord(config)})
        request = Message(content, self.context.node_id, "query.features")
        return self.app(message=request, context=context or self.context)


def arrays(**values: Any) -> RecordDict:
    return RecordDict({"embeddings": ArrayRecord({k: Array(v) for k, v in values.items()})})


def random(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


def received(content: RecordDict, name: str) -> np.ndarray:
    return content.array_records["embeddings"][name].numpy()
