"""The shared test task, with a note of which process served which node."""

import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from flwr_clicooper import cooper_client
from tests.tasks import ConvTask


class Task(ConvTask):
    def datasets(self, config: Any) -> Any:
        if config["task.fail"]:
            raise RuntimeError("asked to fail")
        return super().datasets(config)


def pause(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Slow training down, so that a test can disturb it in the middle."""
    if message.metadata.message_type == "train.forward":
        time.sleep(float(context.run_config["task.pause"]))
    return call_next(message, context)


def note_process(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    folder = Path(str(context.run_config["run-dir"]))
    with (folder / "processes").open("a") as file:
        file.write(f"{context.node_id} {os.getpid()}\n")
    return call_next(message, context)


app = cooper_client(Task(), mods=[note_process, pause])
