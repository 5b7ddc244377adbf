"""The relay."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_clicooper import CooperStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    CooperStrategy.from_config(context.run_config).start(grid)
