"""The selector language: each row of its table on real models, and its laws as properties."""

import functools
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_freeze import layer_map, select
from hf_freeze.errors import SelectorError
from hf_freeze.selectors import parse
from tests.tiny import tiny_config, tiny_model

DEPTH = 4
MODELS = {
    "bert": (AutoModelForSequenceClassification, {"num_hidden_layers": DEPTH}),
    "t5": (transformers.AutoModel, {}),
    "clip": (transformers.AutoModel, {}),
    "gpt2": (transformers.AutoModelForCausalLM, {}),  # its head is tied to the embeddings
}


@functools.cache
def mapped(architecture):
    auto_class, overrides = MODELS[architecture]
    return layer_map(tiny_model(architecture, auto_class, **overrides))


def on_bert(selector):
    return select(mapped("bert"), selector)


def under(layers, *prefixes):
    """Returns the parameters under modules, in model order, a tied one by its name in `named_parameters`."""
    held = {own for name, own in layers.aliases.items() if name.startswith(tuple(f"{prefix}." for prefix in prefixes))}
    return tuple(name for name, _ in layers.model.named_parameters() if name in held)


def matching(layers, pattern):
    return tuple(name for name, _ in layers.model.named_parameters() if re.fullmatch(pattern, name))


def block(index):
    return f"bert.encoder.layer.{index}"


# Each row of the table.


@pytest.mark.parametrize(
    "selector, modules",
    [
        ("embeddings", ["bert.embeddings"]),
        ("pooler", ["bert.pooler"]),
        ("head", ["classifier"]),
        ("layers", [block(0), block(1), block(2), block(3)]),
        ("layers[0]", [block(0)]),
        ("layers[-1]", [block(3)]),
        ("layers[:3]", [block(0), block(1), block(2)]),
        ("layers[-2:]", [block(2), block(3)]),
        ("layers[::2]", [block(0), block(2)]),
        ("encoder.layers[1]", [block(1)]),
        ("base", ["bert"]),
        ("all", ["bert", "classifier"]),
        ("bert.encoder.layer.3", [block(3)]),
        ("bert.encoder", ["bert.encoder"]),
        ("re:bert[.]pooler[.].*", ["bert.pooler"]),
        ("*.layer.[12].*", [block(1), block(2)]),
        ("embeddings, head", ["bert.embeddings", "classifier"]),
        ("base - layers", ["bert.embeddings", "bert.pooler"]),
        ("embeddings, layers - layers[1:], pooler", ["bert.embeddings", block(0), "bert.pooler"]),
    ],
)
def test_selectors_of_modules_on_a_classifier(selector, modules):
    assert on_bert(selector) == under(mapped("bert"), *modules)


@pytest.mark.parametrize(
    "selector, pattern",
    [
        ("norm", r".*LayerNorm\.(weight|bias)"),
        ("bias", r".*\.bias"),
        ("classifier.bias", r"classifier\.bias"),
        ("*.LayerNorm.*", r".*LayerNorm.*"),
        ("re:.*query.*", r".*query.*"),
        ("bias - norm", r".*(?<!LayerNorm)\.bias"),
        ("layers[0] - norm - bias", r"bert\.encoder\.layer\.0\..*(?<!LayerNorm)\.weight"),
    ],
)
def test_selectors_of_parameters_on_a_classifier(selector, pattern):
    assert on_bert(selector) == matching(mapped("bert"), pattern)


@pytest.mark.parametrize(
    "architecture, selector, modules",
    [
        ("t5", "encoder.layers[:1]", ["encoder.block.0"]),
        ("t5", "decoder.layers[-1]", ["decoder.block.1"]),
        ("t5", "layers", ["encoder.block", "decoder.block"]),
        ("t5", "layers[0]", ["encoder.block.0", "decoder.block.0"]),
        ("t5", "embeddings", ["shared"]),
        ("t5", "encoder.norm", ["encoder.final_layer_norm"]),
        ("clip", "vision_model.layers[-1]", ["vision_model.encoder.layers.1"]),
        ("clip", "text_model.layers", ["text_model.encoder.layers"]),
        ("clip", "text_model.embeddings", ["text_model.embeddings"]),
        ("clip", "vision_model", ["vision_model"]),
        ("gpt2", "layers[0]", ["transformer.h.0"]),
        ("gpt2", "embeddings", ["transformer.wte", "transformer.wpe"]),
        ("gpt2", "head", ["lm_head"]),
        ("gpt2", "lm_head", ["lm_head"]),
        ("gpt2", "all - head", ["transformer.wpe", "transformer.h", "transformer.ln_f"]),
    ],
)
def test_selectors_of_several_stacks_and_of_a_tied_head(architecture, selector, modules):
    layers = mapped(architecture)

    assert select(layers, selector) == under(layers, *modules)


def test_adapters_and_base_tell_adapters_from_what_they_adapt():
    from peft import LoraConfig

    model = tiny_model("bert", AutoModelForSequenceClassification)
    base = select(model, "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "pooler.dense"]))

    assert select(model, "adapters") == tuple(name for name, _ in model.named_parameters() if "lora" in name)
    assert [name.replace(".base_layer", "") for name in select(model, "base")] == [*base]
    assert set(select(model, "all")) == set(dict(model.named_parameters()))


def test_a_kind_names_its_segments_in_every_stack():
    bart = layer_map(tiny_model("bart"))

    parts = ["shared"] + [
        f"{s}.{part}" for s in ("encoder", "decoder") for part in ("embed_positions", "layernorm_embedding")
    ]
    assert select(bart, "embeddings") == under(bart, *parts)


def test_a_name_that_is_a_module_too_names_both():
    vit = layer_map(tiny_model("vit"))

    assert set(select(vit, "embeddings")) == set(vit["embeddings"][0].parameter_names) == set(under(vit, "embeddings"))


def test_norm_tells_a_normalisation_by_its_class_and_not_by_its_name():
    resnet = layer_map(tiny_model("resnet"))

    norms = {name for name, module in resnet.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in select(resnet, "norm")} == norms


def test_a_model_without_a_stack_is_selected_by_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))

    assert select(model, "norm") == ("1.weight", "1.bias")
    assert select(model, "0") == ("0.weight", "0.bias")
    with pytest.raises(SelectorError, match="no stack of layers"):
        select(model, "layers")


def test_several_expressions_are_their_union_and_the_order_is_the_models():
    assert on_bert(["head", "embeddings - bias", "head"]) == select(mapped("bert"), "embeddings - bias, head")
    assert on_bert("head, embeddings")[0] == "bert.embeddings.word_embeddings.weight"


def test_a_model_and_its_map_select_the_same_on_any_device():
    with torch.device("meta"):
        model = transformers.BertModel(tiny_config("bert"))
    layers = layer_map(model)

    assert select(model, "layers[-1]") == select(layers, "layers[-1]") == under(layers, "encoder.layer.1")


# Laws.

TERMS = [
    "embeddings",
    "layers[0]",
    "layers[-2:]",
    "layers",
    "pooler",
    "head",
    "norm",
    "bias",
    "re:.*query.*",
    "*.dense.*",
]
law = settings(deadline=None, max_examples=50)  # a loaded machine is no counterexample
terms = st.sampled_from(TERMS)
words = st.text("ab.*-", min_size=1).filter(lambda word: word != "-")


@law
@given(terms)
def test_a_term_twice_is_the_term(a):
    assert on_bert(f"{a}, {a}") == on_bert(a)


@law
@given(terms)
def test_a_term_minus_itself_is_nothing_and_nothing_is_an_error(a):
    with pytest.raises(SelectorError, match="names no parameter"):
        on_bert(f"{a} - {a}")
    assert on_bert(f"{a} - {a}, head") == on_bert("head")


@law
@given(terms, terms)
def test_union_is_commutative(a, b):
    assert on_bert(f"{a}, {b}") == on_bert(f"{b}, {a}")


@law
@given(terms, terms, terms)
def test_expressions_are_read_from_the_left_as_sets(a, b, c):
    everything, first, second, third = (set(on_bert(term)) for term in ("all", a, b, c))

    assert set(on_bert(f"all - {a}, {b} - {c}, head")) == ((everything - first) | second) - third | set(on_bert("head"))


bounds = st.none() | st.integers(-DEPTH - 2, DEPTH + 2)


@settings(law, max_examples=300)
@given(bounds, bounds, bounds, st.booleans())
def test_slices_agree_with_python_lists(start, stop, step, short):
    shown = ["" if part is None else str(part) for part in (start, stop, step)]
    selector = f"layers[{':'.join(shown[:2] if step is None and short else shown)}]"
    try:
        chosen = list(range(DEPTH))[start:stop:step]
    except ValueError:  # a step of 0
        chosen = []
    if chosen:
        assert on_bert(selector) == under(mapped("bert"), *map(block, chosen))
    else:
        with pytest.raises(SelectorError, match=re.escape(selector)):
            on_bert(selector)


@law
@given(st.integers(-DEPTH - 3, DEPTH + 3))
def test_indices_agree_with_python_lists(index):
    if -DEPTH <= index < DEPTH:
        assert on_bert(f"layers[{index}]") == under(mapped("bert"), block(range(DEPTH)[index]))
    else:
        with pytest.raises(SelectorError, match=f"has {DEPTH} layers, indices -{DEPTH} to {DEPTH - 1}"):
            on_bert(f"layers[{index}]")


@pytest.mark.parametrize("architecture", MODELS)
def test_every_parameter_is_selected_by_its_own_name_and_by_its_tied_names(architecture):
    layers = mapped(architecture)
    for alias, name in layers.aliases.items():
        assert select(layers, alias) == (name,)


@pytest.mark.parametrize("architecture", MODELS)
def test_every_segment_that_is_no_keyword_is_selected_by_its_own_name(architecture):
    layers = mapped(architecture)
    for segment in layers:
        if segment.name not in ("norm", "embeddings", "other"):
            assert set(select(layers, segment.name)) == set(layers.held_by(segment))


@law
@given(st.lists(st.tuples(st.sampled_from([",", "-"]), words), min_size=1, max_size=5))
def test_what_is_written_is_read_back(pairs):
    (_, first), *rest = pairs
    written = first + "".join(f", {term}" if sign == "," else f" - {term}" for sign, term in rest)

    assert parse(written) == ((",", first), *rest)


@pytest.mark.parametrize(
    "expression, terms",
    [
        ("  a ,b  ", ["a", "b"]),
        ("a-b, c-d - e", ["a-b", "c-d", "e"]),
        ("re:.*(query|key).*, head", ["re:.*(query|key).*", "head"]),
        ("re:a{1,2}, b", ["re:a{1,2}", "b"]),
        ("re:(a, b - c), d", ["re:(a, b - c)", "d"]),
        ("re:[,-]x[^)], head", ["re:[,-]x[^)]", "head"]),
        (r"re:a\,b\(, c", [r"re:a\,b\(", "c"]),
        ("re:a), b", ["re:a)", "b"]),  # what is wrong with it is for the regular expression to say
        ("layers[::-1] - layers[0]", ["layers[::-1]", "layers[0]"]),
    ],
)
def test_signs_in_brackets_and_in_names_belong_to_the_term(expression, terms):
    assert [term for _, term in parse(expression)] == terms


def test_a_regular_expression_may_hold_commas_and_minuses():
    query = matching(mapped("bert"), r".*\.(query|key)\.weight")

    assert on_bert(r"re:.*[.](query|key)[.].{6,6} - re:[^,-]*\.bias") == query


# Errors: what was wrong, what there is, the mend. (Each message: tests/test_messages.py.)


@pytest.mark.parametrize(
    "selector, message",
    [
        (
            "embedings",
            r"'embedings' names no segment.* Did you mean 'embeddings'\?.* embeddings, layers\[0:4\], pooler, head",
        ),
        ("bert.encoder.layr.3", r"Did you mean 'bert\.encoder\.layer\.3"),
        ("layers[4]", r"layers\[4\]: stack 'encoder' has 4 layers, indices -4 to 3"),
        ("layers[x]", r"\[x\] is no Python index or slice\. Write \[3\]"),
        ("layers[1:2:3:4]", r"is no Python index or slice"),
        ("layers[]", r"is no Python index or slice"),
        ("layers[2:1]", r"'layers\[2:1\]': \[2:1\] is an empty slice\. The model has: .*layers\[0:4\]"),
        ("decoder.layers[0]", r"'decoder\.layers\[0\]' names no segment"),
        ("head - all", r"'head - all' names no parameter\. The model has: embeddings, layers\[0:4\], pooler, head"),
        ("adapters", r"'adapters' names no segment"),
        ("re:.*quarry.*", r"'re:\.\*quarry\.\*' matches no parameter of BertForSequenceClassification"),
        ("re:query", r"'re:query' matches no parameter .* matched as a whole"),
        ("*.LayerNorm", r"matched as a whole, such as 'bert\.embeddings\.word_embeddings\.weight'"),
        ("re:(", r"'re:\(' is no regular expression: .*Mend it"),
        ("head,", r"'head,': a term is missing\. Write 'a, b' or 'a - b'"),
        (", head", r"a term is missing"),
        ("- head", r"a term is missing"),
        ("head -", r"a term is missing"),
        ("head - - pooler", r"a term is missing"),
        ("", r"'': a term is missing"),
        ("layers -bias", r"A minus stands between spaces"),
        (3, r"A selector is a string, not int: 3"),
        (None, r"A selector is a string, not NoneType: None"),
        ([["head"]], r"A selector is a string, not list: \['head'\]"),
        ([], r"names no parameter"),
    ],
)
def test_what_cannot_be_selected_is_an_error_that_names_the_mend(selector, message):
    with pytest.raises(SelectorError, match=message):
        on_bert(selector)


def test_what_the_model_has_not_is_not_offered():
    model = tiny_model("bert")  # a base model, without a head

    with pytest.raises(SelectorError) as caught:
        select(model, "head")

    assert "Did you mean" not in str(caught.value)
