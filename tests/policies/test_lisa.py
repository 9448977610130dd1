"""LISA: which layers are drawn, that nothing else is touched, and that draws are those of the schedule."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resumption import decided, resumes_alike
from stats import LAYERS, NAMES, part, stats
from training import Watch, differing, make_trainer, names_in, weights

from hf_freeze import AdaptiveFreezing, LisaSampling, StagedUnfreezing, UnfreezeSchedule
from hf_freeze.errors import PolicyError


def carried_out(trains: frozenset[str], decision) -> frozenset[str]:
    """What trains behind a decision: the selectors here are names."""
    goes, comes = (set(filter(None, (own or "").split(", "))) for own in (decision.freeze, decision.unfreeze))
    return (trains | comes) - goes


@given(
    layers=st.integers(1, LAYERS),
    seed=st.integers(0, 99),
    period=st.integers(0, 999),
    frozen=st.sets(st.sampled_from(range(LAYERS))),
)
def test_so_many_layers_train_behind_a_draw_and_all_else_as_before(layers, seed, period, frozen):
    trains = frozenset(NAMES) - {f"layers[{index}]" for index in frozen}
    decision = LisaSampling(layers, every=5, seed=seed).decide(stats(5 * period, trains=trains))

    behind = carried_out(trains, decision)
    assert sum(name.startswith("layers") for name in behind) == layers
    assert {"embeddings", "head"} <= behind
    assert bool(decision.reason) == (behind != trains)


def test_each_layer_and_each_pair_is_as_likely_as_any_other():
    policy, seen = LisaSampling(layers=2, every=1), Counter()
    for step in range(3000):
        seen[tuple(sorted(carried_out(frozenset(NAMES), policy.decide(stats(step))) - {"embeddings", "head"}))] += 1

    assert len(seen) == 6
    assert all(abs(count - 500) < 4 * (3000 * 5 / 36) ** 0.5 for count in seen.values())


def test_a_draw_hangs_on_period_and_seed_and_not_on_what_was_drawn_before():
    asked = [LisaSampling(every=10).decide(stats(step)) for step in (0, 10, 20)]
    one = LisaSampling(every=10)

    assert [one.decide(stats(step)) for step in (0, 10, 20)] == asked
    assert [LisaSampling(every=10, seed=1).decide(stats(step)) for step in (0, 10, 20)] != asked


def test_the_reason_names_what_was_drawn():
    decision = LisaSampling(layers=1, every=10).decide(stats(30))
    (drawn,) = carried_out(frozenset(NAMES), decision) - {"embeddings", "head"}

    assert decision.reason == f"drawn for period 3: {drawn}"


def test_layers_of_all_stacks_are_drawn_from():
    towers = (
        *(part(f"{stack}.layers[{at}]", stack=stack) for stack in ("text", "vision") for at in (0, 1)),
        part("head"),
    )
    names = frozenset(own.name for own in towers)
    policy = LisaSampling(layers=1, every=1)
    behind = [carried_out(names, policy.decide(stats(step, parts=towers, trains=names))) for step in range(50)]

    assert {name for own in behind for name in own} == names
    assert all(len(own) == 2 for own in behind)


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(PolicyError, match="layers=5 in LisaSampling, and 4 layers may train"):
        LisaSampling(layers=5).decide(stats(0))


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"every": 1.5}, {"seed": -1}])
def test_a_number_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(PolicyError, match=f"{name}={wrong[name]} in LisaSampling: write a whole number from"):
        LisaSampling(**wrong)


def test_what_it_remembers_is_the_seed_as_plain_data():
    stopped, resumed = LisaSampling(every=5, seed=7), LisaSampling(every=5, seed=8)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert [resumed.decide(stats(step)) for step in range(0, 50, 5)] == [
        stopped.decide(stats(step)) for step in range(0, 50, 5)
    ]


def test_in_a_trainer_what_is_drawn_trains_with_all_that_is_no_layer(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, AdaptiveFreezing(LisaSampling(layers=1, every=2)), watch, steps=12)
    trainer.train()
    layers = [names_in(trainer.model, f"bert.encoder.layer.{index}.") for index in range(3)]
    outside = names_in(trainer.model, "") - set().union(*layers)

    assert all(any(moved == outside | own for own in layers) for moved in watch.moved)
    assert all(one == other for one, other in zip(watch.moved[::2], watch.moved[1::2], strict=True))
    assert len({tuple(sorted(moved)) for moved in watch.moved}) == 3


def test_it_is_the_schedule_of_that_name_to_the_last_bit(tmp_path):
    def trained(callback):
        trainer = make_trainer(tmp_path, callback, steps=9)
        trainer.train()
        return weights(trainer.model)

    as_policy = trained(AdaptiveFreezing(LisaSampling(layers=2, every=2, seed=3)))
    as_schedule = trained(StagedUnfreezing(UnfreezeSchedule.lisa(layers=2, steps=2, seed=3)))

    assert differing(as_policy, as_schedule) == []


def test_a_run_resumed_from_any_step_draws_as_the_one_that_was_not_stopped(tmp_path):
    whole = resumes_alike(
        tmp_path, lambda: LisaSampling(layers=1, every=2, seed=5), steps=10, at=(1, 4, 5, 9),
        other=lambda: LisaSampling(layers=1, every=2, seed=6),
    )  # fmt: skip

    assert len(decided(whole)) >= 3
