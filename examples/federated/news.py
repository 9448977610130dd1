"""The Flower app: a server and clients that train adapters and a head together; the frozen base stays where it is.

Client `p` of `n` holds the texts of every n-th class alone, from the p-th on. `federated_news.py` starts it all.
"""

import tempfile
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, FedProx, Strategy
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_freeze import AutoFreezeModelForSequenceClassification, BottleneckConfig, trainable_summary
from hf_freeze.data import Split, check_model, compute_metrics, load_corpus, tokenize
from hf_freeze.federated import BASE, base_hash, load_arrays, to_arrays, traffic, train_round

server = ServerApp()
client = ClientApp()


def make_trainer(config: dict[str, Any], classes: slice = slice(None), server_round: int = 0) -> Trainer:
    """Makes a Trainer with the frozen base, new adapters and a head, and the texts of some classes."""
    corpus = load_corpus(config["dataset"], seed=config["seed"], limit=config["limit"])
    kept = set(range(len(corpus.label_names))[classes])
    pairs = [pair for pair in zip(corpus.train.texts, corpus.train.labels, strict=True) if pair[1] in kept]
    name = check_model(config["model"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    set_seed(config["seed"])  # the same adapters and head on all sides: they do not travel before the first round
    model = AutoFreezeModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(corpus.label_names),
        freeze="embeddings, layers",
        adapter=BottleneckConfig(bottleneck_size=32),
    )
    return Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            learning_rate=config["learning-rate"],
            lr_scheduler_type="constant",
            num_train_epochs=config["epochs"],
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=config["seed"] + server_round,  # other batches and dropout in each round
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenize(Split(*map(tuple, zip(*pairs, strict=True))), tokenizer, config["max-length"]),
        eval_dataset=tokenize(corpus.test, tokenizer, config["max-length"]),
        compute_metrics=compute_metrics,
    )


def private(message: Message, context: Context, next_step: Any) -> Message:
    """Clips and blurs what a client sends, if the run asks for it, by Flower's own module."""
    config = context.run_config
    if config["privacy"] != "local":
        return next_step(message, context)
    return LocalDpMod(config["clipping"], config["clipping"], config["epsilon"], 1e-5)(message, context, next_step)


@client.train(mods=[private])
def train(message: Message, context: Context) -> Message:
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    server_round = int(message.content["config"]["server-round"])
    return train_round(message, make_trainer(context.run_config, slice(part, None, parts), server_round))


def make_strategy(config: dict[str, Any]) -> Strategy:
    # one client is enough to go on: those that die in a round, or before it, are left out
    options = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    strategy = FedProx(proximal_mu=config["mu"], **options) if config["mu"] else FedAvg(**options)
    if config["privacy"] == "central":
        strategy = DifferentialPrivacyServerSideFixedClipping(
            strategy, config["noise"], config["clipping"], config["clients"]
        )
    return strategy


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    trainer = make_trainer(config)
    model = trainer.model
    if not 0 < config["clients"] <= model.config.num_labels:
        raise ValueError(f"{config['clients']} clients can't share out {model.config.num_labels} classes.")
    print(trainable_summary(model))
    arrays = to_arrays(model)
    print(traffic(model, arrays), flush=True)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_arrays(model, arrays)
        found = trainer.evaluate(metric_key_prefix="test")
        print(f"round {server_round}: test accuracy {found['test_accuracy']:.3f}", flush=True)
        return MetricRecord({"test_accuracy": found["test_accuracy"]})

    while len(list(grid.get_node_ids())) < config["clients"]:
        time.sleep(1)
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
