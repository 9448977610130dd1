"""The four kinds of model that PEFT's contract is tested on, tiny, each with inputs, and trained adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_freeze import BottleneckConfig
from hf_freeze.adapters import BottleneckLayer
from tests.tiny import IMAGE, tiny_model

PLACEMENTS = ("layer", "pfeiffer", "houlsby", "parallel")


@dataclass(frozen=True)
class Kind:
    """One kind of model: how it is built, and what PEFT and transformers call it."""

    name: str
    model_type: str
    auto_class: Any
    head: str
    task_type: str | None = None

    def model(self, **overrides: Any) -> PreTrainedModel:
        """The same tiny model each time, in eval mode."""
        return tiny_model(self.model_type, self.auto_class, **overrides)

    def inputs(self, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs, the same each time."""
        generator = torch.Generator().manual_seed(seed)
        if self.name == "vision":
            return {"pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)}
        names = ("input_ids", "decoder_input_ids") if self.name == "seq2seq" else ("input_ids",)
        return {name: torch.randint(10, 90, (rows, 7), generator=generator) for name in names}

    def labels(self) -> dict[str, Tensor]:
        """Labels for the two rows of `inputs`, by the name of the model's argument."""
        if self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            return {"labels": self.inputs(seed=1)["input_ids"]}
        return {"labels": torch.tensor([0, 1])}


TEXT = Kind("text", "bert", transformers.AutoModelForSequenceClassification, "classifier", "SEQ_CLS")
CAUSAL = Kind("causal", "llama", transformers.AutoModelForCausalLM, "lm_head", "CAUSAL_LM")
SEQ2SEQ = Kind("seq2seq", "t5", transformers.AutoModelForSeq2SeqLM, "lm_head", "SEQ_2_SEQ_LM")
VISION = Kind("vision", "vit", transformers.AutoModelForImageClassification, "classifier")
KINDS = (TEXT, CAUSAL, SEQ2SEQ, VISION)

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def config(**options: Any) -> BottleneckConfig:
    """A config whose adapters have an effect at once: the projections start with random numbers."""
    return BottleneckConfig(**{"reduction_factor": 4, "init": "bert", **options})


@torch.no_grad()
def stir(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Gives all weights of the adapter `name` random numbers, far from where they started."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in own_tensors(model, name).values():
        tensor.copy_(torch.empty_like(tensor, dtype=torch.float32).normal_(std=0.3, generator=generator))


def own_tensors(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name`, by their names in the model."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BottleneckLayer)}
    return {
        f"{path}.{inner}": parameter
        for path, layer in layers.items()
        for inner, parameter in layer.named_parameters()
        if name in inner.split(".")
    }


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """What the model puts out, in the mode that it is in."""
    return model(**inputs, **more).logits


def two(kind, **options) -> PeftModel:
    """A PeftModel with the adapters "x" and "y", trained apart; "x" is active."""
    model = get_peft_model(kind.model(), config(**options), adapter_name="x")
    model.add_adapter("y", config(**options))
    stir(model, "x", seed=1)
    stir(model, "y", seed=2)
    return model.eval()


def alone(kind, seed, **options) -> torch.Tensor:
    """What a model with nothing but that one adapter puts out."""
    model = get_peft_model(kind.model(), config(**options))
    stir(model, seed=seed)
    return logits(model.eval(), kind.inputs())


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a plain model, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves a model as it was: its tensors, modules, hooks, and what trains."""
    before, parts, tensors = _hooks(model), [name for name, _ in model.named_modules()], base_tensors(model)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    yield
    assert [name for name, _ in model.named_modules()] == parts
    assert _hooks(model) == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def _hooks(model: nn.Module) -> dict[str, int]:
    return {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}
