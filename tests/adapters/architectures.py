"""What holds for adapters in a model of any architecture: checks that a test and a benchmark run on all of them.

Each check takes a `Trial`: a tiny model, a copy of it with adapters in, and the inputs of both.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cached_property

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_freeze import BottleneckConfig, freeze, layer_map
from hf_freeze.adapters import BottleneckLayer
from tests.tiny import forward_loss, output_tensors, tiny_inputs

# What fails with an adapter behind each layer, and why.
FAILING = {
    "reformer": "runs its layers backwards to save memory: adapters are refused, and frozen embeddings stop it",
    "rwkv": "frozen, so in eval mode, it writes its state in place, into what gradients need: pass use_cache=False",
    "squeezebert": "its encoder calls forward() of each layer, past all hooks: refused, placement='houlsby' works",
    "unlimited_ocr": "transformers' load_adapter renames language_model.layers twice; PeftModel loads it",
}


class Trial:
    """One architecture with adapters of one placement.

    Args:
        base: The model; it is frozen, since torch multiplies by other kernels, with other last bits, what trains.
        placement: Where the adapters go.

    Raises:
        AdapterError: they can't go there.
    """

    def __init__(self, base: PreTrainedModel, placement: str) -> None:
        self.base, self.inputs = base.requires_grad_(False), tiny_inputs(base)
        self.model = copy.deepcopy(base)
        self.model.add_adapter(BottleneckConfig(placement=placement, bottleneck_size=4))
        freeze(self.model, "base")  # BatchNorm statistics stand still in training
        self.start = outputs(base, self.inputs)

    @property
    def adapters(self) -> dict[str, BottleneckLayer]:
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, BottleneckLayer)}

    @cached_property
    def trained(self) -> list[Tensor]:
        """The outputs once the adapters have random weights."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for adapter in self.adapters.values():
                for parameter in adapter.parameters():
                    nn.init.normal_(parameter, std=0.3)
        return outputs(self.model, self.inputs)


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The floating outputs of one pass in eval mode, seeded: some models draw random numbers even so."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [tensor for tensor in output_tensors(model.eval()(**inputs)) if tensor.is_floating_point()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Tells whether two passes are equal bit for bit; not-a-number equals itself."""
    if len(one) != len(other) or not one:
        return False
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def starts_as_the_identity(trial: Trial) -> bool:
    return same(outputs(trial.model, trial.inputs), trial.start)


def has_an_effect(trial: Trial) -> bool:
    return not same(trial.trained, trial.start)


def trains_adapters_alone(trial: Trial) -> bool:
    assert trial.trained
    trial.model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        forward_loss(trial.model.train(), trial.inputs).backward()
    reached = {name for name, p in trial.model.named_parameters() if p.grad is not None and p.grad.any()}
    own = {f"{name}.{p}" for name, adapter in trial.adapters.items() for p, _ in adapter.named_parameters()}
    return bool(reached) and reached <= own


def gives_the_base_back_when_disabled(trial: Trial) -> bool:
    trial.model.disable_adapters()
    disabled = outputs(trial.model, trial.inputs)
    trial.model.enable_adapters()
    return same(disabled, trial.start)


def loads_as_it_was_saved(trial: Trial) -> bool:
    fresh = copy.deepcopy(trial.base)
    with tempfile.TemporaryDirectory() as folder:
        trial.model.save_pretrained(folder)
        if type(fresh).load_adapter is PreTrainedModel.load_adapter:
            fresh.load_adapter(folder)
        else:  # Wav2Vec2 has a method of that name that loads something else
            fresh = PeftModel.from_pretrained(fresh, folder).base_model.model
    return same(outputs(fresh, trial.inputs), trial.trained)


Check = Callable[[Trial], bool]
LIGHT: tuple[Check, ...] = (starts_as_the_identity, has_an_effect, trains_adapters_alone)
CHECKS: tuple[Check, ...] = (*LIGHT, gives_the_base_back_when_disabled, loads_as_it_was_saved)


def idle_stacks(trial: Trial) -> list[str]:
    """The stacks no adapter of which got a gradient in the last backward pass."""
    reached: dict[str, bool] = {}
    for segment in layer_map(trial.model):
        if segment.kind == "adapters" and segment.stack:
            grads = [trial.model.get_parameter(name).grad for name in segment.parameter_names]
            got = any(grad is not None and bool(grad.any()) for grad in grads)
            reached[segment.stack] = reached.get(segment.stack, False) or got
    return [stack for stack, got in reached.items() if not got]
