"""The label holder: the top model, on the embeddings of both feature holders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from logging import INFO

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from flwr_clicooper.grids.exchange import exchange

from .client_app import privacy
from .task import DELTA, EMBEDDING, EPOCHS, HOLDERS, epsilon_together, labels

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    records = int(context.run_config["records"])
    log(INFO, "held-out accuracy %.4f, AUC %.4f", *learn(grid, records))
    log(INFO, "%s", statement())


def learn(grid: Grid, records: int) -> tuple[float, float]:
    """Train for all epochs; return held-out accuracy and AUC."""
    while len(holders := sorted(grid.get_node_ids())) < len(HOLDERS):
        time.sleep(0.1)
    *train, held_out = labels(records)
    torch.manual_seed(0)
    width = EMBEDDING * len(holders)
    top = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(top.parameters(), lr=0.01)
    for _ in range(EPOCHS):
        for batch, y in enumerate(train):
            parts = [part.requires_grad_() for part in embeddings(grid, holders, batch)]
            loss = binary_cross_entropy_with_logits(top(torch.cat(parts, dim=1)), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            of_each = [part.grad * len(y) for part in parts if part.grad is not None]
            send(grid, holders, "train.apply_gradients", batch, of_each)
    # Held-out records have the same budget; the mean of their releases has less noise.
    asked = [torch.cat(embeddings(grid, holders, len(train)), dim=1) for _ in range(EPOCHS)]
    with torch.no_grad():
        return scores(top(torch.stack(asked).mean(0)), held_out)


def embeddings(grid: Grid, holders: list[int], batch: int) -> list[Tensor]:
    replies = send(grid, holders, "query.generate_embeddings", batch)
    records = [reply.content.array_records["embeddings"] for reply in replies]
    return [torch.from_numpy(record["0"].numpy()) for record in records]


def send(
    grid: Grid, holders: list[int], kind: str, batch: int, gradients: Sequence[Tensor] = ()
) -> list[Message]:
    """Ask all holders about a batch; return their replies in the holders' order."""
    messages = []
    for place, node in enumerate(holders):
        content = RecordDict({"config": ConfigRecord({"batch": batch})})
        if gradients:
            content["gradients"] = ArrayRecord([gradients[place].numpy()])
        messages.append(Message(content, node, kind))
    replies = exchange(grid, messages, timeout=60)
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a feature holder answered: {reply.error.reason}")
    return replies


def scores(logits: Tensor, y: Tensor) -> tuple[float, float]:
    rich, others = logits[y > 0].numpy(), logits[y == 0].numpy()
    auc = mannwhitneyu(rich, others).statistic / (len(rich) * len(others))
    return float(((logits > 0) == (y > 0)).float().mean()), float(auc)


def statement() -> str:
    one, both = epsilon_together(1), epsilon_together(len(HOLDERS))
    return (
        f"{privacy.statement()}\nHere the encoder learns with differential privacy; with it, "
        f"({one:.3g}, {DELTA:g}) per record of a holder, and ({both:.3g}, {DELTA:g}) for a "
        "person's records at both holders. Gradients tell the holders about the labels."
    )
