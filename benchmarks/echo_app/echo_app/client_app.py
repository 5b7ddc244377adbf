"""Sends back what comes."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flwr_clicooper.grids.dial import Line

app = ClientApp()


@app.train("echo")
def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@app.train("live")
def live(message: Message, context: Context) -> Message:
    invitation = {k: str(v) for k, v in message.content["clicooper"].items()}
    line = Line(invitation, context.node_id, patience=30)
    line.serve(lambda request: app(message=request, context=context))
    return Message(message.content, reply_to=message)
