"""A feature holder: a linear encoder of its columns."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from flwr_clicooper.errors import MessageError, PrivacyBudgetExceeded
from flwr_clicooper.mods import ActivationDPMod
from flwr_clicooper.privacy.accounting import noise_for
from flwr_clicooper.privacy.release import GaussianRelease, add_noise

from .task import DELTA, EMBEDDING, EMBEDDINGS_EPSILON, EPOCHS, UPDATES_EPSILON, features


def batch_of(message: Message) -> int:
    """Return which batch is asked for. One number must name one set of records."""
    config: dict[str, Any] = dict(message.content.config_records["config"])
    if (number := int(config["batch"])) < 0:
        raise MessageError("batches have numbers of at least 0")
    return number


# On machines of their own, holders count over runs and restarts: ledger="~/releases.json".
privacy = ActivationDPMod(
    epsilon=EMBEDDINGS_EPSILON, delta=DELTA, releases=EPOCHS, count_by=batch_of
)
app = ClientApp(mods=[privacy])


@app.query("generate_embeddings")
def generate_embeddings(message: Message, context: Context) -> Message:
    embeddings = parts(context)[batch_of(message)] @ encoder(context)
    content = RecordDict({"embeddings": ArrayRecord([embeddings.numpy()])})
    return Message(content, reply_to=message)


@app.train("apply_gradients")
def apply_gradients(message: Message, context: Context) -> Message:
    """Step the encoder with differential privacy.

    Its weights mix all records and show in every later embedding. So each record's
    gradient is clipped, their sum is noised, and the steps that use a batch are counted.
    """
    count_step(context, str(batch := batch_of(message)))
    x, gradients = parts(context)[batch], message.content.array_records["gradients"]
    of_each = torch.einsum("ri,ro->rio", x, torch.from_numpy(gradients["0"].numpy()))
    step = GaussianRelease("record", clip=1.0, sigma=0.0).clipped(of_each).sum(0)
    add_noise(step, noise_for(UPDATES_EPSILON, DELTA, sensitivity=2.0, releases=EPOCHS))
    weights = encoder(context) - 5.0 / len(x) * step
    context.state["encoder"] = ArrayRecord([weights.numpy()])
    return Message(RecordDict(), reply_to=message)


def parts(context: Context) -> list[Tensor]:
    holder, records = context.node_config["partition-id"], context.run_config["records"]
    return features(int(holder), int(records))


def encoder(context: Context) -> Tensor:
    """Return the weights that `context.state` has, or the public ones of the start."""
    if "encoder" in context.state:
        return torch.from_numpy(context.state.array_records["encoder"]["0"].numpy())
    columns, seed = parts(context)[0].shape[1], torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(columns, EMBEDDING, generator=seed)


def count_step(context: Context, batch: str) -> None:
    made: dict[str, Any] = dict(context.state.config_records.get("steps", ConfigRecord()))
    if made.get(batch, 0) >= EPOCHS:
        raise PrivacyBudgetExceeded(f"batch {batch} has changed the encoder {EPOCHS} times")
    context.state["steps"] = ConfigRecord({**made, batch: made.get(batch, 0) + 1})
