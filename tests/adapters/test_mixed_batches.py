"""A batch in which each row has an adapter of its own gives each row what that adapter alone would give it."""

import dataclasses

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from hf_freeze.errors import AdapterError
from tests.adapters.kinds import CAUSAL, SEQ2SEQ, TEXT, alone, config, each_kind, each_placement, logits, stir, two


def mixed_and_alone(model, inputs, run):
    """A batch of one row three times, each with another adapter, beside each adapter run on the whole batch."""
    names = ["y", "__base__", "x"]
    batch = {name: tensor[:1].repeat(3, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    mixed = run(batch, adapter_names=names)
    rows = []
    for number, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(batch)[number])
        else:
            model.set_adapter(name)
            rows.append(run(batch)[number])
    return mixed, torch.stack(rows)


@each_kind
@each_placement
def test_each_row_of_a_mixed_batch_is_as_by_its_adapter_alone(kind, placement):
    model = two(kind, placement=placement, modules_to_save=[kind.head]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.y" in name:
                parameter.mul_(-2)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in kind.inputs().items()}
    mixed, rows = mixed_and_alone(model, inputs, lambda batch, **more: logits(model, batch, **more))
    assert torch.allclose(mixed, rows, atol=1e-6)  # in double: in fp32 products of other batch sizes round otherwise
    assert not torch.allclose(rows[0], rows[2], atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 1, "use_cache": False},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4, min_new_tokens=4)},
    ],
    ids=["greedy", "beams", "no cache", "config"],
)
@pytest.mark.parametrize("kind", [CAUSAL, SEQ2SEQ], ids=["causal", "seq2seq"])
def test_each_row_is_generated_as_by_its_adapter_alone(kind, options):
    model = get_peft_model(kind.model(**({"decoder_start_token_id": 0} if kind is SEQ2SEQ else {})), config(), "x")
    model.add_adapter("y", config())
    for name, seed in (("x", 1), ("y", 2)):
        stir(model, name, seed)
    more = {} if "generation_config" in options else {"max_new_tokens": 4, "min_new_tokens": 4}

    def run(batch, **names):
        return model.eval().generate(**batch, **names, **options, **more)

    mixed, rows = mixed_and_alone(model, {"input_ids": kind.inputs()["input_ids"]}, run)
    assert torch.equal(mixed, rows)
    assert not torch.equal(rows[0], rows[2])


def test_a_mixed_batch_needs_eval_mode_known_names_and_one_a_row():
    model, inputs = two(TEXT), TEXT.inputs()
    with pytest.raises(AdapterError, match=r"'xx' is not loaded\. Did you mean 'x'\?"):
        model(**inputs, adapter_names=["xx", "y"])
    with pytest.raises(AdapterError, match="1 names for a batch of 2"):
        model(**inputs, adapter_names=["x"])
    with pytest.raises(AdapterError, match="3 names for a batch of 2"):
        model(**inputs, adapter_names=["x", "y", "x"])
    with pytest.raises(AdapterError, match=r"eval mode alone\. Call model\.eval\(\)"):
        model.train()(**inputs, adapter_names=["x", "y"])
    assert torch.equal(logits(model.eval(), inputs), alone(TEXT, 1))


def test_a_mixed_batch_is_refused_where_rows_are_not_the_first_dimension():
    """XLNet's hidden states are (positions, batch, d); with as many positions as rows, the wrong ones would change."""
    kind = dataclasses.replace(TEXT, model_type="xlnet")
    model, inputs = two(kind), kind.inputs()
    with pytest.raises(AdapterError, match="samples can't be told apart"):
        model(input_ids=inputs["input_ids"][:, :2], adapter_names=["x", "y"])


def test_a_mixed_batch_whose_positions_are_flattened():
    """OPT's feed-forward gets (batch * positions, d), those of each row together."""
    kind = dataclasses.replace(CAUSAL, model_type="opt")
    model = two(kind, placement="parallel")
    mixed, rows = mixed_and_alone(model, kind.inputs(), lambda batch, **more: logits(model, batch, **more))
    assert torch.allclose(mixed, rows, atol=1e-6)
    assert not torch.allclose(rows[0], rows[2], atol=1e-2)
