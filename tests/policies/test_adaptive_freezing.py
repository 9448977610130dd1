"""`AdaptiveFreezing` in a real Trainer: what is decided is what trains, and a run resumes with what it knew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from resumption import cached_alike
from training import Watch, differing, losses, make_trainer, names_in, optimizer_state, tiny_bert, weights
from transformers import TrainerCallback

from hf_freeze import (
    AdaptiveFreezing,
    BottleneckConfig,
    Decision,
    GradientNormFreezing,
    RunRecorder,
    Stage,
    StagedUnfreezing,
    freeze,
    layer_map,
)
from hf_freeze.errors import PolicyError, ScheduleError
from hf_freeze.report.reading import read_run

SAVING = {"save_strategy": "steps", "save_steps": 1}


@dataclass
class Told:
    """A policy that answers what it was told to, by the step, and keeps what it was asked with."""

    answers: dict[int, Decision]
    every: int = 1
    reads: Sequence[str] = ("gradients", "weights")
    asked: list = field(default_factory=list)

    def decide(self, stats):
        self.asked.append(stats)
        return self.answers.get(stats.step, Decision())

    def state_dict(self):
        return {"asked": len(self.asked)}

    def load_state_dict(self, state):
        self.asked = [None] * state["asked"]


class Norms(TrainerCallback):
    """The norms of each segment's gradients and weights, one tensor at a time."""

    def __init__(self) -> None:
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layers, found = layer_map(kwargs["model"]), ({}, {})
        for name, parameter in kwargs["model"].named_parameters():
            segment = layers.owners[name].name
            found[1].setdefault(segment, []).append(parameter.detach().flatten())
            if parameter.grad is not None:
                found[0].setdefault(segment, []).append(parameter.grad.flatten())
        gradients, own = ({name: float(torch.cat(all_).norm()) for name, all_ in each.items()} for each in found)
        self.gradients.append(gradients)
        self.weights.append(own)


LAYER = "bert.encoder.layer.{}.".format
DECIDED = {
    2: Decision("too low", freeze="embeddings, layers[0]"),
    3: Decision("slowly", scale={"layers[1:]": 0.5, "layers[2]": 0.1}),
    4: Decision("another", freeze="layers[1]", unfreeze="layers[0]"),
}


def run(folder, policy, *callbacks, **options):
    callback, watch = AdaptiveFreezing(policy), Watch()
    trainer = make_trainer(folder, callback, watch, *callbacks, **options)
    trainer.train()
    return trainer, callback, watch


def test_what_is_decided_trains_from_the_next_step_on_at_the_rate_that_was_decided(tmp_path):
    trainer, _, watch = run(tmp_path, Told(DECIDED), lr_scheduler_type="constant")
    model = trainer.model
    top, everything = names_in(model, LAYER(1), LAYER(2), "bert.pooler", "classifier"), names_in(model, "")
    last = names_in(model, LAYER(0), LAYER(2), "bert.pooler", "classifier")

    assert watch.moved == [everything, everything, top, top, last, last]
    factors = [
        watch.rates[4][f"{prefix}.attention.self.query.weight"] / 0.01 for prefix in (LAYER(0)[:-1], LAYER(2)[:-1])
    ]
    assert factors == pytest.approx([1, 0.1])
    assert watch.rates[3][LAYER(1) + "output.dense.bias"] == pytest.approx(0.005)
    assert watch.rates[3]["classifier.weight"] == pytest.approx(0.01)
    assert watch.rates[2][LAYER(1) + "output.dense.bias"] == pytest.approx(0.01)


def test_the_statistics_are_the_norms_of_the_step(tmp_path):
    policy, norms = Told({}), Norms()
    run(tmp_path, policy, norms, gradient_accumulation_steps=2, max_grad_norm=0.1)

    opening, *asked = policy.asked
    assert (opening.step, opening.gradients, opening.weights) == (0, {}, {})
    assert [stats.step for stats in asked] == [1, 2, 3, 4, 5]  # behind the last nothing is left to decide
    for stats, gradients, own in zip(asked, norms.gradients, norms.weights, strict=False):
        assert stats.gradients == pytest.approx(gradients, rel=1e-5)
        assert stats.weights == pytest.approx(own, rel=1e-5)
        assert stats.total_steps == 6
        assert math.hypot(*stats.gradients.values()) == pytest.approx(0.1, rel=1e-3)  # clipped


def test_it_is_asked_every_so_many_steps_and_measures_what_it_reads(tmp_path):
    policy = Told({}, every=3, reads=())
    run(tmp_path, policy, steps=7)

    assert [(stats.step, dict(stats.gradients)) for stats in policy.asked] == [(0, {}), (3, {}), (6, {})]


def test_a_decision_before_the_first_step_holds_for_it(tmp_path):
    decided = {0: Decision("only these", freeze="embeddings, layers[:2]", scale={"head": 2.0})}
    trainer, _, watch = run(tmp_path, Told(decided), lr_scheduler_type="constant")

    assert watch.moved == [names_in(trainer.model, LAYER(2), "bert.pooler", "classifier")] * 6
    assert watch.rates[0]["classifier.weight"] == pytest.approx(0.02)


def test_what_was_frozen_before_stays_so_whatever_is_decided(tmp_path):
    model = tiny_bert()
    freeze(model, "embeddings, layers[0]")
    policy = Told(
        {1: Decision("all", unfreeze="all"), 2: Decision("up", freeze="layers[:2]"), 3: Decision("all", unfreeze="all")}
    )
    _, callback, watch = run(tmp_path, policy, model=model)

    above = names_in(model, LAYER(1), LAYER(2), "bert.pooler", "classifier")
    assert watch.moved == [above, above, above - names_in(model, LAYER(1)), *[above] * 3]
    assert [part.name for part in policy.asked[0].parts] == ["layers[1]", "layers[2]", "pooler", "head"]
    assert [step for step, _ in callback.decisions] == [2, 3]  # the first changes nothing


def test_each_decision_is_in_the_history_and_counted_in_the_logs(tmp_path):
    decided = Decision("too low", freeze="layers[0]", statistics={"layers[0]": 0.25}, threshold=0.5)
    trainer, *_ = run(tmp_path, Told({2: decided}))

    history = trainer.state.log_history
    (entry,) = [own for own in history if "freeze/decision" in own]
    assert entry == {
        "freeze/decision": "too low", "freeze/freezes": "layers[0]", "freeze/statistics": {"layers[0]": 0.25},
        "freeze/threshold": 0.5, "epoch": pytest.approx(2 / 3), "step": 2,
    }  # fmt: skip
    assert [own["freeze/decisions"] for own in history if "loss" in own] == [0, 1, 1, 1, 1, 1]


def test_a_record_shows_what_trained_when(tmp_path):
    run(tmp_path, Told(DECIDED), RunRecorder())

    assert [stage.first for stage in read_run(tmp_path).stages] == [0, 2, 4]


def test_a_run_resumed_from_any_step_ends_as_the_one_that_was_not_stopped(tmp_path):
    def trainer_in(folder):
        return make_trainer(
            folder, AdaptiveFreezing(GradientNormFreezing(every=1, window=2)), steps=9,
            gradient_accumulation_steps=2, **SAVING,
        )  # fmt: skip

    whole = trainer_in(tmp_path)
    whole.train()
    reasons = [entry["step"] for entry in whole.state.log_history if "freeze/decision" in entry]
    assert reasons == [4, 6]

    for step in (3, 4, 5, 8):
        resumed = trainer_in(tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differing(weights(whole.model), weights(resumed.model)) == []
        assert differing(optimizer_state(whole), optimizer_state(resumed)) == []
        assert losses(resumed) == losses(whole)
        assert [e for e in resumed.state.log_history if "freeze/decision" in e] == [
            e for e in whole.state.log_history if "freeze/decision" in e
        ]


def test_a_second_run_of_the_same_trainer_begins_anew(tmp_path):
    policy = Told(DECIDED)
    trainer, callback, watch = run(tmp_path, policy)
    trainer.train()

    assert watch.moved[7:] == watch.moved[:6]  # between them: from the end of the one to the beginning of the other
    assert len(policy.asked) == 6
    assert [step for step, _ in callback.decisions] == [2, 3, 4] * 2


def test_an_interrupted_run_goes_on_with_the_same_model_in_another_trainer(tmp_path):
    model = tiny_bert()

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Told(DECIDED), Interrupt(), model=model)
    with pytest.warns(UserWarning, match="stands in the middle of a run"):
        _, _, watch = run(tmp_path, Told({}), model=model)
    assert watch.moved == [names_in(model, "")] * 6


def test_another_policy_goes_on_from_what_was_decided_before(tmp_path):
    run(tmp_path, GradientNormFreezing(every=1, window=2), steps=9, **SAVING)
    policy = Told({5: Decision("all again", unfreeze="all")})
    callback, watch = AdaptiveFreezing(policy), Watch()
    make_trainer(tmp_path, callback, watch, steps=9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    everything = names_in(callback.engine.model, "")
    below = names_in(callback.engine.model, "bert.embeddings", LAYER(0))
    assert watch.moved == [everything - below, *[everything] * 4]
    assert policy.asked[0].step == 4


def test_a_checkpoint_without_the_callback_is_taken_up(tmp_path):
    make_trainer(tmp_path, steps=6, **SAVING).train()
    policy = Told({3: Decision("now", freeze="embeddings")})
    callback, watch = AdaptiveFreezing(policy), Watch()
    make_trainer(tmp_path, callback, watch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert watch.moved == [names_in(callback.engine.model, "") - names_in(callback.engine.model, "bert.embeddings")] * 3


def test_a_checkpoint_in_which_others_trained_is_refused(tmp_path):
    run(tmp_path, Told({}), **SAVING)
    model = tiny_bert()
    freeze(model, "bert.encoder.layer.0.output.dense.bias")
    trainer = make_trainer(tmp_path, AdaptiveFreezing(Told({})), model=model)
    # the optimizer's own refusal comes first where the number of parameters is another
    with pytest.raises(ValueError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    "make",
    [lambda: BottleneckConfig(bottleneck_size=2), lambda: LoraConfig(task_type="SEQ_CLS", r=2)],
    ids=["bottleneck", "lora"],
)
def test_of_a_peft_model_the_adapters_of_a_layer_are_the_layer(tmp_path, make):
    model = get_peft_model(tiny_bert(), make())
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    policy = Told({3: Decision("low", freeze="layers[0].adapters")})
    _, _, watch = run(tmp_path, policy, model=model)

    assert {"layers[0]", "layers[1]", "layers[2]"} <= {part.name for part in policy.asked[0].parts}
    assert "layers[0].adapters" in {part.selector for part in policy.asked[0].parts}
    assert set(policy.asked[2].gradients) >= {"layers[0]", "layers[1]", "layers[2]"}
    low = {name for name in before if "layer.0." in name}
    assert low and watch.moved[4] == watch.moved[2] - low


def test_of_adapters_the_prefix_grows_too(tmp_path):
    model = get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=2))
    _, callback, _ = run(tmp_path, GradientNormFreezing(every=1, window=1, percentile=99), model=model)

    assert callback.decisions and all("adapters" in decision.freeze for _, decision in callback.decisions)


def test_a_step_whose_gradients_are_not_finite_is_not_counted(tmp_path):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                kwargs["model"].classifier.bias.grad.fill_(math.nan)

    policy = Told({})
    make_trainer(tmp_path, Break(), AdaptiveFreezing(policy)).train()

    assert [stats.step for stats in policy.asked][:2] == [0, 1] and 2 not in [stats.step for stats in policy.asked]


@pytest.mark.parametrize(
    "wrong, says",
    [
        (Told, "Told is a class, and no policy yet. Write Told()."),
        (object(), "is no policy: it has no 'decide'. See FreezePolicy."),
        (Told({}, every=0), "every=0 in Told: write a whole number from 1."),
        (
            Told({}, reads=["gradient"]),
            "Told reads 'gradient'. Did you mean 'gradients'? There are: gradients, weights",
        ),
    ],
)
def test_what_is_no_policy_is_refused(wrong, says):
    with pytest.raises(PolicyError) as error:
        AdaptiveFreezing(wrong)
    assert says in str(error.value)


def test_a_decision_after_which_nothing_trains_is_refused_with_its_reason(tmp_path):
    with pytest.raises(PolicyError, match="Nothing would train from step 2 on: 'all done' freezes 'all'"):
        run(tmp_path, Told({2: Decision("all done", freeze="all")}))


def test_a_model_without_layers_that_train_is_refused(tmp_path):
    model = tiny_bert()
    freeze(model, "base")
    with pytest.raises(PolicyError, match="No layers of BertForSequenceClassification train"):
        run(tmp_path, Told({}), model=model)


def test_two_that_decide_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, AdaptiveFreezing(Told({})), StagedUnfreezing([Stage(0, "all")]))
    with pytest.raises(ScheduleError, match="Another schedule is carried out with this optimizer"):
        trainer.train()


@pytest.mark.slow
def test_a_growing_prefix_is_cached_and_changes_nothing(tmp_path):
    """On the embedded model: the run with the cache is the run without it."""

    decisions = cached_alike(tmp_path, lambda: GradientNormFreezing(every=1, window=1, percentile=75), steps=8)

    assert len(decisions) >= 2


def test_the_state_of_the_run_is_json(tmp_path):
    run(tmp_path, GradientNormFreezing(every=1, window=2), **SAVING)
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())

    assert state["stateful_callbacks"]["hf_freeze"]["policy"]["name"] == "GradientNormFreezing"
    assert set(state["stateful_callbacks"]["hf_freeze"]["policy"]["state"]) == {"sums", "count", "before"}
