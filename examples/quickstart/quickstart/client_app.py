"""The app that the owner and every trainer run."""

from flwr_clicooper import cooper_client
from quickstart.task import FashionTask

app = cooper_client(FashionTask())
