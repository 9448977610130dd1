"""The rows of the first batch: which they are, what the layers make of them, and that nothing else notices."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import tiny_inputs, tiny_model
from torch import nn
from training import Watch, differing, losses, make_trainer, rows, tiny_bert, weights
from transformers import TrainerCallback

from hf_freeze import AdaptiveFreezing, BottleneckConfig, Decision, PrefixCache, freeze, layer_map
from hf_freeze.errors import PolicyError
from hf_freeze.policies.probing import ROWS, Probe, few, similarity

ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "albert", "xlnet", "vit", "resnet", "swin", "clip", "wav2vec2", "mamba")


@dataclass
class Reader:
    """A policy that only looks."""

    reads: tuple[str, ...] = ("similarities",)
    every: int = 2
    asked: list = field(default_factory=list)

    def decide(self, stats):
        self.asked.append(stats)
        return Decision("low", freeze="layers[0]") if stats.step == 4 else Decision()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def run(folder, policy, *callbacks, **options):
    trainer = make_trainer(folder, AdaptiveFreezing(policy), *callbacks, **options)
    trainer.train()
    return trainer


def by_hand(hidden: torch.Tensor) -> list[list[float]]:
    """How alike rows are, one pair at a time."""
    flat = [own.flatten() for own in hidden]
    alike = [[(one @ other).item() for other in flat] for one in flat]
    return [[own / sum(each**2 for each in row) ** 0.5 for own in row] for row in alike]


def test_similarities_are_those_of_the_hidden_states_in_eval_mode_behind_the_step(tmp_path):
    policy, watch = Reader(), Watch()
    trainer = run(tmp_path, policy, watch, steps=5, per_device_train_batch_size=6)

    assert [(own.step, set(own.similarities)) for own in policy.asked] == [
        (0, set()), (2, {f"layers[{at}]" for at in range(3)}), (4, {f"layers[{at}]" for at in range(3)}),
    ]  # fmt: skip
    model = tiny_bert().eval()
    model.load_state_dict(watch.weights[2])
    hidden = model(input_ids=kept_rows(trainer), output_hidden_states=True).hidden_states
    for at in range(3):
        for row, its in zip(policy.asked[1].similarities[f"layers[{at}]"], by_hand(hidden[at + 1]), strict=True):
            assert row == pytest.approx(its, abs=1e-5)


def kept_rows(trainer) -> torch.Tensor:
    """The token ids that the run has kept, by way of its state."""
    kept = json.loads(json.dumps(trainer.state.stateful_callbacks["hf_freeze"]["policy"]["measured"]))
    model, seen = nn.Linear(1, 1), []
    model.forward = lambda **inputs: seen.append(inputs)
    with pytest.raises(PolicyError, match="No layer of Linear puts out a tensor"):
        Probe(model, {"a": []}, kept).similarities({"a"})
    return seen[0]["input_ids"]


def test_the_rows_are_those_of_the_first_batch_that_trains(tmp_path):
    seen = []

    class See(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            kwargs["model"].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((torch.is_grad_enabled(), kwargs["input_ids"])),
                with_kwargs=True,
            )

    trainer = run(tmp_path, Reader(), See(), steps=3, per_device_train_batch_size=4, eval_on_start=True,
                  eval_strategy="steps")  # fmt: skip

    assert not seen[0][0]  # an evaluation came first
    first = next(ids for trains, ids in seen if trains)
    assert torch.equal(kept_rows(trainer), first)


def test_a_run_that_is_measured_is_the_run_that_is_not(tmp_path):
    measured, plain = Watch(), Watch()
    one = run(tmp_path, Reader(), measured, steps=8, gradient_accumulation_steps=2)
    other = run(tmp_path, Reader(reads=()), plain, steps=8, gradient_accumulation_steps=2)

    assert losses(one) == losses(other)
    assert differing(weights(one.model), weights(other.model)) == []
    assert measured.still == plain.still


def test_layers_that_are_frozen_are_not_measured_and_a_whole_prefix_costs_no_pass():
    model = tiny_bert()
    layers = {s.name: [*map(model.get_submodule, s.module_names)] for s in layer_map(model).layers}
    probe = Probe(model, layers, {})
    probe.wait()
    model.train()(input_ids=torch.stack([own["input_ids"] for own in rows(4)]))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    assert set(probe.similarities({"head", "layers[1]"})) == {"layers[1]"} and len(calls) == 1
    assert probe.similarities({"head"}) == {} and len(calls) == 1


def test_of_a_peft_model_layers_are_measured_with_their_adapters(tmp_path):
    policy = Reader()
    run(tmp_path, policy, model=get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=2)), steps=5, optim="sgd",
        learning_rate=10.0)  # fmt: skip
    before, after = (own.similarities for own in policy.asked[1:])

    assert set(before) == {f"layers[{at}]" for at in range(3)}
    assert before["layers[0]"] != after["layers[0]"]  # of the base nothing has moved


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_any_architecture_has_similarities_of_all_its_layers(model_type):
    model = tiny_model(model_type)
    layers = {s.name: [*map(model.get_submodule, s.module_names)] for s in layer_map(model).layers}
    probe = Probe(model, layers, {})
    probe.wait()
    model.train()(**tiny_inputs(model, batch_size=3))
    found = Probe(model, layers, json.loads(json.dumps(probe.kept))).similarities(layers)

    assert found.keys() == layers.keys()
    for own in found.values():
        assert len(own) >= 2
        assert torch.tensor(own).norm(dim=1).tolist() == pytest.approx([1.0] * len(own))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rows_=st.integers(1, 5),
    before=st.booleans(),
    seed=st.integers(0, 99),
)
def test_similarity_has_rows_of_norm_one_whatever_a_layer_puts_out(shape, rows_, before, seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.rand([rows_, *shape] if before else [*shape, rows_], generator=generator) + 0.1

    own = torch.tensor(similarity(output, rows_))

    assert own.shape[0] == own.shape[1] <= max(rows_, ROWS)
    assert own.norm(dim=1).tolist() == pytest.approx([1.0] * len(own), abs=1e-5)


def test_rows_are_found_where_positions_come_first():
    output = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(0))

    assert similarity(output, 3) == similarity(output.transpose(0, 1), 3)


def test_of_a_single_row_positions_are_compared():
    output = torch.rand(1, 20, 4, generator=torch.Generator().manual_seed(0))

    assert similarity(output, 1) == similarity(output[0, torch.linspace(0, 19, ROWS).long()], ROWS)


def test_few_rows_are_few_and_small():
    ids, image, wide = torch.zeros(32, 7), torch.zeros(32, 3, 320, 320), torch.zeros(2, 2000, 1000)
    (args, kwargs), count = few([[ids], {"labels": [{"box": 1}] * 32, "scale": torch.tensor(2.0), "names": ["a"]}])

    assert count == ROWS
    assert (len(args[0]), len(kwargs["labels"]), kwargs["scale"].ndim, kwargs["names"]) == (ROWS, ROWS, 0, ["a"])
    assert few([[image], {}])[1] == 3  # in all 4 MiB at most, but two
    assert few([[wide], {}])[1] == 2
    (args, _), count = few([[ids], {"grid": torch.zeros(4, 3)}])
    assert (len(args[0]), count) == (32, 4)  # what has no row each stays whole


def test_inputs_that_can_not_be_kept_are_refused():
    model = nn.Linear(2, 2)
    probe = Probe(model, {}, {})
    probe.wait()
    model.forward = lambda own: own
    with pytest.raises(PolicyError, match="The model is given an input of the type object"):
        model(object())
    assert probe.kept == {}


def test_rows_that_would_fill_checkpoints_are_refused():
    model = nn.Identity()
    probe = Probe(model, {}, {})
    probe.wait()
    with pytest.raises(PolicyError, match="would take 20 MiB in each checkpoint, and 16 may"):
        model(torch.zeros(2, 5 * 2**19))
    assert probe.kept == {}


@pytest.mark.parametrize("cache_first", [False, True])
def test_the_rows_are_the_batchs_where_a_cache_tries_the_model_in_the_same_call(tmp_path, cache_first):
    """In its trial the cache calls the model with two rows, inside the call that is the first batch's."""
    found = []
    for caches in ([], [PrefixCache()]):
        model, policy = tiny_bert(), Reader()
        freeze(model, "embeddings, layers[:1]")
        adaptive = AdaptiveFreezing(policy)
        callbacks = [*caches, adaptive] if cache_first else [adaptive, *caches]
        trainer = make_trainer(tmp_path, *callbacks, model=model, steps=5, per_device_train_batch_size=6)
        trainer.train()
        assert len(kept_rows(trainer)) == ROWS
        found.append(torch.tensor([list(own.similarities.values()) for own in policy.asked[1:]]))
    assert caches[0].hits and torch.allclose(*found, atol=1e-5)
