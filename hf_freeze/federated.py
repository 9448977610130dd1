"""Federated fine-tuning on Flower (`flwr`): only what trains travels between server and clients.

What lives here: the way from a model to Flower's `ArrayRecord` and back, one round of training on a client, and
FedProx's pull. What may not: strategies, differential privacy, processes, which are Flower's own, and the choice of
model and data, which is the app's. flwr is imported when it is used. How data passes through:

    server: to_arrays(model) -> strategy -> message -> client: load_arrays -> Trainer -> to_arrays -> reply -> average

Each side builds the same frozen base by itself, and frozen weights never leave it. That both bases are the same is
checked by a hash, `base_hash`, since adapters that were trained on one base are worth nothing on another.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .certify import frozen_tensors, hash_of
from .errors import FederatedError, nearest
from .thawed import COPIES, thawed_tensors

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message

# Flower's own keys, the defaults of its strategies.
ARRAYS, CONFIG, METRICS, EXAMPLES, PROXIMAL = "arrays", "config", "metrics", "num-examples", "proximal-mu"
BASE = "base"  # ours: the hash of the server's frozen base, in the config of a round

_STATISTICS = ("running_mean", "running_var")


def travelling_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns by name what travels: all that trains, and what training may have changed, tied ones once.

    These are the parameters that require a gradient (adapters, heads under ``modules_to_save``, what `unfreeze` has
    thawed) and the running statistics of normalisation that is not kept still. Counts, which are integers and can't be
    averaged, stay at home.

    Args:
        model: The model, frozen and adapted; not wrapped for several processes.

    Example:
        >>> from hf_freeze import freeze
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
        >>> _ = freeze(model, "0")
        >>> list(travelling_tensors(model))
        ['1.weight', '1.bias']
    """
    thawed = set(thawed_tensors(model))
    found: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        moves = tensor.requires_grad or name in thawed or _of_a_copy(name)
        if moves and tensor.is_floating_point():
            found[name] = tensor
    return found


def _of_a_copy(name: str) -> bool:
    """Tells statistics in a head that trains under ``modules_to_save``, which `thawed_tensors` leaves to PEFT."""
    return f".{COPIES[0]}." in name and name.endswith(_STATISTICS)


def base_hash(model: nn.Module) -> str:
    """Returns a hash of all that is frozen and so does not travel: alike where both sides have the same base.

    The originals of heads that train under ``modules_to_save`` are left out: they are random, and not used.

    Raises:
        CertificateError: a tensor has no data, as on the `meta` device.
    """
    travels = travelling_tensors(model)
    found = hashlib.sha256()
    for name, tensor in sorted(frozen_tensors(model).items()):
        if name not in travels and f".{COPIES[1]}." not in name:
            found.update(hash_of(name, tensor).encode())
    return found.hexdigest()


def to_arrays(model: nn.Module) -> ArrayRecord:
    """Returns what travels of a model, as Flower sends it; bfloat16, which numpy has not, goes as float32.

    Raises:
        FederatedError: nothing in the model trains; or a tensor has no data, or holds NaN or infinity, which would
            spoil the average.
    """
    from flwr.app import Array, ArrayRecord

    found: dict[str, Array] = {}
    for name, tensor in travelling_tensors(model).items():
        if tensor.is_meta:
            raise FederatedError(f"{name!r} has no data to send. Load the model's weights first.")
        plain = tensor.detach().to("cpu", torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype)
        if not plain.isfinite().all():
            raise FederatedError(f"{name!r} holds NaN or infinity and is not sent. Lower the learning rate.")
        found[name] = Array(plain.numpy())
    if not found:
        raise FederatedError("Nothing in the model trains, so nothing would travel. Unfreeze a part, or add adapters.")
    return ArrayRecord(found)


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> None:
    """Puts into a model what has travelled; on an error the model is as it was.

    Args:
        model: A model that was frozen and adapted like the sender's.
        arrays: What `to_arrays` has made of the sender's model, or an average of such.

    Raises:
        FederatedError: other tensors have come than travel here, or one of another shape.
    """
    own = travelling_tensors(model)
    if missing := [name for name in own if name not in arrays]:
        raise FederatedError(
            f"{missing[0]!r} and {len(missing) - 1} more train here and have not come."
            f"{nearest(missing[0], arrays)} Freeze and adapt the model alike on all sides."
        )
    if extra := [name for name in arrays if name not in own]:
        raise FederatedError(
            f"{extra[0]!r} and {len(extra) - 1} more have come and do not train here."
            f"{nearest(extra[0], own)} Freeze and adapt the model alike on all sides."
        )
    come = {name: torch.from_numpy(arrays[name].numpy()) for name in own}
    for name, tensor in own.items():
        if come[name].shape != tensor.shape:
            raise FederatedError(
                f"{name!r} has come as {tuple(come[name].shape)} and is {tuple(tensor.shape)} here. "
                f"Use the same config on all sides."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(come[name])


def traffic(model: nn.Module, arrays: ArrayRecord) -> str:
    """Returns in one line how much travels, against the whole model.

    Args:
        model: The model that `arrays` were made of.
        arrays: What travels in one direction, to or from one client.
    """
    sent = arrays.count_bytes()
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return f"{sent:,} bytes travel each way, {100 * sent / whole:.2f}% of the model's {whole:,}"


def train_round(message: Message, trainer: Trainer) -> Message:
    """Carries out one round on a client: takes in what has come, trains, and returns the reply.

    Call it in a `ClientApp`'s train function. The reply weighs as many texts as the client has. Whatever is raised here
    goes to the server as an error: Flower's FedAvg and FedProx then average the other clients, so that neither a client
    with another base nor one whose training diverges spoils the round.

    Args:
        message: The server's message: the arrays, and a config that may hold `BASE`, and FedProx's factor.
        trainer: A Trainer with this client's model and data.

    Raises:
        FederatedError: another base is frozen here than on the server, the models do not fit, or training diverged.
    """
    from flwr.app import Message as Reply
    from flwr.app import MetricRecord, RecordDict

    model, config = trainer.model, message.content[CONFIG]
    if BASE in config and config[BASE] != (found := base_hash(model)):
        raise FederatedError(
            f"What is frozen here differs from the server's base: {found[:8]} here, {str(config[BASE])[:8]} there. "
            f"Load the same weights, and freeze the same parts."
        )
    load_arrays(model, message.content[ARRAYS])
    pull = ProximalTerm(float(config.get(PROXIMAL, 0.0)))
    trainer.add_callback(pull)
    try:
        loss = trainer.train().training_loss
    finally:
        trainer.remove_callback(pull)
    metrics = MetricRecord({EXAMPLES: len(trainer.train_dataset), "train_loss": float(loss)})
    return Reply(RecordDict({ARRAYS: to_arrays(model), METRICS: metrics}), reply_to=message)


class ProximalTerm(TrainerCallback):
    """FedProx's pull towards the weights with which a round began: mu / 2 times the squared distance, in the loss.

    Its gradient, mu times the distance, is added once before each optimizer step, also with gradient accumulation and
    on several processes; clipping, which comes before, does not see it. Li et al., "Federated Optimization in
    Heterogeneous Networks", 2020, equation 2.

    Args:
        mu: The factor, 0 or more. 0 is FedAvg.

    Raises:
        FederatedError: mu is negative or no number; or, as training begins, it runs in float16, whose gradients may be
            scaled when the term is added.

    Example:
        >>> ProximalTerm(0.1).mu
        0.1
    """

    def __init__(self, mu: float) -> None:
        if not (math.isfinite(mu) and mu >= 0):
            raise FederatedError(f"mu is {mu!r}. Give 0 (FedAvg) or a positive number, such as 0.1.")
        self.mu = mu
        self._begin: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the weights that training begins with."""
        if self.mu and args.fp16:
            raise FederatedError("FedProx's term does not go with fp16=True. Use bf16=True, or FedAvg.")
        trains = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad and self.mu]
        self._begin = [(parameter, parameter.detach().clone()) for parameter in trains]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the term's gradient; what has none has not moved, or is frozen by now."""
        for parameter, begin in self._begin:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - begin, alpha=self.mu)
