"""The arithmetic of adapters, against the equations of the papers written out."""

import pytest
import torch
from torch import nn

from hf_freeze.adapters.modules import PHMLinear, StochasticDepth, gate, mix, new_rule, projection, reset


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)])
def test_a_phm_layer_is_a_sum_of_kronecker_products(rank, shape):
    """Compacter, equation 5: ``y = x H + b`` with ``H = sum_i A_i (x) (L_i R_i)``."""
    torch.manual_seed(0)
    layer, rule = PHMLinear(12, 8, 4, rank), new_rule(4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    matrix = sum(torch.kron(rule[i], layer.left[i] @ layer.right[i]) for i in range(4))
    hidden = torch.randn(shape)
    assert torch.allclose(layer(hidden, rule), hidden @ matrix + layer.bias, atol=1e-4)


def test_a_phm_layer_has_a_fraction_of_the_parameters():
    """n * (k + d) * rank / n, and biases, where a dense layer has k * d: Compacter, section 4.4."""
    layer = PHMLinear(768, 48, 4, 1)
    assert sum(parameter.numel() for parameter in layer.parameters()) == (768 + 48) + 48


@pytest.mark.parametrize("phm_dim", [None, 4])
@pytest.mark.parametrize("init", ["mam", "houlsby", "bert"])
def test_what_a_new_bottleneck_adds(init, phm_dim):
    torch.manual_seed(0)
    down, up = projection(32, 8, phm_dim, 1), projection(8, 32, phm_dim, 1)
    reset(down, up, init)
    rule = () if phm_dim is None else (new_rule(phm_dim),)
    added = up(torch.relu(down(torch.randn(3, 32), *rule)), *rule)
    assert added.any() == (init != "mam")
    added.square().sum().backward() if init != "mam" else added.sum().backward()
    assert any(parameter.grad.any() for parameter in up.parameters())  # it can leave where it starts


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 5, 7, 6)])
def test_a_gate_is_one_number_a_sample(shape):
    hidden, linear = torch.randn(shape), nn.Linear(6, 1)
    gates = gate(hidden, linear)
    assert gates.shape == (4, *[1] * (len(shape) - 1))
    expected = torch.sigmoid(linear(hidden[2])).mean()
    assert torch.allclose(gates[2].squeeze(), expected)


def test_mixing_equal_adapters_gives_what_they_give():
    parts = (nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity())
    delta = torch.randn(2, 5, 6)
    mixed = mix(torch.randn(2, 5, 6), torch.stack([delta] * 3, dim=-2), parts)
    assert torch.allclose(mixed, delta, atol=1e-6)


def test_mixing_prefers_the_adapter_whose_key_the_query_matches():
    parts = (nn.Identity(), nn.Identity(), nn.Identity())
    first, second = torch.eye(2) * 30
    assert torch.allclose(mix(first, torch.stack([first, second]), parts), first)


@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_stochastic_depth_keeps_the_mean(probability):
    torch.manual_seed(0)
    layer, delta = StochasticDepth(probability).train(), torch.ones(20_000, 1, 1)
    assert layer(delta).mean().item() == pytest.approx(1.0, abs=0.05)
    assert (layer(delta) == 0).float().mean().item() == pytest.approx(probability, abs=0.02)
    assert torch.equal(layer.eval()(delta), delta)
