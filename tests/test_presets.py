"""Presets: the order of stages is their paper's, on any architecture; what was frozen stays so."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from tiny import tiny_config
from training import Watch, make_trainer, tiny_bert

from hf_freeze import Sample, Stage, StagedUnfreezing, UnfreezeSchedule, freeze, layer_map, select
from hf_freeze.errors import ScheduleError
from hf_freeze.presets import PRESETS
from hf_freeze.timetable import plan, trainable_sets

MODEL = tiny_bert()
LAYER_BY_LAYER = ["gradual", "bottom_up", "chain_thaw"]


@functools.cache
def on_meta(model_type, auto_class, **sizes):
    with torch.device("meta"):
        return auto_class.from_config(tiny_config(model_type, **sizes))


CLASSIFIER = transformers.AutoModelForSequenceClassification
ARCHITECTURES = {
    "bert": (CLASSIFIER, {"num_hidden_layers": 4}),
    "distilbert": (CLASSIFIER, {"n_layers": 4}),
    "deberta-v2": (CLASSIFIER, {"num_hidden_layers": 4}),
    "gpt2": (CLASSIFIER, {"n_layer": 4}),
    "llama": (CLASSIFIER, {"num_hidden_layers": 4}),
    "mistral": (transformers.AutoModelForTokenClassification, {"num_hidden_layers": 4}),
    "vit": (transformers.AutoModelForImageClassification, {"num_hidden_layers": 4}),
    "wav2vec2": (transformers.AutoModelForAudioClassification, {"num_hidden_layers": 4}),
}
BART = on_meta("bart", transformers.AutoModelForSeq2SeqLM)
TIED = on_meta("gpt2", transformers.AutoModelForCausalLM, n_layer=4)


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    """A model of four layers, on meta."""
    auto_class, sizes = ARCHITECTURES[request.param]
    return on_meta(request.param, auto_class, **sizes)


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def trained(model, schedule) -> list[set[str]]:
    """What trains in each stage."""
    return [set(own) for own in trainable_sets(layer_map(model), schedule.stages_for(model))]


def newly_trained(model, schedule) -> list[set[str]]:
    """What each stage unfreezes that did not train before."""
    found = trained(model, schedule)
    return [now - before for now, before in zip(found, [set(), *found], strict=False)]


def parts(model) -> tuple[set[str], list[set[str]], set[str]]:
    """What stands behind the layers, the layers from the bottom up, what stands before them."""
    own: dict[str, list[set[str]]] = {"top": [], "layer": [], "embeddings": []}
    for segment in layer_map(model):
        own[segment.kind if segment.kind in own else "top"].append(set(segment.parameter_names))
    return set().union(*own["top"]), own["layer"], set().union(*own["embeddings"])


# The order is the paper's


def test_gradual_is_ulmfits_order(model):
    """Head first, then one layer more from the top down, the embeddings last; and each parameter once."""
    top, layers, embeddings = parts(model)
    new = newly_trained(model, UnfreezeSchedule.gradual())
    assert new == [top, layers[3], layers[2], layers[1], layers[0] | embeddings]
    assert set().union(*new) == names(model)


def test_bottom_up_is_the_order_from_the_first_layer_to_the_last(model):
    """The head from the start, then the embeddings and the lowest layer, then one layer more each stage."""
    top, layers, embeddings = parts(model)
    new = newly_trained(model, UnfreezeSchedule.bottom_up())
    assert new == [top, embeddings | layers[0], layers[1], layers[2], layers[3]]


def test_chain_thaw_is_deepmojis_order(model):
    """New layers, then each layer alone from the first to the last, then all: nothing of the stage before trains on."""
    top, layers, embeddings = parts(model)
    assert trained(model, UnfreezeSchedule.chain_thaw()) == [top, embeddings, *layers, names(model)]


def test_lp_ft_is_a_linear_probe_and_then_all(model):
    head = set(select(model, "head"))
    assert trained(model, UnfreezeSchedule.lp_ft()) == [head, names(model)]
    assert [stage.start for stage in UnfreezeSchedule.lp_ft(probe="10 steps").stages_for(model)] == [0, "10 steps"]


def test_lisa_trains_so_many_layers_at_a_time_and_all_else_throughout(model):
    top, layers, embeddings = parts(model)
    stages = UnfreezeSchedule.lisa(layers=2, steps=5).stages_for(model)
    planned = plan(model, stages, dict.fromkeys(names(model), 1.0), total_steps=100, steps_per_epoch=None)
    for stage in planned:
        assert stage.step % 5 == 0
        assert top | embeddings < stage.trainable
        drawn = [layer for layer in layers if layer <= stage.trainable]
        assert len(drawn) == 2 and stage.trainable == (top | embeddings).union(*drawn)
    assert set().union(*(stage.trainable for stage in planned)) == names(model)


def test_the_decoders_layers_stand_above_the_encoders():
    order = ["encoder.layers[0]", "encoder.layers[1]", "decoder.layers[0]", "decoder.layers[1]"]
    layers = [set(select(BART, term)) for term in order]
    down, up, alone = (newly_trained(BART, getattr(UnfreezeSchedule, name)()) for name in LAYER_BY_LAYER)
    assert down[1:-1] == layers[:0:-1] and up[2:] == layers[1:]
    assert down[-1] == layers[0] | set(select(BART, "embeddings")) - down[0]  # the head is tied to the embeddings
    assert alone[2:-1] == layers


@pytest.mark.parametrize("name", LAYER_BY_LAYER)
@pytest.mark.parametrize("tied", [BART, TIED], ids=["bart", "gpt2"])
def test_with_a_tied_head_every_parameter_trains_in_the_end(name, tied):
    assert trained(tied, getattr(UnfreezeSchedule, name)())[-1] == names(tied)


def test_chain_thaw_trains_embeddings_that_are_tied_to_the_head_with_the_embeddings():
    found = trained(TIED, UnfreezeSchedule.chain_thaw())
    assert set(select(TIED, "embeddings")) == found[1]
    assert all(found[index].isdisjoint(select(TIED, "embeddings")) for index in range(2, 6))


# Options


def test_several_layers_a_stage_at_their_epochs():
    options = {"epochs_per_stage": 0.5, "layers_per_stage": 2, "warmup": 7}
    told = {
        name: [
            (stage.start, stage.unfreeze, stage.freeze, stage.warmup)
            for stage in getattr(UnfreezeSchedule, name)(**options).stages_for(MODEL)
        ]
        for name in LAYER_BY_LAYER
    }
    assert told["gradual"] == [
        (0, "pooler, head", None, 0),
        (0.5, "layers[2], layers[1]", None, 7),
        (1.0, "layers[0], embeddings", None, 7),
    ]
    assert told["bottom_up"] == [
        (0, "pooler, head", None, 0),
        (0.5, "embeddings, layers[0], layers[1]", None, 7),
        (1.0, "layers[2]", None, 7),
    ]
    assert told["chain_thaw"] == [
        (0, "pooler, head", None, 0),
        (0.5, "embeddings", "pooler, head", 7),
        (1.0, "layers[0], layers[1]", "embeddings", 7),
        (1.5, "layers[2]", "layers[0], layers[1]", 7),
        (2.0, "all", None, 7),
    ]


def test_lp_ft_has_a_rate_for_the_probe_and_one_for_what_follows():
    schedule = UnfreezeSchedule.lp_ft(probe=1, probe_lr=1e-2, lr={"base": 1e-5, "head": 1e-4}, warmup=3)
    assert schedule.stages_for(MODEL) == (
        Stage(0, "head", lr=1e-2),
        Stage(1, "all", lr={"base": 1e-5, "head": 1e-4}, warmup=3),
    )


def test_lisa_is_one_stage_with_a_sample():
    assert UnfreezeSchedule.lisa(layers=1, steps=9, seed=4, lr=0.1).stages_for(MODEL) == (
        Stage(0, "all", lr=0.1, sample=Sample(layers=1, steps=9, seed=4)),
    )


# What `freeze` has frozen


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("frozen", ["embeddings, layers[:1]", "bias", "norm", "layers[1]"])
def test_what_was_frozen_stays_frozen(frozen, name):
    model = tiny_bert()
    still = set(freeze(model, frozen))
    found = trained(model, getattr(UnfreezeSchedule, name)())
    assert set().union(*found) == found[-1] == names(model) - still


@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_with_all_but_the_head_frozen_there_is_one_stage(name):
    model = tiny_bert()
    freeze(model, "base")
    assert trained(model, getattr(UnfreezeSchedule, name)()) == [set(select(model, "head"))]


@pytest.mark.parametrize("name", PRESETS)
def test_a_frozen_model_leaves_nothing_to_do(name):
    model = tiny_bert()
    freeze(model, "all")
    with pytest.raises(ScheduleError, match=rf"{name}: nothing is left to unfreeze.*Leave some layers unfrozen"):
        getattr(UnfreezeSchedule, name)().stages_for(model)


def test_lp_ft_needs_a_head():
    base = on_meta("bert", transformers.AutoModel)
    with pytest.raises(ScheduleError, match=r"lp_ft: no head of BertModel trains. Take a class with a head"):
        UnfreezeSchedule.lp_ft().stages_for(base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnfreezeSchedule.gradual(epochs_per_stage=0), r"epochs_per_stage=0: write a positive number"),
        (lambda: UnfreezeSchedule.gradual(layers_per_stage=0), r"layers_per_stage=0: a stage unfreezes at least 1"),
        (lambda: UnfreezeSchedule.chain_thaw(layers_per_stage=1.5), r"layers_per_stage=1.5: a stage"),
        (lambda: UnfreezeSchedule.lp_ft(probe="soon"), r"start='soon': write epochs"),
        (lambda: UnfreezeSchedule.lp_ft(probe_lr=0), r"lr=0 in the stage at 0"),
        (lambda: UnfreezeSchedule.lp_ft(lr=0), r"lr=0 in the stage at '50%'"),
        (lambda: UnfreezeSchedule.lisa(layers=0), r"layers=0 in a sample"),
        (lambda: UnfreezeSchedule.lisa(steps=-1), r"steps=-1 in a sample"),
        (lambda: UnfreezeSchedule.lisa(warmup=-1), r"warmup=-1 in the stage"),
        (lambda: UnfreezeSchedule.gradual(lr=-1), r"lr=-1 in the stage"),
        (lambda: UnfreezeSchedule.gradual(warmup=-1), r"warmup=-1 in the stage"),
    ],
)
def test_what_can_not_be_said_is_refused_at_once(make, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# In a run


@pytest.mark.parametrize("name", ["chain_thaw", "lisa"])
def test_what_is_frozen_again_does_not_move(name, tmp_path):
    schedule = {
        "chain_thaw": UnfreezeSchedule.chain_thaw(epochs_per_stage=1 / 3),
        "lisa": UnfreezeSchedule.lisa(layers=1, steps=1),
    }[name]
    watch = Watch()
    callback = StagedUnfreezing(schedule)
    make_trainer(tmp_path, callback, watch).train()
    planned = callback.engine.planned
    due = [max((s for s in planned if s.step <= at), key=lambda s: s.step).trainable for at in range(6)]
    assert watch.moved == due
    assert len(set(due)) > 2


@pytest.mark.parametrize("saved_at", [2, 3, 5])
def test_lisa_resumed_draws_the_same_layers(saved_at, tmp_path):
    def run(**options):
        watch = Watch()
        callback = StagedUnfreezing(UnfreezeSchedule.lisa(layers=1, steps=2, seed=3))
        trainer = make_trainer(tmp_path, callback, watch, save_strategy="steps", save_steps=saved_at)
        trainer.train(**options)
        return watch

    whole = run()
    rest = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert rest.moved == whole.moved[saved_at:]
    assert all(torch.equal(tensor, whole.weights[-1][name]) for name, tensor in rest.weights[-1].items())
