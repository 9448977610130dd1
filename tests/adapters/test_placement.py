"""From a config to the modules that get an adapter."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from hf_freeze import BottleneckConfig, layer_map
from hf_freeze.adapters.placement import Site, block_of, find_sites, target_layers, width_of
from hf_freeze.errors import AdapterError, SelectorError


def test_an_adapter_behind_each_layer_by_default() -> None:
    model = tiny_model("bert")

    sites = find_sites(model, BottleneckConfig(reduction_factor=2))

    assert list(sites) == [f"encoder.layer.{index}" for index in range(len(model.encoder.layer))]
    assert sites["encoder.layer.0"] == Site("encoder.layer.0", width=32, size=16)


PLACES = {
    ("pfeiffer", "bert"): [("encoder.layer.0.output.LayerNorm", "norm", None)],
    ("pfeiffer", "gpt2"): [("h.0", "output", None)],  # pre-norm: behind the addition is behind the layer
    ("houlsby", "bert"): [
        ("encoder.layer.0.attention.output.dense", "output", None),
        ("encoder.layer.0.output.dense", "output", None),
    ],
    ("parallel", "bert"): [("encoder.layer.0.output.dense", "entry", "encoder.layer.0.intermediate")],
    ("parallel", "gpt2"): [("h.0.mlp", "entry", "h.0.ln_2")],  # what goes into the sub-layer, before its norm
}


@pytest.mark.parametrize(("placement", "model_type"), PLACES)
def test_where_each_placement_puts_the_adapters_of_a_layer(placement: str, model_type: str) -> None:
    config = BottleneckConfig(placement=placement, layers="layers[0]")

    sites = find_sites(tiny_model(model_type), config).values()

    assert [(site.module, site.reads, site.entry) for site in sites] == PLACES[placement, model_type]


def test_cross_attention_gets_an_adapter_where_it_is_asked_for() -> None:
    model = tiny_model("bart")
    with_it, without = (
        find_sites(model, BottleneckConfig.houlsby(cross_attention=flag, layers="decoder.layers[0]"))
        for flag in (True, False)
    )

    assert with_it.keys() - without.keys() == {"decoder.layers.0.encoder_attn.out_proj"}


def test_both_stacks_get_adapters() -> None:
    sites = find_sites(tiny_model("t5"), BottleneckConfig())

    assert {name.partition(".")[0] for name in sites} == {"encoder", "decoder"}


def test_a_reduction_factor_for_each_part_of_the_model() -> None:
    model = tiny_model("bert")
    config = BottleneckConfig(reduction_factor={"layers[0]": 2, "layers": 8})  # the first that names a layer counts

    assert [site.size for site in find_sites(model, config).values()] == [16, 4]


def test_a_layer_without_a_factor_is_an_error() -> None:
    with pytest.raises(AdapterError, match=r"no factor for 'layers\[1\]'.*'layers': 16"):
        find_sites(tiny_model("bert"), BottleneckConfig(reduction_factor={"layers[0]": 2}))


@pytest.mark.parametrize(
    ("selector", "names"), [("layers - layers[0]", ["layers[1]"]), ("layers[1], layers[0]", ["layers[1]", "layers[0]"])]
)
def test_layers_are_chosen_in_the_order_of_the_selector(selector: str, names: list[str]) -> None:
    chosen = target_layers(layer_map(tiny_model("bert")), selector)

    assert [segment.name for segment in chosen] == names


def test_sites_are_in_depth_order() -> None:
    sites = find_sites(tiny_model("bert"), BottleneckConfig(layers="layers[1], layers[0]"))

    assert list(sites) == ["encoder.layer.0", "encoder.layer.1"]


@pytest.mark.parametrize("option", [{"gating": True}, {"stochastic_depth": 0.1}], ids=["gating", "depth"])
@pytest.mark.parametrize(("model_type", "placement"), [("xlnet", "layer"), ("opt", "parallel")])
def test_what_goes_by_sample_is_refused_where_samples_are_not_apart(
    option: dict, model_type: str, placement: str
) -> None:
    """XLNet's hidden states are (positions, batch, d); OPT's feed-forward gets (batch * positions, d)."""
    model = tiny_model(model_type)
    assert find_sites(model, BottleneckConfig(placement=placement))

    with pytest.raises(
        AdapterError, match=r"for a batch of 2, in which samples can't be told apart.*another placement"
    ):
        find_sites(model, BottleneckConfig(placement=placement, **option))


@pytest.mark.parametrize("model_type", ["bert", "t5", "vit", "swin", "resnet", "opt"])
def test_what_goes_by_sample_is_taken_where_the_batch_comes_first(model_type: str) -> None:
    assert find_sites(tiny_model(model_type), BottleneckConfig(gating=True))


@pytest.mark.parametrize(
    ("selector", "error", "says"),
    [
        ("head", SelectorError, "head"),
        ("embeddings", AdapterError, r"'embeddings', which is no layer"),
        ("layers - layers", AdapterError, "leaves no layer"),
        ("layers[9]", SelectorError, "has 2 layers"),
    ],
)
def test_what_names_no_layer_is_refused(selector: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        target_layers(layer_map(tiny_model("bert")), selector)


@pytest.mark.parametrize(("model_type", "stack"), [("bert", "layers[0]"), ("t5", "decoder.layers[0]")])
def test_the_width_is_that_of_the_hidden_states(model_type: str, stack: str) -> None:
    model = tiny_model(model_type)
    (segment,) = layer_map(model)[stack]

    assert width_of(model, block_of(segment)) == 32


def test_the_widths_of_stages_differ() -> None:
    model = tiny_model("swin")
    widths = [width_of(model, block_of(segment)) for segment in layer_map(model).layers]

    assert widths == sorted(widths) and len(set(widths)) > 1


def test_a_layer_that_is_run_past_all_hooks_gets_no_adapter_behind_it_but_inside() -> None:
    model = tiny_model("squeezebert")

    with pytest.raises(AdapterError, match=r"run by its forward\(\), past all hooks.*placement='houlsby'"):
        find_sites(model, BottleneckConfig())

    assert find_sites(model, BottleneckConfig.houlsby())


@pytest.mark.parametrize("placement", ["layer", "pfeiffer", "houlsby", "parallel"])
def test_layers_that_run_backwards_for_their_gradients_get_no_adapters(placement: str) -> None:
    with pytest.raises(AdapterError, match=r"run once more, backwards.*Freeze and unfreeze layers instead"):
        find_sites(tiny_model("reformer"), BottleneckConfig(placement=placement))
