"""The app that the owner and every trainer run."""

from flwr_clicooper import cooper_client
from throughput_app.task import ThroughputTask

app = cooper_client(ThroughputTask())
