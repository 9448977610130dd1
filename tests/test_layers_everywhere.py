"""The layer map on all that transformers registers: each base model type, and the classes with a head.

Models are built on the `meta` device. The tables name every exception with its reason; what they don't name holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from tiny import on_meta, tiny_config
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_freeze import LayerMap, layer_map

BASE_TYPES = sorted(modeling_auto.MODEL_MAPPING_NAMES)
HEAD_TASKS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "IMAGE_CLASSIFICATION", "CAUSAL_LM", "MASKED_LM",
    "QUESTION_ANSWERING", "SEQ_TO_SEQ_CAUSAL_LM",
)  # fmt: skip
CHUNKS = 16  # tests that each walk is cut into, for several workers to share

# Model types of transformers 5.23 that their default config does not build, by what they want.
NOT_BUILT: dict[str, str] = {
    "timm": "conditional_detr dab-detr deformable_detr detr edgetam edgetam_vision_model fast_vlm gemma3n "
    "gemma3n_vision omdet-turbo pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm "
    "table-transformer timm_backbone timm_wrapper",
    "natten": "dinat",
    "detectron2": "layoutlmv2",
    "torchaudio": "higgs_audio_v2_tokenizer",
    "a prediction length": "autoformer informer time_series_transformer",
    "an auto class that knows it": "evolla",
    "values that its default config lacks": "aya_vision chameleon cohere_compass cohere_compass_text dbrx "
    "deepseek_ocr2 diffusion_gemma dots1 emu3 esm funnel granite4_vision hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl "
    "hunyuan_vl_text lfm2_moe ministral moonshine_streaming musicgen musicgen_melody nemotron pp_ocrv6_medium_det "
    "qwen4_exp qwen4_exp_text t5gemma2_encoder voxtral_realtime_text",
}
WITHOUT_STACK = {"glm_image_vqmodel"}  # a codebook between two convolutions

# Model types whose config gives another number of layers than there are, by the reason.
COUNTED_OTHERWISE: dict[str, str] = {
    "passes count, not layers": "albert hrm_text",
    "HGNetV2 builds `stage_num_blocks` and ignores `depths`": "hgnet_v2 d_fine deimv2 pp_doclayout_v3 pp_doclayout_v4",
    "the number of stages counts too, or a part that stands in the head": "clap pp_ocrv5_mobile_rec "
    "pp_ocrv5_server_rec pp_ocrv6_small_rec",
    "the config counts expansions, not blocks": "efficientnet",
    "the config counts blocks of a stage": "janus",
    "the base model leaves a part out": "kyutai_speech_to_text moshi",
    "attention and feed-forward are layers of their own; the way to the next stage is one": "levit swiftformer",
    "a layer holds two attentions": "longcat_flash",
    "the config counts the predictions, one more than the layers": "mask2former oneformer",
    "stem and later stages are two stacks": "vibevoice vibevoice_asr vibevoice_acoustic_tokenizer "
    "vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder",
}

# Classes with a head that neither a tiny nor the default config builds, besides those of the types above.
HEADS_NOT_BUILT = {
    "Gemma4AssistantForCausalLM": "wants the sizes of the model that it assists",
    "Gemma4UnifiedAssistantForCausalLM": "wants the sizes of the model that it assists",
    "PerceiverForImageClassificationConvProcessing": "wants sizes that fit its preprocessor",
    "PerceiverForImageClassificationFourier": "wants sizes that fit its preprocessor",
    "ReformerModelWithLMHead": "wants is_decoder=True",
}
# Classes with a head that is not all that stands outside `base_model`.
HEAD_INSIDE_THE_BASE = {
    "PerceiverForImageClassificationLearned": "its decoder is a part of the base model",
    "PerceiverForSequenceClassification": "its decoder is a part of the base model",
    "FSMTForConditionalGeneration": "its head is the decoder's output projection",
    "ShieldGemma2ForImageClassification": "the base model is a model with a language-model head",
    "Nemotron3_5TranscribeForConditionalGeneration": "the audio tower in the base model has a classifier",
    "BltForCausalLM": "the patcher in the base model has a language-model head",
}


def named(table: dict[str, str]) -> set[str]:
    return {name for names in table.values() for name in names.split()}


def chunks(items: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "chunk", [items[start::CHUNKS] for start in range(CHUNKS)], ids=map(str, range(CHUNKS))
    )


def not_a_partition(model: PreTrainedModel, layers: LayerMap) -> Iterator[str]:
    owned = [name for segment in layers for name in segment.parameter_names]
    if sorted(owned) != sorted(name for name, _ in model.named_parameters()):
        yield "is no partition of the parameters"
    yield from (f"has {segment.name} without a tensor" for segment in layers if not layers.held_by(segment))


def not_in_depth_order(layers: LayerMap) -> Iterator[str]:
    """Order: embeddings of the whole model, stack by stack its embeddings, layers and rest, other parts, head."""
    stacks = [segment.stack for segment in layers if segment.stack]
    phases = [3 if s.kind == "head" else 1 if s.stack else 0 if s.kind == "embeddings" else 2 for s in layers]
    if phases != sorted(phases) or stacks != sorted(stacks, key=layers.stacks.index):
        yield f"is out of order: {layers.outline}"
    for stack in layers.stacks:
        kinds = [segment.kind for segment in layers if segment.stack == stack]
        if kinds != sorted(kinds, key=lambda kind: {"embeddings": 0, "layer": 1}.get(kind, 2)):
            yield f"has the parts of {stack} out of order: {kinds}"
        indices = [segment.index for segment in layers.layers if segment.stack == stack]
        if indices != list(range(len(indices))):
            yield f"numbers the layers of {stack} {indices}"


def not_its_modules(layers: LayerMap) -> Iterator[str]:
    everywhere = {name for segment in layers for name in under(segment.module_names, layers)}
    for segment in layers:
        inside = {layers.aliases[name] for name in under(segment.module_names, layers)}
        if foreign := inside - set(layers.held_by(segment)):
            yield f"gives {segment.name} modules that hold {min(foreign)}"
        for name in set(layers.held_by(segment)) - inside:
            if under((name.rpartition(".")[0],), layers) <= everywhere:  # else its module holds other segments, too
                yield f"gives {segment.name} no module for {name}"


def under(modules: tuple[str, ...], layers: LayerMap) -> set[str]:
    """The names of all parameters that the modules hold, tied ones too."""
    prefixes = tuple(f"{module}." if module else "" for module in modules)
    return {name for name in layers.aliases if name.startswith(prefixes)}


def without_its_stacks(model_type: str, config: PretrainedConfig, layers: LayerMap) -> Iterator[str]:
    depths = {stack: len([layer for layer in layers.layers if layer.stack == stack]) for stack in layers.stacks}
    if not depths and model_type not in WITHOUT_STACK:
        yield "has no stack"
    told = set(configured_depths(config))
    if depths and not told <= set(depths.values()) and model_type not in named(COUNTED_OTHERWISE):
        yield f"has {depths} layers where the config says {told}"


def configured_depths(config: PretrainedConfig) -> Iterator[int]:
    """Yields each number of layers that a config and its sub-configs give."""
    if isinstance(depths := getattr(config, "depths", None), list | tuple):
        yield sum(depths)
    else:
        names = ("num_hidden_layers", "encoder_layers", "decoder_layers")
        yield from (depth for name in names if isinstance(depth := getattr(config, name, None), int))
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configured_depths(value)


def test_the_walk_covers_at_least_550_base_models():
    assert len(set(BASE_TYPES) - named(NOT_BUILT)) >= 550


@pytest.mark.slow
@chunks(BASE_TYPES)
def test_every_base_model_has_a_map(chunk):
    faults: dict[str, list[str]] = {}
    for model_type in chunk:
        try:
            with on_meta():
                model = AutoModel.from_config(AutoConfig.for_model(model_type))
        except Exception as error:
            faults[model_type] = [] if model_type in named(NOT_BUILT) else [f"does not build: {error}"]
            continue
        layers = layer_map(model)
        faults[model_type] = [
            *not_a_partition(model, layers),
            *not_in_depth_order(layers),
            *not_its_modules(layers),
            *without_its_stacks(model_type, model.config, layers),
        ]
    assert {model_type: found for model_type, found in faults.items() if found} == {}


def head_classes() -> dict[str, str]:
    """Each class with a head that transformers registers for one of the tasks, to its model type."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items() for task in HEAD_TASKS]
    return {
        name: model_type
        for mapping in mappings
        for model_type, names in mapping
        for name in ([names] if isinstance(names, str) else names)
    }


def build_head(name: str, model_type: str) -> PreTrainedModel:
    """The class built from its tiny config or, where that is none of its own, from its default config."""
    errors = []
    for make_config in (tiny_config, AutoConfig.for_model):
        try:
            with on_meta():
                return getattr(transformers, name)(make_config(model_type))
        except Exception as error:
            errors.append(error)
    raise errors[-1]


def without_its_head(name: str, model: PreTrainedModel, layers: LayerMap) -> Iterator[str]:
    head = {tensor for segment in layers.find("head") for tensor in layers.held_by(segment)}
    base = {tensor for segment in layers["base"] for tensor in segment.parameter_names}
    if base | head != set(layers.owners):
        yield "has parameters neither in base nor in head"
    if name in HEAD_INSIDE_THE_BASE:
        return
    if not head:
        yield "has no head"
    if model.base_model is not model:
        prefix = f"{model.base_model_prefix}."
        if head != (outside := {own for name, own in layers.aliases.items() if not name.startswith(prefix)}):
            yield f"has a head that differs from what is outside {prefix} by {sorted(head ^ outside)}"


@pytest.mark.slow
@chunks(sorted(head_classes().items()))
def test_every_class_with_a_head_has_it_found(chunk):
    faults: dict[str, list[str]] = {}
    for name, model_type in chunk:
        try:
            model = build_head(name, model_type)
        except Exception as error:
            excused = name in HEADS_NOT_BUILT or model_type in named(NOT_BUILT)
            faults[name] = [] if excused else [f"does not build: {error}"]
            continue
        layers = layer_map(model)
        faults[name] = [*not_a_partition(model, layers), *without_its_head(name, model, layers)]
    assert {name: found for name, found in faults.items() if found} == {}
