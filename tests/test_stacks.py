"""Where the layers are: read off module trees, written by hand here in each of the shapes that models have."""

from __future__ import annotations

import pytest
from tiny import on_meta
from torch import nn
from transformers import AlbertConfig, AutoConfig, AutoModel, VisionTextDualEncoderConfig, ViTConfig

from hf_freeze.freezing import freeze
from hf_freeze.stacks import Stack, find_stacks


class Block(nn.Module):
    """A layer: a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


def tree(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def layers(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The layers of the only stack."""
    (stack,) = find_stacks(model)
    return stack.layers


def on_meta_from(model_type: str) -> nn.Module:
    with on_meta():
        return AutoModel.from_config(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("name", ["layers", "layer", "blocks", "h", "resblocks", "encoder_layers"])
def test_a_list_with_the_name_of_layers_is_a_stack(name):
    assert find_stacks(tree(**{name: blocks(3)})) == (
        Stack(name, "", ((f"{name}.0",), (f"{name}.1",), (f"{name}.2",))),
    )


@pytest.mark.parametrize("name", ["experts", "heads", "conv_layers", "fpn_blocks", "quantizer_layers"])
def test_a_list_with_another_name_is_none(name):
    assert find_stacks(tree(**{name: blocks(3)})) == ()


def test_a_list_of_single_convolutions_is_none():
    plain = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(3))
    normalised = nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1)) for _ in range(3))
    assert find_stacks(tree(in_layers=plain)) == find_stacks(tree(in_layers=normalised)) == ()


def test_a_layer_without_parameters_belongs_to_the_layer_before_it():
    assert layers(tree(layers=nn.Sequential(Block(), nn.ReLU(), Block()))) == (
        ("layers.0", "layers.1"),
        ("layers.2",),
    )


def test_stages_written_as_lists_are_opened():
    assert layers(tree(stages=nn.ModuleList([blocks(2), blocks(1)]))) == (
        ("stages.0.0",),
        ("stages.0.1",),
        ("stages.1.0",),
    )


def test_what_a_stage_holds_beside_its_blocks_goes_with_the_nearest_block():
    stage = tree(patches=nn.Linear(2, 2), blocks=blocks(2), merge=nn.Linear(2, 2))
    assert layers(tree(layers=nn.ModuleList([stage]))) == (
        ("layers.0.patches", "layers.0.blocks.0"),
        ("layers.0.blocks.1", "layers.0.merge"),
    )


def test_lists_in_the_items_of_one_list_are_one_stack():
    level = [tree(block=blocks(2), down=nn.Linear(2, 2)) for _ in range(2)]
    assert layers(tree(down=nn.ModuleList(level))) == (
        ("down.0.block.0",),
        ("down.0.block.1", "down.0.down"),
        ("down.1.block.0",),
        ("down.1.block.1", "down.1.down"),
    )


def test_numbered_lists_are_the_stages_of_one_stack():
    model = tree(layer1=nn.Sequential(Block(), Block()), layer2=nn.Sequential(Block()), fc=nn.Linear(2, 2))
    assert layers(model) == (("layer1.0",), ("layer1.1",), ("layer2.0",))


def test_lists_side_by_side_make_one_layer_of_each_index():
    assert layers(tree(attentions=blocks(2), ffns=blocks(2), other=blocks(3))) == (
        ("attentions.0", "ffns.0"),
        ("attentions.1", "ffns.1"),
    )


def test_stacks_take_the_shortest_names_that_tell_them_apart():
    text = tree(encoder=tree(layers=blocks(1)))
    model = tree(model=tree(text=text, vision=tree(global_layers=blocks(1), layers=blocks(1))))
    assert [(stack.name, stack.region) for stack in find_stacks(model)] == [
        ("text", "model.text"),
        ("vision.global_layers", "model.vision.global_layers"),
        ("vision.layers", "model.vision.layers"),
    ]


def test_a_shared_list_is_one_stack():
    shared = tree(layers=blocks(2))
    assert len(find_stacks(tree(encoder=shared, inner=tree(twin=shared)))) == 1


@pytest.mark.parametrize(("groups", "passes"), [(1, 12), (3, 4)])
def test_albert_passes_through_each_of_its_layers_again_and_again(groups, passes):
    with on_meta():
        model = AutoModel.from_config(AlbertConfig(num_hidden_groups=groups))
    (stack,) = find_stacks(model)
    assert (len(stack.layers), stack.passes) == (groups, passes)


def test_passes_are_those_of_the_stacks_own_model():
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(), AlbertConfig())
    with on_meta():
        model = AutoModel.from_config(config)
    assert {stack.name: stack.passes for stack in find_stacks(model)} == {"vision_model": 1, "text_model": 12}


@pytest.mark.parametrize(
    ("model_type", "depth"),
    [
        ("resnet", 3 + 4 + 6 + 3),
        ("swin", 2 + 2 + 6 + 2),
        ("convnext", 3 + 3 + 9 + 3),
        ("segformer", 2 + 2 + 2 + 2),
        ("pvt_v2", 2 + 2 + 2 + 2),
        ("cvt", 1 + 2 + 10),
        ("xlm", 12),
        ("data2vec-audio", 12),
    ],
)
def test_the_layers_of_a_model_with_stages_are_its_blocks(model_type, depth):
    assert len(layers(on_meta_from(model_type))) == depth


def test_the_guard_of_frozen_modules_changes_nothing():
    convolutions = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(2))
    model = tree(layers=blocks(2), inner=tree(res_layers=convolutions), fc=nn.Linear(2, 2))
    before = find_stacks(model)
    freeze(model, "all - inner.res_layers.1")
    assert find_stacks(model) == before
