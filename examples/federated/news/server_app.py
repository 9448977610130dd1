"""The server: sends out what trains, averages what comes back, and evaluates it on the test texts after each round."""

import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, FedProx, Strategy

from hf_freeze import trainable_summary
from hf_freeze.federated import BASE, base_hash, load_arrays, to_arrays, traffic

from .task import make_trainer

app = ServerApp()


def make_strategy(config: dict[str, Any]) -> Strategy:
    # one client is enough to go on: those that die in a round, or before it, are left out
    options = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = FedProx(proximal_mu=config["mu"], **options) if config["mu"] else FedAvg(**options)
    if config["privacy"] == "central":
        np.random.seed()  # noise from the run's seed could be drawn again, and taken off
        noise, clipping, clients = config["noise"], config["clipping"], config["clients"]
        strategy = DifferentialPrivacyServerSideFixedClipping(strategy, noise, clipping, clients)
    return strategy


def wait_for_clients(grid: Grid, count: int, seconds: float) -> None:
    """Waits until all clients have come.

    Raises:
        TimeoutError: some have not come in time, and how many.
    """
    end = time.monotonic() + seconds
    while (come := len(list(grid.get_node_ids()))) < count:
        if time.monotonic() >= end:
            raise TimeoutError(
                f"{come} of {count} clients have come within {seconds:g} s, {count - come} are missing. "
                f"Start a SuperNode for each, with partition-id and num-partitions={count} in its --node-config."
            )
        time.sleep(0.5)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    trainer = make_trainer(config)
    model = trainer.model
    if not 0 < config["clients"] <= model.config.num_labels:
        raise ValueError(f"{config['clients']} clients can't share out {model.config.num_labels} classes.")
    if config["privacy"] not in ("none", "local", "central"):
        raise ValueError(f"privacy is {config['privacy']!r}. Set it to 'none', 'local' or 'central'.")
    print(trainable_summary(model))
    arrays = to_arrays(model)
    print(traffic(model, arrays), flush=True)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_arrays(model, arrays)
        found = trainer.evaluate(metric_key_prefix="test")
        print(f"round {server_round}: test accuracy {found['test_accuracy']:.3f}", flush=True)
        return MetricRecord({"test_accuracy": found["test_accuracy"]})

    wait_for_clients(grid, config["clients"], config["wait"])
    make_strategy(config).start(
        grid,
        arrays,
        num_rounds=config["rounds"],
        timeout=config["timeout"],
        train_config=ConfigRecord({BASE: base_hash(model)}),
        evaluate_fn=evaluate,
    )
    model.save_pretrained(config["output"])  # the adapters and what trained with them, as they were last evaluated
    print(f"saved adapters and head to {config['output']}", flush=True)
