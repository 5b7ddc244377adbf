"""The shared test task, with a note of which process served which node."""

import os
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


def note_process(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    folder = Path(str(context.run_config["run-dir"]))
    with (folder / "processes").open("a") as file:
        file.write(f"{context.node_id} {os.getpid()}\n")
    return call_next(message, context)


app = cooper_client(Task(), mods=[note_process])
