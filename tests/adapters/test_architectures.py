"""Adapters hold what they promise on every architecture of transformers that can be built tiny."""

import pytest
import torch
from torch import nn

from hf_freeze.adapters import BottleneckConfig
from hf_freeze.adapters.layer import attach
from hf_freeze.adapters.placement import Site, find_sites
from hf_freeze.errors import AdapterError
from tests.adapters.architectures import CHECKS, FAILING, LIGHT, Trial
from tests.tiny import ARCHITECTURES, all_types, tiny_model

SUBLAYER_PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


def marked(architecture):
    marks = pytest.mark.xfail(strict=True, reason=FAILING[architecture]) if architecture in FAILING else ()
    return pytest.param(architecture, marks=marks)


def test_nearly_all_architectures_run_tiny_and_nearly_all_of_them_hold():
    assert len(set(all_types())) >= 430
    assert set(FAILING) <= set(all_types())
    assert len(FAILING) <= 0.03 * len(all_types())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", map(marked, all_types()))
def test_an_adapter_behind_each_layer(architecture):
    trial = Trial(tiny_model(architecture), "layer")
    for check in CHECKS:
        assert check(trial), check.__name__


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_in_the_sub_layers_works_or_is_refused_with_the_way_out(architecture):
    base = tiny_model(architecture)
    for placement in SUBLAYER_PLACEMENTS:
        try:
            trial = Trial(base, placement)
        except AdapterError as error:
            assert "placement='layer'" in str(error)
            continue
        for check in LIGHT:
            assert check(trial), f"{placement}: {check.__name__}"


def adapted(host, width):
    """Attaches an adapter with random weights to `host`."""
    layer = attach(host, Site("", width, 2), None, convolutional=any(isinstance(m, nn.Conv2d) for m in host.modules()))
    layer.add("a", BottleneckConfig(init="bert"), Site("", width, 2), layer)
    layer.set_adapter(["a"])
    return layer


def test_a_feature_map_as_high_as_it_has_channels_is_adapted_by_channel():
    host = nn.Conv2d(3, 8, 1)
    layer = adapted(host, 8)
    images = torch.randn(2, 3, 8, 5)
    plain = nn.functional.conv2d(images, host.weight, host.bias)

    by_pixel = plain.permute(0, 2, 3, 1).reshape(-1, 8)
    expected = (by_pixel + layer.delta("a", by_pixel)).view(2, 8, 5, 8).permute(0, 3, 1, 2)

    assert torch.allclose(host(images), expected, atol=1e-6)
    assert host(torch.randn(2, 3, 8, 8)).shape == (2, 8, 8, 8)


def test_a_sequential_calls_its_adapter_once():
    host = nn.Sequential(nn.Linear(8, 8))
    layer = adapted(host, 8)
    hidden = torch.randn(4, 8)
    plain = host[0](hidden)

    assert torch.equal(host(hidden), plain + layer.delta("a", plain))


def test_looking_for_sub_layers_leaves_no_trace():
    bigbird = tiny_model("big_bird").train()
    before = [(name, type(module), module.training, module.__dict__.keys()) for name, module in bigbird.named_modules()]

    find_sites(bigbird, BottleneckConfig(placement="houlsby"))

    after = [(name, type(module), module.training, module.__dict__.keys()) for name, module in bigbird.named_modules()]
    assert after == before
    assert bigbird.attention_type == "block_sparse"
