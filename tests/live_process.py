"""One node of a `ProcessGrid`: serves its live link in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flwr_clicooper import LocalGrid, cooper_client
from tests.tasks import ConvTask

ROOT = Path(__file__).parents[1]


class ProcessGrid(LocalGrid):
    """Answers ``query.hello`` here; a live link is served by a process per node.

    The mailbox of a federation, as far as a run over live links needs it. The task is a
    `ConvTask`, whose size the run config's ``task.middle`` gives.
    """

    warm = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.processes: dict[str, tuple[subprocess.Popen[str], Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            if message.metadata.message_type != "train.live":
                ids += super().push_messages([message])
                continue
            message_id = f"process-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = message_id
            self.processes[message_id] = self.start(message), message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        found = list(super().pull_messages(wanted))
        for message_id in set(wanted) & self.processes.keys():
            process, message = self.processes[message_id]
            if process.poll() is not None:
                del self.processes[message_id]
                assert process.stdout is not None
                fields = json.loads(process.stdout.read().splitlines()[-1])
                content = RecordDict({"clicooper": ConfigRecord(fields)})
                found.append(Message(content, reply_to=message))
        return found

    def start(self, message: Message) -> subprocess.Popen[str]:
        context = self.contexts[message.metadata.dst_node_id]
        facts = {
            "node_id": context.node_id,
            "run_id": self.run.run_id,
            "node_config": context.node_config,
            "run_config": context.run_config,
            "header": dict(message.content["clicooper"]),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.live_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(facts))
        process.stdin.close()
        return process


def main() -> None:
    facts = json.loads(sys.stdin.read())
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = facts["run_id"], 1, 1
    names = ("run_id", "node_id", "node_config", "run_config")
    context = Context(**{name: facts[name] for name in names}, state=RecordDict())
    content = RecordDict({"clicooper": ConfigRecord(facts["header"])})
    message = Message(content, facts["node_id"], "train.live", ttl=600.0)
    app = cooper_client(ConvTask(facts["run_config"]["task.middle"]))
    print(json.dumps(dict(app(message=message, context=context).content["clicooper"])))


if __name__ == "__main__":
    main()
