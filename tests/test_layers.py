"""The layer map, form by form: what each architecture's segments are, how they are named, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import on_meta, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_freeze import LayerMap, Segment, freeze, layer_map
from hf_freeze.errors import LayerMapError, SelectorError
from tests.notebook_tables import rows_of


def mapped(model_type: str, class_name: str | None = None, **config) -> LayerMap:
    """The layer map of a model at full size, on `meta`; of the base model, unless a class is named."""
    build = getattr(transformers, class_name) if class_name else AutoModel.from_config
    with on_meta():
        return layer_map(build(AutoConfig.for_model(model_type, **config)))


def names(layers: LayerMap) -> list[str]:
    return [segment.name for segment in layers]


def only(segments: tuple[Segment, ...]) -> Segment:
    (segment,) = segments
    return segment


def test_bert(make_bert):
    model = make_bert()
    layers = layer_map(model)
    assert names(layers) == ["embeddings", "layers[0]", "layers[1]", "pooler", "head"]
    assert layers.owners.keys() == dict(model.named_parameters()).keys()
    assert only(layers["layers[1]"]) == Segment(
        name="layers[1]",
        kind="layer",
        stack="encoder",
        index=1,
        module_names=("bert.encoder.layer.1",),
        parameter_names=tuple(n for n, _ in model.named_parameters() if n.startswith("bert.encoder.layer.1.")),
    )
    assert [only(layers[kind]).module_names for kind in ("embeddings", "pooler", "head")] == [
        ("bert.embeddings",),
        ("bert.pooler",),
        ("dropout", "classifier"),
    ]


def test_the_only_layer_of_a_stack_is_the_layer_and_not_its_list(make_bert):
    assert only(layer_map(make_bert(num_hidden_layers=1))["layers[0]"]).module_names == ("bert.encoder.layer.0",)


def test_albert_has_one_layer_of_twelve_passes():
    layers = mapped("albert")
    assert names(layers) == ["embeddings", "layers[0]", "pooler"]
    assert only(layers["layers[0]"]).passes == 12
    assert only(layers["layers"]).module_names == ("encoder.albert_layer_groups.0.albert_layers.0",)


@pytest.mark.parametrize(
    ("model_type", "class_name", "depth"),
    [
        ("t5", "T5ForConditionalGeneration", 6),
        ("bart", "BartForConditionalGeneration", 12),
        ("whisper", "WhisperForConditionalGeneration", 4),
    ],
)
def test_encoder_and_decoder_are_two_stacks(model_type, class_name, depth):
    layers = mapped(model_type, class_name)
    assert layers.stacks == ("encoder", "decoder")
    assert only(layers["encoder.layers[0]"]).stack == "encoder"
    assert [layer.name for layer in layers["layers"]] == [
        f"{stack}.layers[{index}]" for stack in layers.stacks for index in range(depth)
    ]
    assert [layer.name for layer in layers["layers[-1]"]] == [
        f"encoder.layers[{depth - 1}]",
        f"decoder.layers[{depth - 1}]",
    ]
    assert names(layers)[-1] == "head"


def test_clip_has_two_towers():
    layers = mapped("clip")
    assert layers.stacks == ("text_model", "vision_model")
    assert only(layers["vision_model.embeddings"]).module_names == (
        "vision_model.embeddings",
        "vision_model.pre_layrnorm",
    )
    assert [norm.stack for norm in layers["norm"]] == ["text_model", "vision_model"]
    assert set(only(layers["other"]).parameter_names) == {
        "logit_scale", "visual_projection.weight", "text_projection.weight"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "class_name", "depth", "last"),
    [
        ("resnet", "ResNetForImageClassification", 16, "resnet.encoder.stages.3.layers.2"),
        ("swin", "SwinForImageClassification", 12, "swin.encoder.layers.3.blocks.1"),
        ("convnext", "ConvNextForImageClassification", 18, "convnext.encoder.stages.3.layers.2"),
    ],
)
def test_the_blocks_of_stages_are_the_layers(model_type, class_name, depth, last):
    layers = mapped(model_type, class_name)
    assert [layer.index for layer in layers["layers"]] == list(range(depth))
    assert only(layers["layers[-1]"]).module_names == (last,)
    assert {segment.kind for segment in layers} >= {"embeddings", "layer", "head"}


def test_patch_merging_goes_with_the_block_before_it():
    assert only(mapped("swin")["layers[1]"]).module_names == (
        "encoder.layers.0.blocks.1",
        "encoder.layers.0.downsample",
    )


def test_jamba_mixes_the_classes_of_its_layers():
    layers = mapped("jamba")
    classes = {type(layers.model.get_submodule(only((layer,)).module_names[0])).__name__ for layer in layers["layers"]}
    assert classes == {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"}
    assert len(layers["layers"]) == layers.model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_zambas_shared_block_is_owned_by_the_first_layer_that_holds_it(model_type):
    layers = mapped(model_type)
    shared = [layer for layer in layers["layers"] if layer.tied_names]
    owners = {layers.owners[layers.aliases[name]].index for layer in shared for name in layer.tied_names}
    assert len(layers["layers"]) == layers.model.config.num_hidden_layers
    assert shared and max(owners) < min(layer.index for layer in shared)


@pytest.mark.parametrize(
    ("model_type", "class_name", "owned", "tied"),
    [
        ("gpt2", "GPT2LMHeadModel", "transformer.wte.weight", ("lm_head.weight",)),
        ("t5", "T5ForConditionalGeneration", "shared.weight", ("lm_head.weight",)),
        ("bert", "BertForMaskedLM", "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
    ],
)
def test_a_tied_head_is_held_by_the_head_and_owned_by_the_embeddings(model_type, class_name, owned, tied):
    layers = mapped(model_type, class_name)
    head = only(layers["head"])
    assert layers.owners[owned].name == "embeddings"
    assert owned not in head.parameter_names
    assert owned in layers.held_by(head)
    assert [name for name in head.tied_names if layers.aliases[name] == owned] == list(tied)


def test_lora_weights_are_adapters_of_their_layers(make_bert):
    plain = layer_map(make_bert())
    model = get_peft_model(make_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    layers = layer_map(model)
    assert names(layers) == [
        "embeddings", "layers[0]", "layers[0].adapters", "layers[1]", "layers[1].adapters", "pooler", "head"
    ]  # fmt: skip
    lora = {name for segment in layers["adapters"] for name in segment.parameter_names}
    assert lora == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert [len(layer.parameter_names) for layer in layers["layers"]] == [
        len(layer.parameter_names) for layer in plain["layers"]
    ]


class TorchvisionResNet(nn.Module):
    """torchvision's way: a stem, layer1 to layer4, and fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for number in range(1, 5):
            stage = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)))
            setattr(self, f"layer{number}", stage)
        self.fc = nn.Linear(4, 2)


class Tagger(nn.Module):
    """A module written by hand around a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3))
        self.final_norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 2)


def test_numbered_stages_of_a_plain_module():
    layers = layer_map(TorchvisionResNet())
    assert repr(layers) == "LayerMap(TorchvisionResNet: embeddings, layers[0:8], head)"
    assert only(layers["embeddings"]).module_names == ("conv1", "bn1")
    assert only(layers["head"]).module_names == ("fc",)


def test_a_plain_module_with_a_list_of_layers():
    layers = layer_map(Tagger())
    assert names(layers) == ["embeddings", "layers[0]", "layers[1]", "layers[2]", "norm", "head"]


def test_a_model_without_a_stack_has_a_map_without_layers():
    layers = layer_map(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    assert (names(layers), layers.stacks, layers.layers) == (["other"], (), ())
    assert len(only(layers["all"]).parameter_names) == 4
    with pytest.raises(SelectorError, match=r"^Sequential has no stack of layers\. It has: other\.$"):
        layers["layers[0]"]


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(LayerMapError, match=r"^ReLU has no parameters, so there is nothing to map[.]$"):
        layer_map(nn.ReLU())


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model is its child `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile], ids=["ddp", "compile"])
@pytest.mark.parametrize("make", [lambda make_bert: make_bert(), lambda _: Tagger()], ids=["bert", "plain"])
def test_a_wrapped_model_has_the_same_segments(wrap, make, make_bert):
    model = make(make_bert)
    plain, wrapped = layer_map(model), layer_map(wrap(model))
    assert names(wrapped) == names(plain)
    prefix = next(iter(wrapped.owners)).removesuffix(next(iter(plain.owners)))
    assert [[f"{prefix}{name}" for name in s.parameter_names] for s in plain] == [
        list(s.parameter_names) for s in wrapped
    ]


@pytest.mark.parametrize("model_type", ["bert", "albert", "xlm", "t5", "resnet", "swin", "zamba2"])
def test_freezing_leaves_the_map_as_it_is(model_type):
    with on_meta():
        model = AutoModel.from_config(tiny_config(model_type))
    before = layer_map(model)
    freeze(model, "all")
    assert layer_map(model) == before


def test_freezing_leaves_the_map_of_a_wrapped_plain_module_as_it_is():
    model = Wrapper(Tagger())
    before = layer_map(model)
    freeze(model, "all")
    assert layer_map(model) == before


def test_repr_is_the_map_in_one_line(make_bert):
    assert (
        repr(layer_map(make_bert())) == "LayerMap(BertForSequenceClassification: embeddings, layers[0:2], pooler, head)"
    )
    assert layer_map(make_bert()).outline == "embeddings, layers[0:2], pooler, head"


@pytest.mark.parametrize("index", ["[0]", "[-1]", "[1:]", "[:2]", "[-2:]", "[::2]", "[::-1]", "[3:1]", ""])
def test_layers_are_indexed_as_a_python_list(index, make_bert):
    layers = layer_map(make_bert(num_hidden_layers=3))
    expected = eval(f"list(range(3)){index}")  # the property: Python's own list says what is right
    found = [layer.index for layer in layers.find(f"layers{index}")]
    assert found == (expected if isinstance(expected, list) else [expected])


def test_terms_name_segments(make_bert):
    layers = layer_map(make_bert())
    assert layers["all"] == layers.segments == tuple(layers)
    assert [segment.name for segment in layers["base"]] == ["embeddings", "layers[0]", "layers[1]", "pooler"]
    assert layers["encoder.layers"] == layers["layers"] == layers.layers
    assert layers.find("adapters") == layers.find("word_embeddings") == ()
    assert len(layers) == 5


@pytest.mark.parametrize("name", ["embeddings", "layers[0]", "layers[1]", "pooler", "head"])
def test_each_segment_is_found_by_its_own_name(name, make_bert):
    assert only(layer_map(make_bert())[name]).name == name


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("embedings", "'embedings' names no segment of BertForSequenceClassification. Did you mean 'embeddings'? "
                      "It has: embeddings, layers[0:2], pooler, head."),
        ("layer", "'layer' names no segment of BertForSequenceClassification. Did you mean 'layers'"),
        ("decoder.layers", "'decoder.layers' names no segment of BertForSequenceClassification."),
        ("layers[2]", "layers[2]: stack 'encoder' has 2 layers, indices -2 to 1."),
        ("layers[one]", "layers[one]: [one] is no Python index or slice. Write [3], [-2:], [:8] or [::2]."),
        ("layers[]", "layers[]: [] is no Python index or slice."),
        ("layers[::0]", "layers[::0]: [::0] is no Python index or slice."),
    ],
)  # fmt: skip
def test_an_unknown_term_is_an_error_that_names_the_mend(term, message, make_bert):
    with pytest.raises(SelectorError) as error:
        layer_map(make_bert())[term]
    assert str(error.value).startswith(message)


def test_a_kind_is_all_of_its_kind_also_where_one_segment_has_just_that_name():
    layers = mapped("bart")

    assert [s.name for s in layers["embeddings"]] == [s.name for s in layers if s.kind == "embeddings"]
    assert len(layers["embeddings"]) == 3


def test_a_map_shows_in_a_notebook_as_a_table(make_bert):
    model = make_bert()
    layers = layer_map(model)

    html = layers._repr_html_()

    heading, *rows = rows_of(html)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    size = sum(sizes[name] for name in only(layers["layers[1]"]).parameter_names)
    assert f"<caption>BertForSequenceClassification: {sum(sizes.values()):,} parameters</caption>" in html
    assert heading == ["segment", "class", "parameters", "passes"]
    assert [row[0] for row in rows] == names(layers)
    assert rows[2] == ["layers[1]", "BertLayer", f"{size:,}", "1"]
