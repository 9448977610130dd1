"""Random stages and schedules, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from hf_freeze import Sample, Stage, UnfreezeSchedule, on_plateau

SELECTORS = ["head", "pooler", "embeddings", "layers[0]", "layers[-1]", "layers[:2]", "bias", "norm", "all"]
positive = st.floats(1e-6, 10)
stage_options = st.fixed_dictionaries(
    {"unfreeze": st.sampled_from(SELECTORS)},
    optional={
        "freeze": st.sampled_from(SELECTORS),
        "lr": st.none() | positive | st.dictionaries(st.sampled_from(SELECTORS), positive, min_size=1),
        "layer_decay": positive,
        "warmup": st.integers(0, 1000),
        "sample": st.none() | st.builds(Sample, st.integers(1, 3), st.integers(1, 50), st.integers(0, 9)),
    },
)


plateaus = st.builds(
    on_plateau,
    st.sampled_from(["eval_loss", "eval_accuracy"]),
    st.integers(1, 9),
    st.floats(0, 1),
    st.sampled_from([None, True, False]),
    st.booleans(),
)


@st.composite
def waiting(draw):
    """Stages of which the last wait for a plateau, one after another."""
    later = draw(st.lists(st.tuples(plateaus, stage_options), min_size=1, max_size=3))
    return [*draw(stages()), *(Stage(start, **own) for start, own in later)]


@st.composite
def stages(draw):
    """Stages at steps 0, a, b, ... that ascend, in one of the three units."""
    options = draw(st.lists(stage_options, min_size=1, max_size=5))
    numbers = sorted(draw(st.sets(st.integers(1, 99), min_size=len(options) - 1, max_size=len(options) - 1)))
    write = draw(st.sampled_from([lambda n: n, "{} steps".format, "{}%".format, "{} epochs".format, lambda n: n / 4]))
    return [Stage(write(number), **own) for number, own in zip([0, *numbers], options, strict=True)]


rates = {"lr": st.none() | positive, "layer_decay": positive, "warmup": st.integers(0, 9)}
presets = st.one_of(
    *(
        st.builds(preset, epochs_per_stage=positive, layers_per_stage=st.integers(1, 9), **rates)
        for preset in (UnfreezeSchedule.gradual, UnfreezeSchedule.bottom_up, UnfreezeSchedule.chain_thaw)
    ),
    st.builds(UnfreezeSchedule.lp_ft, probe=positive | st.just("30%"), probe_lr=st.none() | positive, **rates),
    st.builds(UnfreezeSchedule.lisa, st.integers(1, 9), st.integers(1, 99), st.integers(0, 9), **rates),
)
