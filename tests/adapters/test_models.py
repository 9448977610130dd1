"""What transformers' models can do, they can do with adapters in."""

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_freeze import BottleneckConfig
from tests.adapters.kinds import (
    CAUSAL,
    SEQ2SEQ,
    TEXT,
    VISION,
    Kind,
    config,
    each_kind,
    each_placement,
    logits,
    own_tensors,
    stir,
)

BART = Kind("seq2seq", "bart", SEQ2SEQ.auto_class, "lm_head", "SEQ_2_SEQ_LM")
GPT2 = Kind("causal", "gpt2", AutoModelForCausalLM, "lm_head", "CAUSAL_LM")
MLM = Kind("text", "bert", AutoModelForMaskedLM, "cls")
RESNET = Kind("vision", "resnet", VISION.auto_class, "classifier")


def adapted(kind, model=None, **options):
    """A transformers model with one trained adapter."""
    model = model or kind.model()
    model.add_adapter(config(**options))
    stir(model)
    return model.eval()


# Recorded states


def states(model, kind):
    """The hidden states that a model records: of its only stack, or of its encoder."""
    with torch.no_grad():
        output = model(**kind.inputs(), output_hidden_states=True)
    return output.encoder_hidden_states if "encoder_hidden_states" in output else output.hidden_states


DEPTHS = {"t5": {"num_layers": 3}, "bart": {"encoder_layers": 3}, "resnet": {}}


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("kind", [TEXT, CAUSAL, SEQ2SEQ, BART, VISION, RESNET], ids=lambda kind: kind.model_type)
def test_hidden_states_are_the_adapted_ones(kind, recorded_before):
    """The state behind the first adapted layer is what the adapter made of it, also if a recorder was there before."""
    depth = DEPTHS.get(kind.model_type, {"num_hidden_layers": 3})
    plain, model = states(kind.model(**depth), kind), kind.model(**depth)
    if recorded_before:
        states(model, kind)
    adapted(kind, model, layers="layers - layers[0]")
    pairs = zip(plain, states(model, kind), strict=True)
    different = [not torch.equal(before, after) for before, after in pairs]
    assert different == [False, False] + [True] * (len(plain) - 2)  # first the embeddings, then layer by layer


@each_kind
def test_attentions_are_still_given(kind):
    model = adapted(kind, kind.model(attn_implementation="eager"), placement="houlsby")
    with torch.no_grad():
        output = model(**kind.inputs(), output_attentions=True)
    attentions = output.attentions if "attentions" in output else output.decoder_attentions
    assert all(torch.allclose(part.sum(-1), torch.ones(()), atol=1e-5) for part in attentions)
    assert len(attentions) == 2


# Generation


@each_placement
@pytest.mark.parametrize("kind", [CAUSAL, GPT2, SEQ2SEQ, BART], ids=lambda kind: kind.model_type)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_cache_changes_no_token(kind, placement, options):
    model = adapted(kind, kind.model(decoder_start_token_id=2), placement=placement)
    prompt = kind.inputs()["input_ids"]
    tokens = [
        model.generate(prompt, use_cache=cached, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*tokens)


@each_placement
def test_the_cache_gives_the_same_logits_as_one_pass(placement):
    model, ids = adapted(CAUSAL, placement=placement), CAUSAL.inputs()["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], dim=1), whole, atol=1e-5)


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))


def test_a_pipeline_runs(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model = adapted(TEXT)
    run = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    scores = {entry["label"]: entry["score"] for entry in run("a b c")[0]}
    expected = logits(model, dict(tokenizer("a b c", return_tensors="pt"))).softmax(-1)[0]
    assert scores == pytest.approx({f"LABEL_{index}": value.item() for index, value in enumerate(expected)}, abs=1e-5)


# Training


def gradients(model, kind):
    model.zero_grad()
    model.train()(**kind.inputs(), **kind.labels()).loss.backward()
    return {name: tensor.grad.clone() for name, tensor in own_tensors(model).items()}


@each_placement
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [TEXT, CAUSAL, BART, VISION], ids=lambda kind: kind.model_type)
def test_gradient_checkpointing_changes_no_gradient(kind, placement, reentrant):
    model = kind.model(**NO_DROPOUT.get(kind.model_type, {}))
    adapted(kind, model, placement=placement)
    expected = gradients(model, kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, kind)
    assert found.keys() == expected.keys()
    # With several decoder layers, reentrant checkpointing sums what they send to the encoder in another order.
    same = partial(torch.allclose, atol=1e-6) if kind is BART else torch.equal
    assert all(same(found[name], gradient) for name, gradient in expected.items())
    assert all(gradient.any() for gradient in expected.values())


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bart": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kind
@each_placement
def test_half_precision_bases(kind, placement, dtype):
    """PEFT keeps adapters in float32 unless told otherwise; transformers gives them the dtype of the base."""
    model = get_peft_model(kind.model().to(dtype), config(placement=placement))
    assert {tensor.dtype for tensor in own_tensors(model).values()} == {torch.float32}
    native = kind.model().to(dtype)
    native.add_adapter(config(placement=placement))
    assert {tensor.dtype for tensor in own_tensors(native).values()} == {dtype}
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in kind.inputs().items()}
    for adapted_model in (model, native):
        output = adapted_model(**inputs, **kind.labels())
        assert output.logits.dtype == dtype and torch.isfinite(output.logits).all()
        output.loss.backward()
        assert all(torch.isfinite(tensor.grad).all() for tensor in own_tensors(adapted_model).values())


def test_peft_can_be_told_to_keep_the_dtype_of_the_base():
    model = get_peft_model(TEXT.model().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {tensor.dtype for tensor in own_tensors(model).values()} == {torch.bfloat16}


def test_a_model_moved_to_another_dtype_takes_its_adapters_along():
    model = adapted(TEXT).double()
    assert logits(model, TEXT.inputs()).dtype == torch.float64
    assert torch.allclose(logits(model, TEXT.inputs()).float(), logits(adapted(TEXT), TEXT.inputs()), atol=1e-5)


# Compilers


@pytest.mark.slow
@each_placement
@pytest.mark.parametrize("kind", [TEXT, CAUSAL, VISION], ids=lambda kind: kind.model_type)
def test_torch_compile_takes_the_whole_graph(kind, placement):
    """The backend needs no C compiler; what is tested is that there is nothing in the graph that breaks it."""
    torch._dynamo.reset()
    model = adapted(kind, placement=placement)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(logits(compiled, kind.inputs()), logits(model, kind.inputs()), atol=1e-5)


@pytest.mark.slow
@each_placement
@pytest.mark.parametrize("kind", [TEXT, VISION], ids=lambda kind: kind.model_type)
def test_torch_export(kind, placement):
    model, inputs = adapted(kind, placement=placement), kind.inputs()
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False)
    assert torch.allclose(logits(exported.module(), inputs), logits(model, inputs), atol=1e-5)


# Copies and surgery


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@each_kind
@each_placement
def test_copies_act_alike(kind, placement, clone):
    model = adapted(kind, placement=placement)
    assert torch.equal(logits(clone(model), kind.inputs()), logits(model, kind.inputs()))


@pytest.mark.parametrize("kind", [GPT2, MLM, SEQ2SEQ], ids=["gpt2", "bert-mlm", "t5"])
def test_tied_embeddings_stay_tied(kind):
    model = kind.model(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = adapted(kind, model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


@pytest.mark.parametrize("kind", [CAUSAL, GPT2, SEQ2SEQ, MLM], ids=lambda kind: kind.model_type)
def test_embeddings_can_be_resized(kind):
    model, size = adapted(kind), kind.model().get_input_embeddings().num_embeddings
    before = logits(model, kind.inputs())
    model.resize_token_embeddings(size + 7)
    after = logits(model, kind.inputs())
    assert after.shape[-1] == size + 7
    assert torch.allclose(after[..., :size], before, atol=1e-6)


@pytest.mark.parametrize("kind", [TEXT, CAUSAL, VISION], ids=lambda kind: kind.model_type)
@each_placement
def test_the_attention_implementation_can_be_changed(kind, placement):
    model = adapted(kind, kind.model(attn_implementation="sdpa"), placement=placement)
    before = logits(model, kind.inputs())
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(logits(model, kind.inputs()), before, atol=1e-5)


@each_placement
def test_hooks_of_the_user_see_the_adapted_output_and_survive(placement):
    model, seen = TEXT.model(), []
    layer = model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    adapted(TEXT, model, placement=placement)
    plain = states(TEXT.model(), TEXT)[1]
    changed = states(model, TEXT)[1]
    assert torch.equal(seen[-1], changed) and not torch.equal(changed, plain)
    model.delete_adapter("default")
    assert torch.equal(logits(model, TEXT.inputs()), logits(TEXT.model(), TEXT.inputs()))
    assert torch.equal(seen[-1], plain)


def test_a_pre_hook_of_the_user_may_change_what_enters():
    model = adapted(TEXT, placement="parallel")
    before = logits(model, TEXT.inputs())
    entry = model.bert.encoder.layer[0].intermediate
    entry.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    assert not torch.allclose(logits(model, TEXT.inputs()), before, atol=1e-4)


@each_kind
@each_placement
def test_names_and_classes_of_the_base_stay(kind, placement):
    """Checkpoints, sharding plans and wrapping by class go by them."""
    plain, model = kind.model(), adapted(kind, placement=placement)
    assert [name for name in model.state_dict() if ".adapter." not in name] == list(plain.state_dict())
    classes = {name: type(module) for name, module in plain.named_modules()}
    assert all(type(model.get_submodule(name)) is known for name, known in classes.items())
    assert type(model) is type(plain)


def test_an_untrained_adapter_changes_no_bit():
    model = TEXT.model()
    model.add_adapter(BottleneckConfig())
    assert torch.equal(logits(model, TEXT.inputs()), logits(TEXT.model(), TEXT.inputs()))
