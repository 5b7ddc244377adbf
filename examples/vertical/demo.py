"""The vertical app in one process, with and without the mod; the encoder's noise is in both.

python -m examples.vertical.demo
"""

from flwr.clientapp import ClientApp

from examples.vertical.vertical.client_app import app, apply_gradients, generate_embeddings
from examples.vertical.vertical.server_app import learn, statement
from examples.vertical.vertical.task import labels
from flwr_clicooper import LocalGrid

NODES = [{"partition-id": 0}, {"partition-id": 1}]


def main() -> None:
    plain = ClientApp()
    plain.query("generate_embeddings")(generate_embeddings)
    plain.train("apply_gradients")(apply_gradients)
    print(f"majority class:  held-out accuracy {1 - labels(0)[-1].mean():.4f}, AUC 0.5000")
    for name, each in (("without the mod", plain), ("with the mod", app)):
        accuracy, auc = learn(LocalGrid(each, NODES, {"records": 0}), records=0)
        print(f"{name + ':':16} held-out accuracy {accuracy:.4f}, AUC {auc:.4f}")
    print(statement())


if __name__ == "__main__":
    main()
