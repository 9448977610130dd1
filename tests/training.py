"""Tiny runs of transformers' own `Trainer`: a BERT of three layers on random tokens, some 10 ms a step.

Dropout is on, so that a run that draws one random number more or less than another shows it.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LAYERS = 3
BATCH = 2
# Arguments of a Trainer: each step logged, nothing saved or shown, on the CPU.
SMALL_RUN: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}

# accelerate 1.15 collects garbage at the start of each train(), which takes longer than the whole run when it walks
# through all that transformers has imported
gc.freeze()


def tiny_bert() -> BertForSequenceClassification:
    """The same model each time."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=LAYERS,
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=20,
            max_position_embeddings=16,
        )
    )
    # It takes **kwargs but averages its own loss, which the Trainer then scales wrongly with gradient accumulation
    # (transformers 5.23).
    model.accepts_loss_kwargs = False
    return model


def rows(count: int) -> list[dict[str, Any]]:
    """Random token ids with a label, the same each time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in ids]


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, steps: int = 6, **options: Any
) -> Trainer:
    """A Trainer for `steps` optimizer steps in epochs of 3; `options` are `TrainingArguments` or the Trainer's own."""
    names = ("model_init", "optimizers", "optimizer_cls_and_kwargs", "compute_metrics")
    own = {key: options.pop(key) for key in names if key in options}
    arguments = {
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        **SMALL_RUN,
        **options,
    }
    data = rows(3 * BATCH * arguments["gradient_accumulation_steps"])
    return Trainer(
        None if "model_init" in own else model or tiny_bert(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data[:BATCH],
        callbacks=list(callbacks),
        **own,
    )


class Watch(TrainerCallback):
    """Writes down at each optimizer step what a run does. Pass it behind the callback that it is to watch.

    Attributes:
        weights: The weights before the first step, and after each.
        rates: At each step, the learning rate of each parameter that the optimizer holds and that has a gradient.
        still: At each step, the names of the modules in eval mode.
    """

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []
        self.still: list[set[str]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights.append(weights(kwargs["model"]))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}
        self.rates.append(
            {
                names[id(parameter)]: float(group["lr"])
                for group in kwargs["optimizer"].param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            }
        )
        self.still.append({name for name, module in kwargs["model"].named_modules() if not module.training})

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(weights(kwargs["model"]))

    @property
    def moved(self) -> list[set[str]]:
        """At each step, the names of the parameters that it changed."""
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [{name for name in after if not torch.equal(before[name], after[name])} for before, after in pairs]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two dicts of tensors differ in a single bit."""
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    """The loss of each step, from the log history."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def optimizer_state(trainer: Trainer) -> dict[str, Tensor]:
    """All that the optimizer keeps, flat."""
    state: dict[int, dict[str, Any]] = trainer.optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(v) for index, own in state.items() for key, v in own.items()}


def names_in(model: torch.nn.Module, *prefixes: str) -> set[str]:
    """The parameters whose names start with one of the prefixes."""
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}
