"""AutoFreeze's rule, on norms of gradients made by hand."""

from __future__ import annotations

import json

import pytest
from stats import NAMES, PARTS, answers, part, stats

from hf_freeze import GradientNormFreezing
from hf_freeze.errors import PolicyError

# From 10 to these the layers change by 1 %, 2 %, 30 % and 40 %: the lower half are the first two.
BEFORE, SETTLED = (10.0, 10.0, 10.0, 10.0), (10.1, 9.8, 13.0, 6.0)


def test_the_layers_whose_norms_change_least_freeze_from_the_bottom_up_with_the_embeddings():
    policy = GradientNormFreezing(every=1, window=1)

    assert answers(policy, stats(0), stats(1, *BEFORE)) == [None, None]
    decision = policy.decide(stats(2, *SETTLED))

    assert decision.freeze == "embeddings, layers[0], layers[1]"
    assert decision.statistics == pytest.approx({f"layers[{i}]": own for i, own in enumerate((0.01, 0.02, 0.3, 0.4))})
    assert decision.threshold == pytest.approx(0.02)
    assert "layers[0] 1.0%" in decision.reason and "layers[1] 2.0%" in decision.reason and "2.0%" in decision.reason


def test_a_settled_layer_above_one_that_is_not_goes_on():
    policy = GradientNormFreezing(every=1, window=1)

    assert answers(policy, stats(1, *BEFORE), stats(2, 6.0, 10.0, 10.0, 13.0)) == [None, None]
    assert answers(policy, stats(3, 6.0, 6.0, 6.0, 13.0)) == ["embeddings, layers[0]"]  # no change, as layers[3]


def test_of_a_window_the_mean_counts():
    policy = GradientNormFreezing(every=1, window=2)
    windows = [(5.0, 15.0), (12.0, 8.2)]  # means 10 and 10.1
    told = [
        stats(1 + i, norm, norm, 3 * norm**2, norm**3) for i, norm in enumerate(norm for w in windows for norm in w)
    ]

    *first, last = answers(policy, *told)

    assert first == [None] * 3 and last == "embeddings, layers[0], layers[1]"


def test_the_prefix_grows_from_its_edge_and_the_last_layer_is_not_compared_with_itself():
    policy, upper = GradientNormFreezing(every=1, window=1), NAMES[3:]  # layers[2], layers[3], head train
    answers(policy, stats(1, *BEFORE, trains=upper))

    assert answers(policy, stats(2, *SETTLED, trains=upper)) == ["layers[2]"]
    assert answers(policy, stats(3, *SETTLED, trains=upper[1:])) == [None]


@pytest.mark.parametrize(
    "percentile, frozen",
    [(25, "embeddings, layers[0]"), (75, "embeddings, layers[0], layers[1], layers[2]"), (20, None)],
)
def test_the_percentile_says_how_many_layers_are_settled(percentile, frozen):
    policy = GradientNormFreezing(every=1, window=1, percentile=percentile)

    assert answers(policy, stats(1, *BEFORE), stats(2, *SETTLED)) == [None, frozen]


def test_each_stack_has_a_prefix_of_its_own():
    towers = (
        part("text.embeddings", "embeddings"),
        *(part(f"{stack}.layers[{index}]", stack=stack) for stack in ("text", "vision") for index in (0, 1)),
        part("head"),
    )  # fmt: skip
    names = [own.name for own in towers]
    norms = {"text.layers[0]": 5.0, "text.layers[1]": 9.0, "vision.layers[0]": 5.0, "vision.layers[1]": 9.0}
    later = {"text.layers[0]": 5.0, "text.layers[1]": 1.0, "vision.layers[0]": 5.0, "vision.layers[1]": 1.0}
    policy = GradientNormFreezing(every=1, window=1)
    policy.decide(stats(1, parts=towers, trains=names, gradients=norms))

    decision = policy.decide(stats(2, parts=towers, trains=names, gradients=later))

    assert decision.freeze == "text.embeddings, text.layers[0], vision.layers[0]"


def test_something_is_left_to_train_where_nothing_stands_behind_the_layers_that_does():
    policy = GradientNormFreezing(every=1, window=1, percentile=99.9)
    layers = tuple(own for own in PARTS if own.kind == "layer")
    names = [own.name for own in layers]
    frozen = [
        policy.decide(stats(step, parts=layers, trains=names, gradients=dict.fromkeys(names, 5.0))).freeze
        for step in (1, 2)
    ]

    assert frozen == [None, "layers[0], layers[1], layers[2]"]


def test_what_it_remembers_is_plain_data_and_goes_on_where_it_was():
    told = [stats(step, *(norm * (1 + step % 3) for norm in BEFORE)) for step in range(1, 8)]
    whole, stopped, resumed = (GradientNormFreezing(every=1, window=2) for _ in range(3))

    expected = [whole.decide(own) for own in told]
    first = [stopped.decide(own) for own in told[:5]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert [*first, *(resumed.decide(own) for own in told[5:])] == expected


@pytest.mark.parametrize("wrong", [{"every": 0}, {"window": 1.5}, {"percentile": 0}, {"percentile": 100}])
def test_a_number_out_of_range_is_refused(wrong):
    (name,) = wrong

    with pytest.raises(PolicyError, match=f"{name}={wrong[name]} in GradientNormFreezing: write a"):
        GradientNormFreezing(**wrong)
