"""SmartFRZ: what the model that comes with the package says of layers that move and of layers at rest."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resumption import decided, resumes_alike
from stats import NAMES, stats
from tiny import tiny_model
from training import make_trainer
from transformers import AutoModelForSequenceClassification

from hf_freeze import AdaptiveFreezing, AttentionFreezing
from hf_freeze.errors import PolicyError
from hf_freeze.policies.attention import FEATURES, HISTORY, WEIGHTS, batch_of, trained


def told(step: int, places, norms, trains=NAMES, total_steps: int = 1000):
    """Layers each at a place on a line, with norms of gradients; the weights have the norm 10."""
    layers = [f"layers[{at}]" for at in range(len(places))]
    similarities = {name: [[place, 0.0], [0.0, 1.0]] for name, place in zip(layers, places, strict=True)}
    return stats(
        step, *norms, trains=trains, total_steps=total_steps, weights=dict.fromkeys(NAMES, 10.0),
        similarities={name: own for name, own in similarities.items() if name in trains},
    )  # fmt: skip


def moving(step: int, **more):
    """Early in a run all layers go on at an even pace."""
    return told(step, [0.02 * step] * 4, [1.0] * 4, **more)


def resting(step: int, **more):
    """Late in a run the lower two layers have long come to rest."""
    place = 1 - 0.5**step
    return told(900 + step, [place, place, 0.05 * step, 0.05 * step], [1e-2 * 0.7**step] * 2 + [1.0] * 2, **more)


def test_layers_that_move_early_in_a_run_go_on():
    policy = AttentionFreezing(every=1)

    assert [policy.decide(moving(step)).freeze for step in range(1, 12)] == [None] * 11


def test_layers_that_have_come_to_rest_late_in_a_run_freeze_with_the_embeddings():
    policy = AttentionFreezing(every=1)
    decision = next(
        filter(None, (own if own.changes else None for own in map(policy.decide, map(resting, range(1, 30)))))
    )

    assert decision.freeze.startswith("embeddings, layers[0]")
    assert decision.statistics["layers[0]"] >= decision.threshold == 0.8
    assert "probability of layers[0]" in decision.reason and "threshold 80.0%" in decision.reason


def test_with_too_few_measurements_nothing_is_said():
    policy = AttentionFreezing(every=1, confidence=1e-6)

    assert [policy.decide(moving(step)).changes for step in range(1, 5)] == [False, False, False, True]


@given(
    st.lists(
        st.lists(
            st.lists(st.floats(-8, 8), min_size=len(FEATURES), max_size=len(FEATURES)), min_size=1, max_size=HISTORY
        ),
        min_size=2,
        max_size=5,
    )
)
def test_what_it_says_of_a_layer_hangs_on_no_other_and_not_on_what_is_missing(histories):
    with torch.no_grad():
        together = trained()(*batch_of(histories))
        alone = torch.cat([trained()(*batch_of([own])) for own in histories])

    assert torch.allclose(together, alone, atol=1e-4)


def test_that_it_is_loaded_draws_no_random_number_of_the_run():
    trained.cache_clear()
    before = torch.get_rng_state()
    trained()

    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_are_small_and_no_pickle():
    assert WEIGHTS.suffix == ".safetensors" and WEIGHTS.stat().st_size < 2**20


def test_what_it_remembers_is_plain_data_and_goes_on_where_it_was():
    asked = [resting(step) for step in range(1, 14)]
    whole, stopped, resumed = (AttentionFreezing(every=1, confidence=0.5) for _ in range(3))
    expected = [whole.decide(own) for own in asked]
    first = [stopped.decide(own) for own in asked[:6]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert [*first, *(resumed.decide(own) for own in asked[6:])] == expected


@pytest.mark.parametrize("wrong", [{"every": 0}, {"confidence": 0}, {"confidence": 1}])
def test_a_number_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(PolicyError, match=f"{name}={wrong[name]} in AttentionFreezing: write a"):
        AttentionFreezing(**wrong)


@pytest.mark.parametrize("model_type", ["gpt2", "albert", "roberta"])
def test_on_an_architecture_that_it_has_not_seen_it_freezes_a_prefix_when_the_rate_has_fallen(tmp_path, model_type):
    model = tiny_model(model_type, AutoModelForSequenceClassification, num_labels=2, pad_token_id=0)
    model.accepts_loss_kwargs = False
    callback = AdaptiveFreezing(AttentionFreezing(every=1, confidence=0.5))
    make_trainer(tmp_path, callback, model=model, steps=24, learning_rate=3e-3, weight_decay=0.0).train()

    assert all(decision.freeze.startswith("embeddings") for _, decision in callback.decisions[:1])
    assert all(step > 3 for step, _ in callback.decisions)


def test_a_run_resumed_from_any_step_ends_as_the_one_that_was_not_stopped(tmp_path):
    whole = resumes_alike(tmp_path, lambda: AttentionFreezing(every=1, confidence=0.3), steps=14, at=(1, 4, 9, 13))

    assert decided(whole)
