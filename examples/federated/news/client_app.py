"""A client: trains what has come on its own texts, and sends back what trains; the frozen base stays with it.

Client `p` of `n` holds the texts of every n-th class alone, from the p-th on.
"""

from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod

from hf_freeze.federated import train_round

from .task import make_trainer

app = ClientApp()


def private(message: Message, context: Context, next_step: Any) -> Message:
    """Clips and blurs what a client sends, if the run asks for it, by Flower's own module."""
    config = context.run_config
    if config["privacy"] != "local":
        return next_step(message, context)

    def step(message: Message, context: Context) -> Message:
        reply = next_step(message, context)
        del reply.content["metrics"]["train_loss"]  # which nothing blurs
        np.random.seed()  # noise from the run's seed could be drawn again, and taken off
        return reply

    # the steps of two clients, each at most this long, can be twice as far from each other
    return LocalDpMod(config["clipping"], 2 * config["clipping"], config["epsilon"], 1e-5)(message, context, step)


@app.train(mods=[private])
def train(message: Message, context: Context) -> Message:
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    server_round = int(message.content["config"]["server-round"])
    return train_round(message, make_trainer(context.run_config, slice(part, None, parts), server_round))
