"""The ClientApp of the owner and of every trainer. Imports PyTorch only when needed."""

from __future__ import annotations

from collections.abc import Callable
from logging import ERROR

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.logger import log

from flwr_clicooper.chain.messages import PROTOCOL, Action, Header, answer, refusal
from flwr_clicooper.chain.roles import OWNER, role_of
from flwr_clicooper.chain.sealing import seal_mod
from flwr_clicooper.options import task_config
from flwr_clicooper.task import SplitTask


def cooper_client(task: SplitTask, mods: list[Mod] | None = None) -> ClientApp:
    """Return the ClientApp that owner and trainers run.

    Parameters
    ----------
    task : SplitTask
        The training job.
    mods : list of Mod, optional
        Flower mods, applied to every message of the chain. They see tensors as the party
        does: opened before them and sealed after them.

    Returns
    -------
    ClientApp
        Answers the chain's messages. The node config says who the node is:
        ``role="owner"``, ``role="trainer" stage=1``, or ``role="trainer"`` for a
        standby; a simulated node's place is its ``partition-id``.

    Raises
    ------
    TypeError
        ``task`` is not a `SplitTask`.
    """
    if not isinstance(task, SplitTask):
        raise TypeError(f"cooper_client() takes a SplitTask, not {type(task).__name__}")
    app = ClientApp(mods=[_answer_errors, seal_mod, *(mods or [])])
    for action in Action:
        category, name = action.value.split(".")
        register = {"query": app.query, "train": app.train, "evaluate": app.evaluate}
        handle = _live(app) if action is Action.LIVE else _handler(task, action)
        register[category](name)(handle)
    return app


def _handler(task: SplitTask, action: Action) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        if action is Action.HELLO:
            return _hello(task, message, context)
        from flwr_clicooper.chain.serve import serve

        return serve(task, action, message, context)

    return handle


def _live(app: ClientApp) -> ClientAppCallable:
    """Serve requests over a stream to the relay, by the same app with the same mods."""

    def handle(message: Message, context: Context) -> Message:
        from flwr_clicooper.grids.dial import Line

        header = Header.of(message)
        names = ("address", "certificate", "token")
        invitation = {name: header.get(name, str) for name in names}
        line = Line(invitation, context.node_id)
        served = line.serve(lambda request: app(message=request, context=context))
        return answer(message, {"served": served})

    return handle


def _answer_errors(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Turn every failure, of a mod too, into an answer that holds no data.

    Flower would send the text of an exception to the ServerApp.
    """
    try:
        return call_next(message, context)
    except Exception as error:
        log(ERROR, "%s failed on this node", message.metadata.message_type, exc_info=error)
        return refusal(message, error)


def _hello(task: SplitTask, message: Message, context: Context) -> Message:
    """Say who this node is; the owner also says how many trainers the model needs."""
    role = role_of(context.node_config)
    config = task_config(context.run_config, context.node_config)
    fields = {
        "protocol": PROTOCOL,
        "role": role.name,
        "stage": role.stage,
        "simulated": role.simulated,
    }
    if role.name == OWNER:
        from flwr_clicooper.chain.build import build_segments, trainers_for

        fields["trainers"] = trainers_for(build_segments(task, config), config)
    return answer(message, fields)
