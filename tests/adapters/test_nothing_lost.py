"""Nothing trained is lost: base weights that trained beside an adapter travel with it, whichever way it is saved."""

import copy
from functools import partial

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from hf_freeze import Stage, StagedUnfreezing, freeze, unfreeze
from hf_freeze.errors import AdapterError
from hf_freeze.thawed import thawed_tensors
from tests.adapters.kinds import TEXT, Kind, config, each_kind, each_placement, logits
from tests.training import differing, make_trainer, rows, tiny_bert, weights

DEPTHS = {"seq2seq": {"num_layers": 3, "num_decoder_layers": 3}}
MLM = Kind("text", "bert", transformers.AutoModelForMaskedLM, "cls", "CAUSAL_LM")
GPT2 = Kind("causal", "gpt2", transformers.AutoModelForCausalLM, "lm_head", "CAUSAL_LM")
RESNET = Kind("vision", "resnet", transformers.AutoModelForImageClassification, "classifier")


def base(kind=TEXT):
    """The same model of three layers each time."""
    return kind.model(**({} if kind is RESNET else DEPTHS.get(kind.name, {"num_hidden_layers": 3})))


def fit(model, kind=TEXT, steps=2):
    """Trains all that requires a gradient, in train mode."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(steps):
        model.train()(**kind.inputs(), **kind.labels()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained(model, kind=TEXT, thaw="layers[-2:]"):
    """A model with an adapter, in which two base layers were unfrozen for a while, trained, and frozen again."""
    unfreeze(model, thaw)
    before = weights(model)
    fit(model, kind)
    changed = differing(before, weights(model))
    assert any(".adapter." not in name for name in changed)
    freeze(model, thaw)
    return model


def by_peft(kind=TEXT, thaw="layers[-2:]", **options):
    return trained(get_peft_model(base(kind), config(**options)), kind, thaw)


def by_transformers(kind=TEXT, thaw="layers[-2:]", **options):
    model = base(kind)
    model.add_adapter(config(**options))
    return trained(model, kind, thaw)


def load_peft(folder, kind=TEXT, **options):
    return PeftModel.from_pretrained(base(kind), folder, **options).eval()


def load_by_transformers(folder, kind=TEXT):
    model = base(kind)
    model.load_adapter(folder)
    return model.eval()


def plain(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def assert_same(loaded, model, kind=TEXT):
    """The same outputs, and the same weights and buffers, bit for bit."""
    assert torch.equal(logits(loaded, kind.inputs()), logits(model.eval(), kind.inputs()))
    assert not differing(weights(plain(loaded)), weights(plain(model)))


@pytest.mark.parametrize("make", [by_peft, by_transformers])
@each_kind
@pytest.mark.parametrize("load", [load_peft, load_by_transformers])
def test_unfrozen_base_layers_come_back(make, kind, load, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path, kind), model, kind)


@each_placement
def test_with_every_placement(placement, tmp_path):
    model = by_peft(placement=placement)
    model.save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path), model)


@each_kind
def test_with_low_cpu_mem_usage(kind, tmp_path):
    model = by_peft(kind)
    model.save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path, kind, low_cpu_mem_usage=True), model, kind)


@pytest.mark.parametrize("load", [load_peft, load_by_transformers])
def test_saved_again_after_loading(load, tmp_path):
    model = by_peft()
    model.save_pretrained(tmp_path / "first")
    for number in range(2):
        load(tmp_path / ("first" if number == 0 else "again0")).save_pretrained(tmp_path / f"again{number}")
    assert_same(load(tmp_path / "again1"), model)


def test_trained_further_after_loading(tmp_path):
    """What was thawed in the first run and what was in the second are both in the file of the second."""
    by_peft(thaw="layers[-1]").save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(base(), tmp_path / "first", is_trainable=True)
    trained(model, thaw="layers[0]").save_pretrained(tmp_path / "second")
    assert_same(load_peft(tmp_path / "second"), model)


def test_copied_in_between(tmp_path):
    model = copy.deepcopy(by_peft())
    model.save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path), model)


def test_a_few_layers_at_a_time(tmp_path):
    """As LISA does: each layer trains for a while and is frozen again before the next."""
    model = get_peft_model(base(), config())
    for layer in (2, 0):
        trained(model, thaw=f"layers[{layer}]")
    model.save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path), model)


def test_what_the_user_unfroze_by_hand(tmp_path):
    model = get_peft_model(base(), config())
    plain(model).bert.pooler.requires_grad_(True)
    fit(model).save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path), model)


def test_beside_a_head_under_modules_to_save(tmp_path):
    model = by_peft(modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    assert_same(load_peft(tmp_path), model)


@pytest.mark.parametrize("kind", [GPT2, MLM], ids=["gpt2", "bert-mlm"])
@pytest.mark.parametrize("make", [by_peft, by_transformers])
@pytest.mark.parametrize("load", [load_peft, load_by_transformers, partial(load_peft, low_cpu_mem_usage=True)])
def test_a_tied_tensor_is_saved_once_and_comes_back_tied(kind, make, load, tmp_path):
    model = make(kind, thaw="embeddings")
    model.save_pretrained(tmp_path)
    embedding = plain(model).get_input_embeddings().weight
    assert (
        sum(tensor.shape == embedding.shape for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
        == 1
    )
    loaded = load(tmp_path, kind)
    assert_same(loaded, model, kind)
    assert plain(loaded).get_output_embeddings().weight is plain(loaded).get_input_embeddings().weight


@pytest.mark.parametrize("make", [by_peft, by_transformers])
@pytest.mark.parametrize("load", [load_peft, load_by_transformers])
def test_statistics_that_drift(make, load, tmp_path):
    """A BatchNorm that nobody keeps in eval mode changes in training, frozen or not."""
    model = make(RESNET, thaw="layers[-1]")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, RESNET)
    assert_same(loaded, model, RESNET)
    fresh = dict(base(RESNET).named_buffers())
    assert not any(torch.equal(buffer, fresh[name]) for name, buffer in plain(loaded).named_buffers())


def test_statistics_that_were_kept_still_are_not_saved(tmp_path):
    model = get_peft_model(base(RESNET), config())
    freeze(model, "base, head")
    fit(model, RESNET).save_pretrained(tmp_path)
    assert not any("running_mean" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert_same(load_peft(tmp_path, RESNET), model, RESNET)


def with_first(native, **options):
    """A model with an adapter called "first", by transformers' own method or by PEFT's."""
    model = base()
    if not native:
        return get_peft_model(model, config(**options), "first")
    model.add_adapter(config(**options), "first")
    return model


@pytest.mark.parametrize("native", [False, True])
def test_base_tensors_that_come_under_another_adapter_are_told_of(native, tmp_path):
    by_peft().save_pretrained(tmp_path)
    model = with_first(native)
    with pytest.warns(UserWarning, match=r"brings \d+ tensors of the base .* 'first' will run on them too.*own"):
        model.load_adapter(tmp_path, adapter_name="second")


@pytest.mark.parametrize("native", [False, True])
def test_a_base_tensor_has_no_place_where_another_adapter_has_a_copy(native, tmp_path):
    by_peft(thaw="head").save_pretrained(tmp_path)
    model = with_first(native, modules_to_save=["classifier"])
    with pytest.raises(AdapterError, match=r"'classifier\.bias', a part of the base, .* under modules_to_save here"):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["first"]


# The Trainer

STAGES = [Stage(0, "adapters"), Stage("2 steps", "layers[-2:]"), Stage("4 steps", "adapters", freeze="layers[-2:]")]


def trainer_for(folder, model, *callbacks, **options):
    return make_trainer(folder, *callbacks, model=model, **options)


def adapted_bert():
    return get_peft_model(tiny_bert(), config(modules_to_save=["classifier"]))


def answers(model):
    return logits(model.eval(), {"input_ids": torch.stack([row["input_ids"] for row in rows(4)])})


def test_a_checkpoint_of_the_trainer_is_the_whole_model(tmp_path):
    model = adapted_bert()
    unfreeze(model, "layers[-2:]")
    trainer_for(tmp_path, model, save_strategy="steps", save_steps=6).train()
    loaded = PeftModel.from_pretrained(tiny_bert(), get_last_checkpoint(str(tmp_path)))
    assert not differing(weights(plain(loaded)), weights(plain(model)))
    assert torch.equal(answers(loaded), answers(model))


def test_a_staged_run_is_the_whole_model(tmp_path):
    """Its last stage has frozen the layers again that its second one trained."""
    model, start = adapted_bert(), weights(adapted_bert())
    trainer_for(tmp_path, model, StagedUnfreezing(STAGES), save_strategy="steps", save_steps=6).train()
    assert any("layer.1." in name and ".adapter." not in name for name in differing(start, weights(model)))
    loaded = PeftModel.from_pretrained(tiny_bert(), get_last_checkpoint(str(tmp_path)))
    assert torch.equal(answers(loaded), answers(model))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_is_taken_up_again_ends_as_if_it_had_gone_through(step, tmp_path):
    whole = adapted_bert()
    trainer_for(tmp_path, whole, StagedUnfreezing(STAGES), save_strategy="steps", save_steps=1).train()
    again = adapted_bert()
    trainer = trainer_for(tmp_path / "again", again, StagedUnfreezing(STAGES))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert not differing(weights(again), weights(whole))


def test_the_best_model_is_loaded_whole(tmp_path):
    """The best checkpoint is that of step 4; until step 6, base layers trained on."""
    seen, model = {}, adapted_bert()

    class Remember(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"])

    scores = iter([0.1, 0.9, 0.2])  # what the metric says at steps 2, 4 and 6
    trainer = trainer_for(
        tmp_path,
        model,
        StagedUnfreezing(STAGES[:2]),
        Remember(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    assert any("layer.1." in name and ".adapter." not in name for name in differing(seen[4], seen[6]))
    assert not differing(weights(model), seen[4])


def test_a_native_model_is_saved_whole_by_the_trainer(tmp_path):
    model = tiny_bert()
    model.add_adapter(config(modules_to_save=["classifier"]))
    unfreeze(model, "layers[-2:]")
    trainer = trainer_for(tmp_path, model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = tiny_bert()
    loaded.load_adapter(tmp_path / "saved")
    assert torch.equal(answers(loaded), answers(model))


def test_marks_do_not_depend_on_the_adapter():
    """An adapter that is added later takes along what was unfrozen before it came."""
    model = base()
    names = unfreeze(model, "layers[-1]")
    adapted = get_peft_model(model, config())
    assert {name.removeprefix("base_model.model.") for name in thawed_tensors(adapted)} == set(names)
