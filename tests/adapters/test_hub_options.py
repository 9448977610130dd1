"""AdapterHub's options: each is translated so that nothing is lost, or refused by name."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze import BottleneckConfig, layer_map
from hf_freeze.adapters.hub_options import (
    INIT,
    HubOptions,
    factor_of,
    from_config,
    read_options,
    size_of,
    to_config,
)
from hf_freeze.errors import AdapterError
from tests.adapters.hub import base_model

PFEIFFER = HubOptions(False, True, 16, "relu", original_ln_before=True)
HOULSBY = HubOptions(True, True, 16, "swish")
PARALLEL = HubOptions(False, True, 2, "relu", init_weights="mam_adapter", is_parallel=True, scaling=4.0)
PLUS = HubOptions(False, True, 8, "gelu", original_ln_before=True, original_ln_after=False, residual_before_ln=False)
PAGE = Path(__file__).parents[2] / "docs" / "adapterhub.md"


@pytest.fixture(scope="module")
def bert():
    return layer_map(base_model("bert/pfeiffer"))


@pytest.fixture(scope="module")
def bart():
    return layer_map(base_model("bart/pfeiffer"))


def there_and_back(options, layers):
    config = to_config(options, layers, 32)
    kept = [index for index in range(len(layers.layers)) if index not in options.leave_out]
    return from_config(config, {index: config.width(32) for index in kept}, len(layers.layers), 32)


@given(
    st.sampled_from([PFEIFFER, HOULSBY, PARALLEL, PLUS]),
    st.fixed_dictionaries(
        {
            "reduction_factor": st.sampled_from([2, 16, 32.0, 0.5, 6.4]),
            "non_linearity": st.sampled_from(["relu", "gelu_new", "swish"]),
            "init_weights": st.sampled_from(list(INIT)),
            "ln_before": st.booleans(),
            "ln_after": st.booleans(),
            "use_gating": st.booleans(),
            "scaling": st.sampled_from([1.0, 4.0, "learned", "channel"]),
            "dropout": st.sampled_from([0.0, 0.1]),
            "leave_out": st.sampled_from([[], [0], [1]]),
        }
    ),
)
def test_options_come_back_as_they_were(preset, changes):
    layers = layer_map(base_model("bert/pfeiffer"))
    options = replace(preset, **changes)

    back = there_and_back(options, layers)

    assert size_of(32, back.reduction_factor) == size_of(32, options.reduction_factor)
    if not options.is_parallel:  # where these two change nothing
        assert back.original_ln_before == options.original_ln_before
        assert back.residual_before_ln == options.residual_before_ln
    free = {"reduction_factor": 1, "original_ln_before": True, "residual_before_ln": True}
    assert asdict(back) | free == asdict(options) | free


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_factor_gives_the_same_bottleneck_in_both_libraries(width, size):
    factor = factor_of(width, size)

    assert size_of(width, factor) == size == BottleneckConfig(reduction_factor=factor).width(width)


@pytest.mark.parametrize(
    "options, placement", [(PFEIFFER, "pfeiffer"), (HOULSBY, "houlsby"), (PARALLEL, "parallel"), (PLUS, "layer")]
)
def test_residuals_choose_the_placement(options, placement, bert):
    assert to_config(options, bert, 32).placement == placement


def test_layers_are_counted_through_both_stacks(bart):
    config = to_config(replace(PFEIFFER, leave_out=[0, 3], reduction_factor={"1": 8, "default": 16}), bart, 32)

    assert config.layers == "layers - encoder.layers[0] - decoder.layers[1]"
    assert config.reduction_factor == {"encoder.layers[1]": 8, "layers": 16}


def test_compacter_is_translated(bert):
    config = to_config(replace(HOULSBY, phm_layer=True, phm_dim=2, phm_rank=3, reduction_factor=4), bert, 32)

    assert (config.phm_dim, config.phm_rank, config.placement) == (2, 3, "houlsby")


def test_stochastic_depth_is_left_out_of_parallel_adapters_which_never_apply_it(bert):
    assert to_config(replace(PARALLEL, stochastic_depth=0.5), bert, 32).stochastic_depth == 0
    assert to_config(replace(PLUS, stochastic_depth=0.5), bert, 32).stochastic_depth == 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        (replace(PFEIFFER, inv_adapter="nice"), "inv_adapter='nice'"),
        (replace(PFEIFFER, ln_after=True, adapter_residual_before_ln=True), "adapter_residual_before_ln=True"),
        (replace(PFEIFFER, cross_adapter=True), "cross_adapter=True"),
        (replace(PFEIFFER, phm_layer=True, shared_phm_rule=False), "shared_phm_rule=False"),
        (replace(PFEIFFER, phm_layer=True, factorized_phm_rule=True), "factorized_phm_rule=True"),
        (replace(PFEIFFER, phm_layer=True, factorized_phm_W=False), "factorized_phm_W=False"),
        (replace(PFEIFFER, phm_layer=True, shared_W_phm=True), "shared_W_phm=True"),
        (replace(PFEIFFER, phm_layer=True, learn_phm=False), "learn_phm=False"),
        (replace(PFEIFFER, phm_layer=True, phm_bias=False), "phm_bias=False"),
        (replace(PFEIFFER, residual_before_ln="post_add"), "residual_before_ln=post_add"),
        (replace(PFEIFFER, residual_before_ln=False), "residual_before_ln=False"),
        (replace(PFEIFFER, original_ln_after=False), "original_ln_after=False"),
        (replace(PFEIFFER, mh_adapter=True), "mh_adapter=True"),
        (replace(PFEIFFER, is_parallel=True, original_ln_after=False), "is_parallel=True"),
        (replace(HOULSBY, output_adapter=False), "output_adapter=False"),
        (replace(HOULSBY, mh_adapter=False), "mh_adapter=False"),
        (replace(HOULSBY, is_parallel=True), "is_parallel=True"),
        (replace(HOULSBY, residual_before_ln="post_add"), "residual_before_ln=post_add"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(options, words, bert):
    with pytest.raises(AdapterError, match=words) as error:
        to_config(options, bert, 32)
    assert "Train the adapter anew" in str(error.value)


def test_an_unknown_init_is_refused(bert):
    with pytest.raises(AdapterError, match="init_weights='xavier' is unknown"):
        to_config(replace(PFEIFFER, init_weights="xavier"), bert, 32)


@pytest.mark.parametrize("name", ["inv_adapter_reduction_factor", "phm_c_init", "phm_init_range", "init_weights_seed"])
def test_what_only_started_the_training_is_left_aside(name, bert):
    value = {"phm_c_init": "uniform", "phm_init_range": 0.5}.get(name, 3)
    assert to_config(replace(PFEIFFER, **{name: value}), bert, 32) == to_config(PFEIFFER, bert, 32)


def test_the_presets_of_both_libraries_mean_the_same(bert):
    for options, preset in ((PFEIFFER, "pfeiffer"), (HOULSBY, "houlsby"), (PARALLEL, "parallel")):
        ours = getattr(BottleneckConfig, preset)(init=INIT[options.init_weights])
        assert to_config(options, bert, 32) == ours


def test_an_unread_option_is_an_error_and_an_old_one_without_effect_is_not():
    content = asdict(PFEIFFER)

    assert read_options(content | {"new_attention_norm": False}) == PFEIFFER
    with pytest.raises(AdapterError, match="'ln_befor' is unknown"):
        read_options(content | {"ln_befor": True})


@pytest.mark.parametrize("option", [option.name for option in fields(HubOptions)])
def test_the_manual_says_what_becomes_of_each_option(option):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert any(f"`{option}`" in row.split("|")[1] for row in rows)
