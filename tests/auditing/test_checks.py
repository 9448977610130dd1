"""Each code of an audit: a model in which it is found, and one beside it in which it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    TrainingArguments,
)

from hf_freeze import audit, freeze, unfreeze
from hf_freeze.auditing.codes import CODES
from tests.tiny import forward_loss, tiny_inputs, tiny_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
BATCH = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
LOWER = "embeddings, layers[:1]"


@dataclass
class Case:
    """A model behind a backward, and what else an audit is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    args: TrainingArguments | None = None
    symptom: str | None = None

    def report(self):
        batch = BATCH if self.symptom in ("memory", "accuracy") else None
        return audit(self.model, self.optimizer, args=self.args, symptom=self.symptom, batch=batch)


def bert(**sizes) -> BertForSequenceClassification:
    torch.manual_seed(0)
    small = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**{**small, "num_hidden_layers": 3, **sizes}))


def adamw(model: nn.Module, lr: float = 1e-4, everything: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if everything or p.requires_grad], lr=lr)


def backward(model: nn.Module) -> nn.Module:
    model.train()(**BATCH).loss.backward()
    return model


def sound() -> Case:
    model = bert()
    freeze(model, LOWER)
    return Case(backward(model), adamw(model))


# Code -> a function that makes a case of it, and the names that must be found.


def nothing_trains() -> Case:
    model = bert()
    freeze(model, "all")
    return Case(model)


def cut_off() -> Case:
    model = bert()
    freeze(model, LOWER)
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    return Case(backward(model), adamw(model))


def unused() -> Case:
    case = sound()
    case.model.bert.pooler.extra = nn.Parameter(torch.ones(2))
    case.optimizer.add_param_group({"params": [case.model.bert.pooler.extra]})
    return case


def gradient_on_frozen() -> Case:
    case = sound()
    case.model.classifier.weight.requires_grad_(False)  # by hand, behind a backward
    return case


def frozen_head() -> Case:
    # task_type is missing, so that PEFT leaves the new head frozen
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    return Case(backward(model), adamw(model))


def not_in_optimizer() -> Case:
    model = bert()
    freeze(model, "base")
    optimizer = adamw(model)
    unfreeze(model, "layers[-1]")
    return Case(backward(model), optimizer)


def idle_in_optimizer() -> Case:
    model = bert()
    optimizer = adamw(model)
    freeze(model, LOWER)
    return Case(backward(model), optimizer)


def state_of_frozen() -> Case:
    model = backward(bert())
    optimizer = adamw(model)
    optimizer.step()
    freeze(model, LOWER)
    optimizer.zero_grad()
    return Case(backward(model), optimizer)


def rate_of_zero() -> Case:
    case = sound()
    return Case(case.model, adamw(case.model, lr=0.0))


def rate_too_high() -> Case:
    case = sound()
    return Case(case.model, adamw(case.model, lr=1.0))


def sgd_too_high() -> Case:
    case = sound()
    return Case(case.model, torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=1e4))


def rate_too_low() -> Case:
    model = bert().bfloat16()
    freeze(model, LOWER)
    return Case(backward(model), adamw(model, lr=1e-6))


def not_finite() -> Case:
    case = sound()
    case.model.bert.pooler.dense.weight.grad[0, 0] = float("nan")
    return case


def vanishing() -> Case:
    model = bert()
    freeze(model, LOWER)
    nn.init.constant_(model.bert.pooler.dense.bias, 12.0)  # tanh is flat there
    return Case(backward(model), adamw(model))


def exploding() -> Case:
    model = bert()
    freeze(model, LOWER)
    (1e7 * model.train()(**BATCH).loss).backward()
    return Case(model, adamw(model))


def exploding_in_one_layer() -> Case:
    model = bert(num_hidden_layers=4)
    freeze(model, LOWER)
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.register_hook(lambda gradient: 1e6 * gradient)
    return Case(backward(model), adamw(model))


def wrong_loss_scale() -> Case:
    case = sound()
    case.args = TrainingArguments("unused", gradient_accumulation_steps=4, report_to=[], use_cpu=True)
    return case


def live_statistics() -> Case:
    model = tiny_model("resnet")
    for parameter in model.encoder.stages[0].parameters():
        parameter.requires_grad_(False)
    forward_loss(model.train(), tiny_inputs(model)).backward()
    return Case(model)


def live_dropout() -> Case:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    return Case(backward(model))


def dropout_by_function() -> Case:
    model = tiny_model("bart", dropout=0.1)
    model.encoder.layers[0].requires_grad_(False)
    forward_loss(model.train(), tiny_inputs(model)).backward()
    return Case(model)


def gpt2() -> nn.Module:
    return tiny_model("gpt2", AutoModelForCausalLM)


def language_loss(model: nn.Module) -> nn.Module:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return model


def tied_by_half() -> Case:
    model = gpt2()
    freeze(model, "embeddings, layers")
    unfreeze(model, "head")  # which is the word embeddings too, while the position embeddings stand
    return Case(language_loss(model))


def untied() -> Case:
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # as loading may leave it
    freeze(model, "embeddings")
    return Case(language_loss(model))


def untied_by_peft() -> Case:
    model = get_peft_model(
        gpt2(), LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    )
    return Case(language_loss(model))


def tied_and_frozen() -> Case:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    freeze(model, "embeddings")  # the transform in the head trains, its matrix does not
    return Case(language_loss(model))


def graph_through_frozen() -> Case:
    model = bert()
    freeze(model, LOWER)
    model.enable_input_require_grads()
    return Case(backward(model), adamw(model))


def graph_through_frozen_measured() -> Case:
    case = graph_through_frozen()
    case.symptom = "memory"
    return case


def trains_below() -> Case:
    model = bert()
    freeze(model, "layers[:2]")
    return Case(backward(model), adamw(model))


def would_learn() -> Case:
    model = bert()
    freeze(model, "base")
    return Case(backward(model), adamw(model), symptom="accuracy")


PROVOKED: list[tuple[str, Callable[[], Case], tuple[str, ...]]] = [
    ("HF001", nothing_trains, ()),
    ("HF002", cut_off, ("layers[1]",)),
    ("HF003", unused, ("bert.pooler.extra",)),
    ("HF004", gradient_on_frozen, ("classifier.weight",)),
    ("HF005", frozen_head, ("head",)),
    ("HF006", not_in_optimizer, ("layers[2]",)),
    ("HF007", idle_in_optimizer, ("embeddings", "layers[0]")),
    ("HF008", state_of_frozen, ("embeddings", "layers[0]")),
    ("HF009", rate_of_zero, ("layers[1]", "layers[2]", "pooler", "head")),
    ("HF010", rate_too_high, ("layers[1]", "layers[2]", "pooler", "head")),
    ("HF010", sgd_too_high, ()),
    ("HF011", rate_too_low, ("layers[1]", "layers[2]", "pooler", "head")),
    ("HF012", not_finite, ("bert.pooler.dense.weight",)),
    ("HF013", vanishing, ("layers[1]", "layers[2]")),
    ("HF014", exploding, ("head",)),
    ("HF014", exploding_in_one_layer, ("layers[1]",)),
    ("HF015", wrong_loss_scale, ()),
    ("HF016", live_statistics, ()),
    ("HF017", live_dropout, ("bert.embeddings.dropout",)),
    ("HF017", dropout_by_function, ("encoder.layers.0",)),
    ("HF018", tied_by_half, ("transformer.wte.weight",)),
    ("HF018", untied, ("lm_head.weight", "transformer.wte.weight")),
    ("HF018", untied_by_peft, ()),
    ("HF019", tied_and_frozen, ("bert.embeddings.word_embeddings.weight",)),
    ("HF020", graph_through_frozen, ("layers[0]",)),
    ("HF020", graph_through_frozen_measured, ("layers[0]",)),
    ("HF021", trains_below, ("layers[0]", "layers[1]")),
    ("HF022", would_learn, ()),
]


@pytest.mark.parametrize(("code", "make", "names"), PROVOKED, ids=lambda value: getattr(value, "__name__", None))
def test_a_finding_is_provoked_and_names_what_it_is_about(code, make, names):
    found = {each.code: each for each in make().report().findings}

    assert code in found
    assert set(names) <= set(found[code].names)
    assert found[code].cause.endswith(".") and found[code].mend.endswith(".")


def test_each_code_is_provoked():
    assert {code for code, _, _ in PROVOKED} == set(CODES)


def test_each_code_has_a_section_in_the_manual():
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")

    assert re.findall(r"^### (HF\d+)\n\n\*\*(\w+): ", page, re.M) == [
        (code, CODES[code].severity.capitalize()) for code in CODES
    ]


def test_each_section_has_a_script_that_provokes_it():
    """The scripts themselves run in tests/test_docs.py."""
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (HF\d+)\n(.*?)(?=^##|\Z)", page, re.M | re.S))

    shown = {code: re.findall(r"^```pycon\n(.*?)^```$", text, re.M | re.S) for code, text in sections.items()}
    assert [code for code in CODES if not any(f"'{code}'" in block for block in shown[code])] == []


def test_a_sound_run_gives_no_finding():
    assert sound().report().findings == ()


@pytest.mark.parametrize(
    "alone",
    [nothing_trains, frozen_head, rate_of_zero, rate_too_high, rate_too_low, live_dropout, trains_below, untied],
)
def test_one_mistake_gives_one_finding(alone):
    assert len(alone().report().findings) == 1


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (
            frozen_head,
            lambda case: get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type=TaskType.SEQ_CLS)),
        ),
        (live_dropout, lambda case: freeze(case.model, "embeddings") and case.model),
        (graph_through_frozen, lambda case: case.model.disable_input_require_grads() or case.model),
        (wrong_loss_scale, lambda case: setattr(case.model, "accepts_loss_kwargs", False) or case.model),
        (cut_off, lambda case: case.model.bert.encoder.layer[2]._forward_pre_hooks.clear() or case.model),
        (not_finite, lambda case: case.model.zero_grad() or case.model),
    ],
    ids=lambda value: value.__name__,
)
def test_the_mend_that_is_named_mends(make, mend):
    case = make()
    case.model = backward(mend(case))
    case.optimizer = adamw(case.model)

    assert case.report().findings == ()
