"""A stage as data: when it starts, what it may say, what a sample draws, and what each refusal says."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze import Sample, Stage
from hf_freeze.errors import FreezeError, ScheduleError

NAMES = [f"layers[{index}]" for index in range(6)]

# When a stage starts


@pytest.mark.parametrize(
    ("start", "step"),
    [
        *[(0, 0), (1, 40), (2.5, 100), ("1 epoch", 40), ("2 epochs", 80), ("0.5 epochs", 20)],
        *[("7 steps", 7), ("1 step", 1), ("30%", 60), ("12.5%", 25), (" 30 % ", 60)],
    ],
)
def test_a_stage_starts_by_epoch_step_or_fraction(start, step):
    assert Stage(start, "head").first_step(total_steps=200, steps_per_epoch=40) == step


def test_without_a_length_of_the_data_only_epochs_after_the_first_are_unknown():
    assert Stage(0, "head").first_step(200, None) == 0
    assert Stage("10 steps", "head").first_step(200, None) == 10
    assert Stage("50%", "head").first_step(200, None) == 100
    with pytest.raises(ScheduleError, match=r"counts epochs, and the length of the data is unknown.*'100 steps'"):
        Stage(1, "head").first_step(200, None)


# Rates


def test_rates_by_selector_are_the_stages_own():
    rates = {"head": 1e-3}
    stage = Stage(0, "all", lr=rates)
    rates["layers"] = 1.0
    assert stage == Stage(0, "all", lr={"head": 1e-3})
    assert hash(stage) == hash(Stage(0, "all", lr={"head": 1e-3}))


# Samples


@given(st.integers(1, 6), st.integers(0, 1000), st.integers(0, 1000), st.permutations(NAMES))
def test_a_draw_hangs_on_seed_and_period_alone(layers, seed, period, shuffled):
    drawn = Sample(layers, seed=seed).draw(period, shuffled)
    assert drawn == Sample(layers, seed=seed).draw(period, NAMES)
    assert len(drawn) == layers and drawn <= set(NAMES)


def test_every_pair_of_layers_is_drawn_about_as_often():
    """Chi-squared of 3000 draws over the 15 pairs: more than 36 has a chance of 1 in 1000, were they random."""
    counts = Counter(Sample(layers=2).draw(period, NAMES) for period in range(3000))
    pairs = [frozenset(pair) for pair in combinations(NAMES, 2)]
    assert set(counts) == set(pairs)
    assert sum((counts[pair] - 200) ** 2 / 200 for pair in pairs) < 36


def test_other_seeds_draw_otherwise():
    runs = {tuple(Sample(seed=seed).draw(period, NAMES) for period in range(9)) for seed in range(20)}
    assert len(runs) == 20


# Bad input: one line each, with the mend


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(-1, "head"), r"start=-1: write epochs \(2 or 0.5\), '100 steps' or '30%'"),
        (lambda: Stage("soon", "head"), r"start='soon': write epochs"),
        (lambda: Stage(True, "head"), r"start=True: write epochs"),
        (lambda: Stage(None, "head"), r"start=None: write epochs"),
        (lambda: Stage(math.nan, "head"), r"start=nan: write epochs"),
        (lambda: Stage("1.5 steps", "head"), r"write whole steps"),
        (lambda: Stage("101%", "head"), r"at most 100%"),
        (lambda: Stage(0), r"neither unfreezes nor freezes"),
        (lambda: Stage(0, "head", lr=0), r"lr=0 in the stage at 0: write a positive rate"),
        (lambda: Stage(0, "head", lr="fast"), r"lr='fast' in the stage"),
        (lambda: Stage(0, "head", lr=math.inf), r"lr=inf in the stage"),
        (lambda: Stage(0, "head", lr={"head": -1}), r"lr={'head': -1} in the stage at 0: write a positive rate"),
        (lambda: Stage(0, "head", lr={"head": None}), r"lr={'head': None} in the stage"),
        (lambda: Stage(0, "head", lr={"head,": 1}), r"a term is missing"),
        (lambda: Stage(0, "all", sample=2), r"sample=2 in the stage at 0 needs layers to draw from"),
        (lambda: Stage(0, freeze="all", sample=Sample()), r"sample=.* needs layers to draw from"),
        (lambda: Sample(layers=0), r"layers=0 in a sample: write a whole number from 1"),
        (lambda: Sample(steps=0.5), r"steps=0.5 in a sample"),
        (lambda: Sample(seed=None), r"seed=None in a sample: write a whole number from 0"),
        (lambda: Stage(0, "head", layer_decay=-0.9), r"layer_decay=-0.9 in the stage at 0: write e.g. 0.9"),
        (lambda: Stage(0, "head", warmup=-1), r"warmup=-1 in the stage at 0: write a number of steps"),
        (lambda: Stage(0, "head", warmup=0.5), r"warmup=0.5 in the stage"),
        (lambda: Stage(0, "head,"), r"a term is missing"),
        (lambda: Stage(0, 3), r"A selector is a string, not int"),
    ],
)
def test_what_can_not_be_said_is_refused_at_once(make, message):
    with pytest.raises(FreezeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
