"""How adapters hang on a module: fed by hooks, in the right order, with nothing left when they are taken out."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_freeze.adapters import BottleneckConfig, BottleneckLayer
from hf_freeze.adapters.layer import attach, detach, rows_by_name, taken_out
from hf_freeze.adapters.placement import Site
from hf_freeze.errors import AdapterError

WIDTH = 8


def adapted(host: nn.Module, site: Site, config: BottleneckConfig, entry: nn.Module | None = None, name="a"):
    """Attaches a random adapter to `host`, and makes it active."""
    torch.manual_seed(0)
    layer = attach(host, site, entry, convolutional=False)
    layer.add(name, config, site, layer)
    layer.set_adapter([name])
    return layer


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WIDTH)


def config(**options) -> BottleneckConfig:
    return BottleneckConfig(bottleneck_size=4, init="bert", **options)


def site(**options) -> Site:
    return Site("host", WIDTH, 4, **options)


def delta(layer: BottleneckLayer, hidden: torch.Tensor, name="a") -> torch.Tensor:
    """The adapter written out."""
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    return torch.relu(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias


def test_an_adapter_adds_to_the_output():
    host, hidden = linear(), torch.randn(2, 3, WIDTH)
    plain = host(hidden)
    layer = adapted(host, site(), config(scaling=3.0))
    assert torch.allclose(host(hidden), plain + 3 * delta(layer, plain), atol=1e-6)


def test_of_a_tuple_only_the_first_changes():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, hidden):
            return self.inner(hidden), hidden, None

    host, hidden = Layer(), torch.randn(2, 3, WIDTH)
    plain = host(hidden)
    adapted(host, site(), config())
    changed = host(hidden)
    assert isinstance(changed, tuple)
    assert not torch.equal(changed[0], plain[0])
    assert changed[1] is hidden and changed[2] is None


def test_behind_a_closing_norm_it_adds_before_the_norm():
    """Pfeiffer et al. 2021: ``norm(x + y + delta(norm(x + y)))``."""
    host, stream = nn.LayerNorm(WIDTH), torch.randn(2, 3, WIDTH)
    plain = host(stream)
    layer = adapted(host, site(reads="norm"), config())
    assert torch.allclose(host(stream), nn.functional.layer_norm(stream + delta(layer, plain), (WIDTH,)), atol=1e-6)


def test_a_parallel_adapter_reads_what_entered():
    """He et al. 2022: ``y + delta(x)``."""
    first, last, entered = linear(), linear(), torch.randn(2, 3, WIDTH)
    plain = last(torch.tanh(first(entered)))
    layer = adapted(last, site(reads="entry", entry="first"), config(), entry=first)
    assert torch.allclose(last(torch.tanh(first(entered))), plain + delta(layer, entered), atol=1e-6)
    assert layer._entered is None  # no tensor is kept after the pass


@pytest.mark.parametrize("way", ["disabled", "inactive"])
def test_nothing_is_kept_for_an_adapter_that_does_not_run(way):
    first, last = linear(), linear()
    layer = adapted(last, site(reads="entry", entry="first"), config(), entry=first)
    if way == "disabled":
        layer.enable_adapters(False)
    else:
        layer.set_adapter([])
    first(torch.randn(2, WIDTH))
    assert layer._entered is None


def test_a_pass_that_breaks_off_can_be_copied():
    """Recomputation stops early; what it leaves has a graph, which deepcopy refuses."""
    first, last = linear(), linear()
    model = nn.Sequential(first, last)
    adapted(last, site(reads="entry", entry="0"), config(), entry=first)
    first(torch.randn(2, WIDTH, requires_grad=True) * 2)
    hidden = torch.randn(2, WIDTH)
    assert torch.equal(copy.deepcopy(model)(hidden), model(hidden))


def test_a_parallel_adapter_whose_entry_was_not_called_says_so():
    last = linear()
    adapted(last, site(reads="entry", entry="first"), config(), entry=linear())
    with pytest.raises(AdapterError, match="'first' was not called before"):
        last(torch.randn(2, WIDTH))


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_active_adapters_follow_one_another(order):
    host, hidden = linear(), torch.randn(2, WIDTH)
    plain = host(hidden)
    layer = adapted(host, site(), config(scaling=30.0))
    adapted(host, site(), config(scaling=50.0), name="b")
    layer.set_adapter(order)
    after_first = plain + layer.delta(order[0], plain)
    assert torch.equal(host(hidden), after_first + layer.delta(order[1], after_first))


def test_channels_may_come_second():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, pixels):
            return self.inner(pixels)

    host, pixels = Convolution(), torch.randn(2, WIDTH, 5, 3)
    plain = host(pixels)
    layer = adapted(host, site(), config())
    last = plain.movedim(1, -1)
    assert torch.allclose(host(pixels), (last + delta(layer, last)).movedim(-1, 1), atol=1e-6)


def test_the_length_of_a_sequence_may_be_left_open():
    """A comparison of the length with the width would fix it."""
    host = linear()
    adapted(host, site(), config())
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(host, (torch.randn(2, 3, WIDTH),), dynamic_shapes=({1: length},))
    for size in (WIDTH, 5):
        hidden = torch.randn(2, size, WIDTH)
        assert torch.allclose(program.module()(hidden), host(hidden), atol=1e-6)


def test_an_output_of_another_width_is_refused():
    host = nn.Linear(WIDTH, WIDTH + 1)
    adapted(host, site(), config())
    with pytest.raises(AdapterError, match=r"width 8 got hidden states of shape \(2, 9\)"):
        host(torch.randn(2, WIDTH))


def test_an_output_that_is_no_tensor_is_refused():
    class Odd(nn.Module):
        def forward(self, hidden):
            return {"hidden": hidden}

    host = Odd()
    adapted(host, site(), config())
    with pytest.raises(AdapterError, match="Odd returns dict"):
        host(torch.randn(2, WIDTH))


def test_a_module_with_an_adapter_of_its_own_is_refused():
    host = nn.Module()
    host.adapter = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="has a part named 'adapter' of its own"):
        attach(host, site(), None, convolutional=False)


def test_its_hook_comes_before_those_that_were_there():
    """transformers records `hidden_states` with a hook, which would otherwise see the output without the adapter."""
    host, seen, hidden = linear(), [], torch.randn(2, WIDTH)
    host.register_forward_hook(lambda module, inputs, output: seen.append(output))
    adapted(host, site(), config())
    assert host(hidden) is seen[0]


def test_taking_out_leaves_no_trace():
    first, last = linear(), linear()
    model = nn.Sequential(first, last)
    names, hidden = list(model.state_dict()), torch.randn(2, WIDTH)
    plain = model(hidden)
    last.register_forward_hook(kept := lambda module, inputs, output: None)
    adapted(last, site(reads="entry", entry="0"), config(), entry=first)
    detach(model)
    assert list(model.state_dict()) == names
    assert list(last._forward_hooks.values()) == [kept] and not first._forward_pre_hooks
    assert torch.equal(model(hidden), plain)


def test_adapters_can_be_taken_out_for_a_while():
    first, last = linear(), linear()
    model, hidden = nn.Sequential(first, last), torch.randn(2, WIDTH)
    plain = model(hidden)
    adapted(last, site(reads="entry", entry="0"), config(), entry=first)
    changed = model(hidden)
    with pytest.raises(RuntimeError), taken_out(model):
        assert torch.equal(model(hidden), plain)
        assert not any(isinstance(module, BottleneckLayer) for module in model.modules())
        raise RuntimeError
    assert torch.equal(model(hidden), changed)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_adapters_of_its_own(clone):
    first, last = linear(), linear()
    model, hidden = nn.Sequential(first, last), torch.randn(2, WIDTH)
    adapted(last, site(reads="entry", entry="0"), config(), entry=first)
    changed, twin = model(hidden), clone(model)
    assert torch.equal(twin(hidden), changed)
    nn.init.zeros_(last.adapter.bottleneck_up["a"].weight)
    nn.init.ones_(last.adapter.bottleneck_up["a"].bias)
    assert torch.equal(twin(hidden), changed)
    assert twin[1].adapter.get_base_layer() is twin[1]


def test_the_whole_module_is_saved_by_torch():
    host, hidden, file = linear(), torch.randn(2, WIDTH), io.BytesIO()
    adapted(host, site(), config())
    torch.save(host, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(hidden), host(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_takes_the_dtype_of_its_host(dtype):
    host = linear().to(dtype)
    layer = adapted(host, site(), config(gating=True, scaling="learned", layer_norm_after=True))
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert host(torch.randn(2, 3, WIDTH, dtype=dtype)).dtype == dtype


def test_an_adapter_goes_to_the_device_that_is_asked_for():
    host = linear()
    layer = adapted(host, site(), config())
    host.weight, host.bias = (nn.Parameter(tensor.to("meta")) for tensor in (host.weight, host.bias))
    layer.double()
    layer._move_adapter_to_device_of_base_layer("a", device=torch.device("cpu"))  # the host's own would be no place
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


def test_an_adapter_of_a_quantised_host_keeps_its_own_dtype():
    host = linear()
    host.weight, host.bias = nn.Parameter(host.weight.to(torch.int8), requires_grad=False), None
    layer = adapted(host, site(), config())
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


def test_an_adapter_of_another_dtype_gives_the_dtype_of_its_host():
    host = linear().bfloat16()
    adapted(host, site(), config()).float()
    assert host(torch.randn(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rows_of_a_batch_go_by_name():
    rows = rows_by_name(["a", "__base__", "a"], torch.empty(3, 1))
    assert {name: index.tolist() for name, index in rows.items()} == {"a": [0, 2], "__base__": [1]}


def test_each_name_stands_for_all_that_a_row_was_multiplied_to():
    """Beams, and the windows of a Swin, multiply rows in place."""
    rows = rows_by_name(["a", "b"], torch.empty(6, 1))
    assert {name: index.tolist() for name, index in rows.items()} == {"a": [0, 1, 2], "b": [3, 4, 5]}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_the_names_do_not_fit_is_refused(batch):
    with pytest.raises(AdapterError, match=f"2 names for a batch of {batch}"):
        rows_by_name(["a", "b"], torch.empty(batch, 1))


def test_merging_is_refused():
    layer = adapted(linear(), site(), config())
    with pytest.raises(AdapterError, match="nonlinear and can't be merged"):
        layer.merge()
