"""Federated fine-tuning: what travels, what is refused, FedProx's pull, and a real federation on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from example_scripts import EXAMPLES, load
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

from hf_freeze import BottleneckConfig, freeze, unfreeze
from hf_freeze.data import embedded_model_path
from hf_freeze.errors import FederatedError
from hf_freeze.federated import (
    BASE,
    ProximalTerm,
    base_hash,
    load_arrays,
    to_arrays,
    traffic,
    train_round,
    travelling_tensors,
)

APP = EXAMPLES / "federated"
SECONDS = 240  # at most, for a federation
needs_flwr = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs the extra 'federated'")


def adapted(make_bert, seed: int = 0) -> BertForSequenceClassification:
    """A frozen BERT with adapters and a head that train; the seed draws the adapters alone."""
    model = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    freeze(model, "base")
    torch.manual_seed(seed)
    model.add_adapter(BottleneckConfig(bottleneck_size=4, modules_to_save=["classifier"]))
    model.accepts_loss_kwargs = False  # else the Trainer does not divide the loss by the accumulation steps
    return model


def trainer(model: nn.Module, folder: Path, seed: int = 0, rows: int = 8, **options) -> Trainer:
    draw = torch.Generator().manual_seed(seed)
    features = [
        {"input_ids": torch.randint(1, 100, (6,), generator=draw), "labels": torch.tensor(row % 2)}
        for row in range(rows)
    ]
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(folder), **{"per_device_train_batch_size": 4, **settings, **quiet, **options})
    return Trainer(model, args, train_dataset=features)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in travelling_tensors(model).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# What travels.


def test_adapters_and_head_travel_and_the_base_does_not(make_bert):
    names = set(travelling_tensors(adapted(make_bert)))

    assert {name for name in names if ".bottleneck_" not in name} == {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    }
    assert len(names) == 2 * 4 + 2  # two layers with a matrix down and one up, and their biases; and the head


def test_a_wrapped_model_sends_the_same(make_bert):
    base = make_bert()
    wrapped = get_peft_model(base, BottleneckConfig(bottleneck_size=4, modules_to_save=["classifier"]))

    inside = {name.removeprefix("base_model.model.") for name in travelling_tensors(wrapped)}
    assert inside == set(travelling_tensors(adapted(make_bert)))


def test_what_was_thawed_travels_also_when_it_is_frozen_again(make_bert):
    model = adapted(make_bert)
    thawed = unfreeze(model, "layers[-1]")
    freeze(model, "layers[-1]")

    base = {name for name in thawed if "adapter" not in name}
    assert base and base <= set(travelling_tensors(model))


def test_live_statistics_travel_and_counts_stay():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    freeze(model, "0, 1")

    buffers = [name for name in travelling_tensors(model) if name not in dict(model.named_parameters())]
    assert buffers == ["3.running_mean", "3.running_var"]


def test_statistics_of_a_head_that_peft_trains_travel_too(make_bert):
    model = make_bert()
    model.classifier = nn.Sequential(nn.Linear(32, 2), nn.BatchNorm1d(2))
    freeze(model, "base")
    model.add_adapter(BottleneckConfig(bottleneck_size=4, modules_to_save=["classifier"]))

    statistics = [name for name in travelling_tensors(model) if "running" in name]
    assert statistics == [f"classifier.modules_to_save.default.1.running_{name}" for name in ("mean", "var")]


def test_the_base_is_known_by_its_frozen_weights_alone(make_bert):
    one, other, moved = adapted(make_bert, seed=0), adapted(make_bert, seed=1), adapted(make_bert)
    moved.bert.encoder.layer[0].output.dense.bias.data[0] += 1.0

    assert base_hash(one) == base_hash(other) != base_hash(moved)


# There and back.


@needs_flwr
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_travels_arrives_bit_for_bit(make_bert, dtype):
    here, there = adapted(make_bert, seed=1).to(dtype), adapted(make_bert, seed=2).to(dtype)
    assert bits(copies(here)) != bits(copies(there))

    load_arrays(there, to_arrays(here))

    assert bits(copies(here)) == bits(copies(there))


@needs_flwr
def test_the_traffic_is_told_against_the_whole_model(make_bert):
    model = adapted(make_bert)
    arrays = to_arrays(model)
    sent, share, whole = re.fullmatch(
        r"([\d,]+) bytes travel each way, ([\d.]+)% of the model's ([\d,]+)", traffic(model, arrays)
    ).groups()

    weights = sum(tensor.numel() * 4 for tensor in travelling_tensors(model).values())
    overhead = 300 * len(arrays)  # of each tensor: its name, and numpy's header
    assert weights <= int(sent.replace(",", "")) <= weights + overhead
    assert int(whole.replace(",", "")) >= sum(p.numel() * 4 for p in model.parameters())
    assert float(share) == pytest.approx(100 * int(sent.replace(",", "")) / int(whole.replace(",", "")), abs=0.005)


def spoilt(make_bert) -> nn.Module:
    model = adapted(make_bert)
    next(iter(travelling_tensors(model).values())).data.fill_(float("nan"))
    return model


@needs_flwr
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda make_bert: nn.Linear(2, 2).requires_grad_(False), "Nothing in the model trains.*add adapters"),
        (spoilt, "holds NaN or infinity.*Lower the learning rate"),
        (lambda make_bert: nn.Linear(2, 2, device="meta"), "'weight' has no data.*Load the model's weights"),
    ],
)
def test_what_would_spoil_the_average_is_not_sent(make_bert, make, message):
    with pytest.raises(FederatedError, match=message):
        to_arrays(make(make_bert))


@needs_flwr
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: unfreeze(model, "pooler"), "'bert.pooler.dense.weight' and 1 more train here and have not come"),
        (lambda model: freeze(model, "head"), "classifier.* and 1 more have come and do not train here"),
    ],
)
def test_models_that_train_otherwise_are_refused(make_bert, change, message):
    arrays, model = to_arrays(adapted(make_bert)), adapted(make_bert, seed=1)
    change(model)
    before = bits(dict(model.named_parameters()))

    with pytest.raises(FederatedError, match=message):
        load_arrays(model, arrays)

    assert bits(dict(model.named_parameters())) == before


@needs_flwr
def test_another_shape_is_refused_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4))
    before = bits(copies(model))

    with pytest.raises(FederatedError, match=r"'1.weight' has come as \(3, 2\) and is \(4, 2\) here"):
        load_arrays(model, to_arrays(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))))

    assert bits(copies(model)) == before


# FedProx.


def test_the_term_is_that_of_the_loss(make_bert, tmp_path):
    mu, rate = 0.7, 0.1
    by_callback, by_hand = adapted(make_bert), adapted(make_bert)
    run = trainer(by_callback, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=4)
    run.add_callback(ProximalTerm(mu))
    batches = []
    by_callback.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    run.train()

    trains = [parameter for parameter in by_hand.train().parameters() if parameter.requires_grad]
    begin = [parameter.detach().clone() for parameter in trains]
    assert len(batches) == 8
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        loss = (by_hand(**first).loss + by_hand(**second).loss) / 2
        term = sum(((parameter - start) ** 2).sum() for parameter, start in zip(trains, begin, strict=True))
        gradients = torch.autograd.grad(loss + mu / 2 * term, trains)
        with torch.no_grad():
            for parameter, gradient in zip(trains, gradients, strict=True):
                parameter -= rate * gradient
    found = [parameter for parameter in by_callback.parameters() if parameter.requires_grad]
    torch.testing.assert_close(found, trains)


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(mu):
    with pytest.raises(FederatedError, match=r"mu is .*0 \(FedAvg\) or a positive number"):
        ProximalTerm(mu)


def test_scaled_gradients_are_refused(make_bert, tmp_path):
    run = trainer(adapted(make_bert), tmp_path)
    run.args.fp16 = True

    with pytest.raises(FederatedError, match="bf16=True"):
        ProximalTerm(0.1).on_train_begin(run.args, run.state, run.control, model=run.model)


# A round, by Flower's own messages and strategies, in this process.


@pytest.fixture
def in_a_run(monkeypatch):
    """Says to Flower that this process is one of a run's: it makes messages nowhere else (flwr 1.42)."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def ask(model: nn.Module, **config):
    from flwr.app import ConfigRecord, Message, RecordDict

    content = {"arrays": to_arrays(model), "config": ConfigRecord({BASE: base_hash(model), **config})}
    return Message(RecordDict(content), dst_node_id=1, message_type="train")


def distance(arrays, model: nn.Module) -> float:
    own = travelling_tensors(model)
    return sum(float(((torch.from_numpy(arrays[n].numpy()) - own[n].detach()) ** 2).sum()) for n in own) ** 0.5


@needs_flwr
def test_a_round_trains_from_what_has_come_and_leaves_the_base(make_bert, tmp_path, in_a_run):
    server, client = adapted(make_bert, seed=1), adapted(make_bert, seed=2)
    alone = adapted(make_bert, seed=1)
    base = base_hash(client)

    reply = train_round(ask(server), trainer(client, tmp_path, max_steps=2))
    trainer(alone, tmp_path, max_steps=2).train()

    assert reply.content["metrics"]["num-examples"] == 8
    assert base_hash(client) == base
    sent = {name: torch.from_numpy(array.numpy()) for name, array in reply.content["arrays"].items()}
    assert bits(sent) == bits(copies(alone))


@needs_flwr
def test_the_pull_of_a_round_comes_with_its_config_and_goes_with_it(make_bert, tmp_path, in_a_run):
    server, run = adapted(make_bert), trainer(adapted(make_bert), tmp_path, max_steps=4)

    pulled = train_round(ask(server, **{"proximal-mu": 5.0}), run).content["arrays"]
    free = train_round(ask(server), run).content["arrays"]

    assert 0 < distance(pulled, server) < distance(free, server)


@needs_flwr
def test_a_client_with_another_base_is_refused(make_bert, tmp_path, in_a_run):
    server, client = adapted(make_bert), adapted(make_bert)
    client.bert.embeddings.word_embeddings.weight.data[5, 5] += 1.0

    with pytest.raises(FederatedError, match=r"differs from the server's base.*Load the same weights"):
        train_round(ask(server), trainer(client, tmp_path))


@needs_flwr
def test_the_average_is_by_texts_and_leaves_out_who_has_failed(make_bert, tmp_path, in_a_run):
    from flwr.app import Error, Message
    from flwr.serverapp.strategy import FedAvg

    server = adapted(make_bert)
    replies = [
        train_round(ask(server), trainer(adapted(make_bert), tmp_path, seed=seed, rows=rows, max_steps=2))
        for seed, rows in ((1, 4), (2, 12))
    ]
    replies.append(Message(Error(code=0, reason="gone"), reply_to=ask(server)))

    arrays, _ = FedAvg().aggregate_train(1, replies)
    load_arrays(server, arrays)

    one, other = (reply.content["arrays"] for reply in replies[:2])
    for name, tensor in travelling_tensors(server).items():
        expected = (4 * one[name].numpy() + 12 * other[name].numpy()) / 16
        torch.testing.assert_close(tensor.detach(), torch.from_numpy(expected))


@needs_flwr
def test_flowers_own_privacy_clips_what_clients_send(make_bert, tmp_path, in_a_run):
    from flwr.clientapp.mod import LocalDpMod
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

    server, length = adapted(make_bert), 1e-3

    def step(message, context):
        return train_round(message, trainer(adapted(make_bert), tmp_path, max_steps=4))

    free = step(ask(server), None)
    local = LocalDpMod(length, 0.0, 1.0, 1e-5)(ask(server), None, step)  # no sensitivity: no noise
    central = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, length, 1)
    central.current_arrays = to_arrays(server)
    averaged, _ = central.aggregate_train(1, [step(ask(server), None)])

    assert distance(free.content["arrays"], server) > 2 * length
    for arrays in (local.content["arrays"], averaged):
        assert distance(arrays, server) == pytest.approx(length, rel=1e-3)
        load_arrays(server, arrays)
        load_arrays(server, to_arrays(adapted(make_bert)))


# The app, without Flower's runtime.


@pytest.fixture
def app(monkeypatch) -> SimpleNamespace:
    """The app's parts, and the settings in its pyproject.toml."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Flower sends the folder as it is
    monkeypatch.syspath_prepend(str(APP))
    parts = {name: importlib.import_module(f"news.{name}") for name in ("task", "client_app", "server_app")}
    settings = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return SimpleNamespace(**parts, settings=settings)


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A folder with a small BERT of random weights, and the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A table of texts in three classes."""
    words = {"sport": "match goal team coach", "food": "bread soup cook oven", "space": "rocket orbit moon star"}
    rows = [f"{word} number {n},{label}" for label, some in words.items() for n in range(5) for word in some.split()]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return tmp_path / "texts.csv"


@pytest.fixture
def settings(app, small_model, texts) -> dict:
    return {**app.settings, "model": str(small_model), "dataset": str(texts), "max-length": 16}


@needs_flwr
def test_a_client_holds_its_own_classes_alone(app, settings):
    parts = [app.task.make_trainer(settings, slice(part, None, 2)).train_dataset for part in range(2)]

    assert [{row["labels"] for row in part} for part in parts] == [{0, 2}, {1}]
    assert len(parts[0]) == 2 * len(parts[1])


@needs_flwr
def test_all_sides_begin_with_the_same_weights(app, settings):
    one, other = (app.task.make_trainer(settings, slice(part, None, 2), part).model for part in range(2))

    assert bits(copies(one)) == bits(copies(other)) and base_hash(one) == base_hash(other)


@needs_flwr
def test_a_clients_noise_is_not_drawn_from_the_runs_seed(app, settings, in_a_run):
    from flwr.app import Context, RecordDict

    private = {**settings, "privacy": "local", "clipping": 0.01}
    server = app.task.make_trainer(private).model
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 2}, RecordDict(), private)

    one, other = (app.client_app.app(ask(server, **{"server-round": 1}), context) for _ in range(2))

    name = next(iter(travelling_tensors(server)))
    assert (one.content["arrays"][name].numpy() != other.content["arrays"][name].numpy()).all()
    assert list(one.content["metrics"]) == ["num-examples"]  # a loss is blurred by nothing


@needs_flwr
def test_the_servers_noise_is_not_drawn_from_the_runs_seed(app):
    import numpy as np

    drawn = []
    for _ in range(2):
        np.random.seed(0)
        app.server_app.make_strategy({**app.settings, "privacy": "central"})
        drawn.append(np.random.normal())
    assert drawn[0] != drawn[1]


@needs_flwr
@pytest.mark.parametrize(
    "changed, name",
    [
        ({}, "FedAvg"),
        ({"mu": 0.1}, "FedProx"),
        ({"privacy": "local"}, "FedAvg"),
        ({"privacy": "central"}, "DifferentialPrivacyServerSideFixedClipping"),
    ],
)
def test_the_settings_choose_flowers_strategy(app, changed, name):
    assert type(app.server_app.make_strategy({**app.settings, **changed})).__name__ == name


@needs_flwr
def test_clients_that_do_not_come_are_told_in_time(app):
    grid = SimpleNamespace(get_node_ids=lambda: [7])

    with pytest.raises(TimeoutError, match=r"1 of 3 clients have come within 0.1 s, 2 are missing.*num-partitions=3"):
        app.server_app.wait_for_clients(grid, 3, 0.1)


@needs_flwr
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"clients": 4}, "4 clients can't share out 3 classes"),
        ({"privacy": "locl"}, "privacy is 'locl'. Set it to 'none', 'local' or 'central'"),
    ],
)
def test_settings_that_can_not_be_are_refused_before_the_run(app, settings, changed, message):
    with pytest.raises(ValueError, match=message):
        app.server_app.main(None, SimpleNamespace(run_config={**settings, **changed}))


# A federation: Flower's own runtime, in processes of its own.


class Wire:
    """A line between the clients and the link that keeps a copy of all that passes through it, by direction."""

    def __init__(self, port: int) -> None:
        self._sent: list[bytearray] = []
        self._received: list[bytearray] = []
        self._link = port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._open, daemon=True).start()

    @property
    def sent(self) -> bytes:
        """What the clients have sent, one connection after the other."""
        return b"".join(self._sent)

    @property
    def received(self) -> bytes:
        """What they have received."""
        return b"".join(self._received)

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)  # so that `accept` returns
        self._door.close()

    def _open(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client = self._door.accept()[0]
                try:
                    link = socket.create_connection(("127.0.0.1", self._link))
                except OSError:  # the link is not there yet, or no more: the client asks again
                    client.close()
                    continue
                for here, there, kept in ((client, link, self._sent), (link, client, self._received)):
                    kept.append(bytearray())
                    threading.Thread(target=self._pass_on, args=(here, there, kept[-1]), daemon=True).start()

    @staticmethod
    def _pass_on(here: socket.socket, there: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):  # one end is gone: that of the client that is killed
            while part := here.recv(2**16):
                kept += part
                there.sendall(part)
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)


def pieces(tensors: dict[str, torch.Tensor], length: int = 48) -> set[bytes]:
    """Returns from each tensor a few stretches of bytes that are found in no other place: no zeros, no ones."""
    found = set()
    for whole in bits(tensors).values():
        parts = [whole[start : start + length] for start in (0, len(whole) // 2, len(whole) - length)]
        found |= {part for part in parts if len(part) == length and len(set(part)) > length // 4}
    return found


def test_the_launcher_says_what_is_missing(tmp_path, monkeypatch):
    launcher = load("federated_news")
    monkeypatch.setattr(launcher, "PROGRAMS", tmp_path)

    with pytest.raises(SystemExit, match=r"There is no flwr in .*pip install 'hf-freeze\[demo,federated\]'"):
        launcher.main([])


def test_a_run_that_saves_nothing_has_failed(tmp_path, monkeypatch):
    launcher = load("federated_news")
    monkeypatch.setattr(launcher, "PROGRAMS", tmp_path)
    (tmp_path / "flwr").write_text("#!/bin/sh\necho nothing\n")
    (tmp_path / "flwr").chmod(0o755)
    link, lives, ended = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    ended.kill()
    ended.wait(timeout=10)

    try:
        with pytest.raises(RuntimeError, match=r"The run has failed. Clients whose process has ended: \[1\]"):
            launcher.run(launcher.parse_args([]), {}, [link, lives, ended])
    finally:
        launcher.stop([link, lives])
    assert link.poll() is not None and lives.poll() is not None


def test_a_launcher_that_is_stopped_stops_what_it_has_started(tmp_path, in_time):
    venv.create(tmp_path, symlinks=True)  # the launcher itself needs no package
    for name in ("flwr", "flower-superlink", "flower-supernode"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/started\nexec sleep 60\n")
        program.chmod(0o755)
    started = tmp_path / "started"
    command = [tmp_path / "bin" / "python", EXAMPLES / "federated_news.py", "--clients", "2"]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not started.exists() or started.read_text().count("\n") < 3:  # until the time is up
            time.sleep(0.05)
    finally:
        launcher.terminate()
        launcher.wait(timeout=30)

    for process in started.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that hangs; what it has started is stopped on the way out."""

    def ring(*_) -> None:
        pytest.fail(f"The federation has not ended within {SECONDS} s.")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_wire_outlives_a_link_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    wire = Wire(port)
    host, _, own = wire.address.partition(":")
    with socket.create_connection((host, int(own)), timeout=5) as client:
        assert client.recv(1) == b""  # shut, since nobody is behind it

    with (
        socket.create_server(("127.0.0.1", port)) as door,
        socket.create_connection((host, int(own)), timeout=5) as client,
    ):
        link = door.accept()[0]
        client.sendall(b"there")
        assert link.recv(5) == b"there"
        link.sendall(b"back")
        assert client.recv(4) == b"back"
        link.close()
    wire.close()

    assert (wire.sent, wire.received) == (b"there", b"back")


def left_running(home: str) -> list[str]:
    """Returns the numbers of Flower's processes, which have their home in their environment; none without /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended by now
            if f"FLWR_HOME={home}".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


# A link notices that a client has died after two of its heartbeats, which are 30 seconds apart. Flower (1.42) has no
# option for it. Its link takes 10 seconds and more; with those, clients that live are missed on a machine that is busy.
QUICK = """
import sys
from flwr.common import constant
constant.HEARTBEAT_DEFAULT_INTERVAL = 15
from flwr.supernode.cli import flower_supernode
sys.exit(flower_supernode())
"""


@needs_flwr
@pytest.mark.slow
def test_frozen_weights_never_leave_a_client_and_one_that_dies_does_not_lose_the_round(
    app, settings, tmp_path, capsys, monkeypatch, in_time
):
    launcher = load("federated_news")
    start, wires, homes = launcher.start, [], set()

    def start_tapped(log, env, name, *options):
        homes.add(env["FLWR_HOME"])
        if name == "flower-supernode":
            at = options.index("--superlink") + 1
            wires.append(wires[0] if wires else Wire(int(options[at].rpartition(":")[2])))
            options = (*options[:at], wires[0].address, *options[at + 1 :])
            command = [sys.executable, "-c", QUICK, "--insecure", "--host", "127.0.0.1", *options]
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        return start(log, env, name, *options)

    monkeypatch.setattr(launcher, "start", start_tapped)
    options = {"model": settings["model"], "dataset": settings["dataset"], "clients": 3, "rounds": 1}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launcher.main([*given, "--output", str(tmp_path / "out"), "--kill-in-round", "1", "--config", "max-length=16"])

    shown = capsys.readouterr().out
    while left_running(*homes):  # until the time is up: the server's process ends by itself
        time.sleep(0.1)
    assert len(wires) == 3
    assert re.findall(r"Received (\d) results and (\d) failures", shown) == [("2", "1")]
    assert re.findall(r"^round (\d): test accuracy", shown, re.M) == ["0", "1"]

    model = app.task.make_trainer(settings).model  # what each side has at the start
    travels = travelling_tensors(model)
    frozen = {name: tensor for name, tensor in model.named_parameters() if name not in travels}
    sent, received = wires[0].sent, wires[0].received

    assert all(piece in received for piece in pieces(travels))  # so that they can be seen, if they are there
    assert all(name.encode() in sent for name in travels)
    assert frozen and not any(piece in sent for piece in pieces(frozen))
    once, base = (sum(tensor.numel() * 4 for tensor in part.values()) for part in (travels, frozen))
    assert 2 * once < len(sent) < base / 2  # of two clients, and all clients' asking for work at each moment

    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name for name in saved if "bottleneck" in name or "classifier" in name or "pooler" in name} == set(saved)
