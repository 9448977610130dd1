"""Tiny randomly initialised transformers models of any type, with the inputs they need.

A config is made small by attribute name: every known size attribute that is larger than its tiny value takes the
tiny value, also inside sub-configs; attributes derived from those are left to the config class to derive again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_freeze.inputs import example_inputs

MAX_PARAMETERS = 30_000_000
FRAMES = 64
VOCABULARY = 100
IMAGE = 32

# The model types whose tiny form is known to run forward and backward in train mode.
ARCHITECTURES: tuple[str, ...] = (
    "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "mpnet", "xlnet", "xlm", "gpt2",
    "gpt_neox", "gpt_neo", "gptj", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt",
    "bloom", "falcon", "mamba", "jamba", "zamba2", "mixtral", "t5", "mt5", "bart", "mbart", "pegasus", "whisper",
    "wav2vec2", "hubert", "wavlm", "vit", "deit", "beit", "dinov2", "swin", "swinv2", "convnext", "convnextv2",
    "resnet", "regnet", "bit", "efficientnet", "mobilenet_v1", "mobilenet_v2", "mobilevit", "levit", "cvt",
    "poolformer", "pvt", "segformer", "clip", "siglip", "blip", "perceiver", "videomae", "timesformer", "layoutlm",
    "longformer", "big_bird", "modernbert", "camembert", "xlm-roberta", "ernie", "funnel", "convbert",
    "squeezebert", "rembert", "nystromformer", "fnet", "canine", "data2vec-text", "data2vec-vision",
    "data2vec-audio", "unispeech", "sew", "audio-spectrogram-transformer", "speech_to_text", "vit_mae", "vit_msn",
    "yolos",
)  # fmt: skip


def all_types() -> list[str]:
    """Every model type whose tiny form runs forward and backward: those of a list that the installed release knows.

    ``python benchmarks/architectures.py --list`` writes the list anew.
    """
    listed = (Path(__file__).parent / "architectures.txt").read_text().split()
    return [model_type for model_type in listed if model_type in MODEL_MAPPING_NAMES]


# Attribute name (whole match) -> the largest value it keeps; the first match counts.
INTEGER_LIMITS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?|num_hash_buckets|entity_vocab_size", VOCABULARY),
    (r"attention_hidden_size|ffn_hidden_size|.*intermediate_size|d_ff|.*ffn_dim|d_inner|n_inner|hidden_dim", 64),
    (r".*hidden_size|.*embedding_size|d_model|n_embd|dim|emb(ed)?_dim|d_latents|word_embed_proj_dim", 32),
    (r".*codevector_dim|projection_(dim|size)|pooler_output_size|conv_channels|\w+_channels(?<!num_channels)", 32),
    (r"num_(key_value|kv)_heads|num_experts_per_tok", 2),
    (r".*(attention|n|num|mamba)_heads?|num_query_groups|num_(local_)?experts|n_routed_experts", 4),
    (r"(v_|qk_rope_|qk_nope_)?head_dim|d_kv|d_head|kv_channels|key_dim|groups_width|rotary_dim", 8),
    (r"(q|kv|o)_lora_rank", 16),
    (r"n_layers?|(encoder|decoder)_layers|(decoder_)?num_(hidden_|encoder_|decoder_)?layers", 2),
    (r"num_self_attends_per_block|mask_(time|feature)_length", 2),
    (r"image_size", IMAGE),
    (r"patch_size|sliding_window|attention_window|local_attention", 8),
    (r"window_size|num_frames|num_groups|frames_per_clip", 4),
    (r"max_(2d_)?position_embeddings|n_positions|max_(source|target)_positions|segment_means_seq_len", 128),
    (r"num_mel_bins|input_feat_per_channel|num_conv_pos_embeddings", 16),
    (r"max_length", FRAMES),
    (r"num_latents|num_detection_tokens|num_queries", 8),
    (r"n_window(_infer)?", 16),
    (r"(n|num|topk)_(expert_)?groups?(?<!num_groups)|mamba_n_groups|(mamba_)?n_groups", 1),
    (r"num_filters|n_filters", 4),
    (r"crop_size", IMAGE),
)
DEPTH_LISTS = re.compile(r"depths?|num_block_repeats|block_sizes|layers")
HEAD_LISTS = re.compile(r"num_(attention_)?heads")
WIDTH_LISTS = re.compile(r"hidden_sizes|embed_dim|neck_hidden_sizes|decoder_hidden_sizes|conv_dim|tdnn_dim")
# Floats that take one value: no layer is dropped whole, and none is scaled away or starts out next to zero.
FLOAT_VALUES: tuple[tuple[str, float], ...] = (
    (r".*layerdrop|layer_drop|drop_path_rate", 0.0),
    (r"layer_scale_init_value|layerscale_value", 1.0),
    (r"initializer_range", 0.1),
)
# Sizes that some configs leave open, and then take for granted.
OPEN_SIZES = {
    "vocab_size": VOCABULARY, "head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
}  # fmt: skip
# Special tokens, which lie beyond a tiny vocabulary, keep apart; the first match counts.
TOKENS = (("image", 98), ("video", 97), ("audio", 96), ("start|bos", 95), ("pad", 94), ("end|eos", 99), ("", 93))

# Where the rules fall short: sizes that a model wants to fit together, or that its code takes for granted.
STRONGER = {"initializer_range": 0.5}  # for models that draw batch norm weights from it too
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 64},
    "bamba": {"attn_layer_indices": [1]},
    "bridgetower": {"hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}},
    "bros": {"hidden_size": 128},
    "cvt": {"depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "efficientnet": {
        **STRONGER,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "image_size": 64,
    },
    "exaone4_5_vision": {"window_size": 32},
    "glm4v_moe_text": {**MROPE, "head_dim": 16},
    "glm4v_text": MROPE,
    "glm_image_text": MROPE,
    "glm_ocr_text": MROPE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 96},
    "levit": {"image_size": 64, "patch_size": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {**STRONGER, "image_size": 64},
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": {"window_size": 32}},
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": MROPE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 4]},
    "rwkv": {"attention_hidden_size": 32},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4]},
    "segformer": {"image_size": 64},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "swin": {"image_size": 64, "window_size": 2},
    "swinv2": {"image_size": 64, "window_size": 2},
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": {**MROPE, "head_dim": 16}},
    "glm_ocr": {"text_config": MROPE},
    "glmga": {"text_config": MROPE},
    "gemma3": {"mm_tokens_per_image": 4},
    "hyperclovax_vision_v2": {"vision_config": {"window_size": 32}},
    "qwen2_vl": {"text_config": MROPE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "dots1": {"n_shared_experts": 1},
}


@contextmanager
def on_meta() -> Iterator[None]:
    """Models built inside have shapes and ties but no numbers, so that one of any size takes milliseconds."""
    with torch.device("meta"):
        yield


def _kept_layers(config: PretrainedConfig) -> list[int]:
    """The layers that stay, by their numbers: the first two, or one of each kind where a config lists the kinds."""
    count = getattr(config, "num_hidden_layers", None)
    kept = [0, 1]
    for kinds in (value for value in vars(config).values() if isinstance(value, list | tuple)):
        if len(kinds) == count and all(isinstance(kind, str) for kind in kinds):
            kept += [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
    return sorted(set(kept))


def _small_list(name: str, value: list[Any]) -> list[Any] | None:
    """The tiny form of a list of sizes, of the same length; None where the list is no such thing."""
    if not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return None
    if DEPTH_LISTS.fullmatch(name):
        return [1] * len(value)
    if HEAD_LISTS.fullmatch(name):
        return [4 if item >= 4 else 2 if item >= 2 else 1 for item in value]
    if WIDTH_LISTS.fullmatch(name):
        return [max(16, round(64 * item / max(value) / 16) * 16) for item in value]
    limit = _limit(name)
    return None if limit is None else [min(item, limit) for item in value]


def _limit(name: str) -> int | None:
    """The largest value the integer attribute *name* keeps, or None where it is no size."""
    return next((limit for pattern, limit in INTEGER_LIMITS if re.fullmatch(pattern, name)), None)


def _small_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters with their sections cut to half of the tiny head size."""
    small = {name: _small_rope(part) if isinstance(part, dict) else part for name, part in value.items()}
    if "mrope_section" in value:
        small |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return small


def _small_value(name: str, value: Any, widths: set[int]) -> Any:
    """The tiny form of one attribute, or None to leave the attribute to the config class."""
    if isinstance(value, PretrainedConfig):
        return _small_kwargs(value, widths)
    if value is None:
        special = re.fullmatch("(image|video|audio)_token_(id|index)", name)
        return dict(TOKENS)[special[1]] if special else OPEN_SIZES.get(name)
    if isinstance(value, dict):
        return _small_rope(value) if "rope" in name else None
    if isinstance(value, float) and value > 0:
        return next((new for pattern, new in FLOAT_VALUES if re.fullmatch(pattern, name)), None)
    if isinstance(value, list | tuple):
        return _small_list(name, list(value))
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if re.search("token_(id|index)$", name):
        return value if value < VOCABULARY - 10 else next(new for word, new in TOKENS if re.search(word, name))
    limit = _limit(name)
    if limit is None:  # an unknown size that repeats a known width
        return 32 if value in widths and value > 32 else None
    return min(value, limit)


def _small_kwargs(config: PretrainedConfig, widths: set[int]) -> dict[str, Any]:
    """Keyword arguments that make a tiny config of *config*'s class.

    *widths* are the hidden sizes of the configs around it.
    """
    widths = widths | {size for name in ("hidden_size", "d_model") if isinstance(size := getattr(config, name, 0), int)}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kwargs = {name: small for name, value in values.items() if (small := _small_value(name, value, widths)) is not None}
    count, kept = values.get("num_hidden_layers"), _kept_layers(config)
    if isinstance(count, int) and count > len(kept):
        kwargs["num_hidden_layers"] = len(kept)
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) == count:
                kwargs[name] = [(kwargs.get(name) or value)[index] for index in kept]
    heads = [values.get("num_attention_heads"), values.get("num_key_value_heads")]
    if heads[0] == heads[1] and isinstance(heads[0], int):
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    if "vocab_size" in kwargs and getattr(config, "pad_token_id", None) is None:
        kwargs["pad_token_id"] = 0
    return {**kwargs, "model_type": config.model_type}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """*base* with the values of *over* in it, those of nested dicts one by one."""
    both = {name: _merged(base[name], over[name]) for name in base.keys() & over.keys() if isinstance(base[name], dict)}
    return {**base, **over, **both}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The default config of *model_type* made tiny; *overrides* are config attributes that go before it."""
    kwargs = _small_kwargs(AutoConfig.for_model(model_type), set())
    del kwargs["model_type"]
    return AutoConfig.for_model(
        model_type, **{**_merged(kwargs, copy.deepcopy(OVERRIDES.get(model_type, {}))), **overrides}
    )


def tiny_model(model_type: str, auto_class: Any = transformers.AutoModel, **overrides: Any) -> PreTrainedModel:
    """A tiny float32 model with seeded random weights in eval mode; *overrides* are config attributes."""
    config = tiny_config(model_type, **overrides)
    classes = auto_class._model_mapping[type(config)]
    if isinstance(classes, tuple):  # the auto class then picks by name
        config.architectures = [classes[0].__name__]
    with on_meta():
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_type} is not tiny: {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.float32)
        _settle_batch_norms(model)
    return model.eval()


@torch.no_grad()
def _settle_batch_norms(model: PreTrainedModel) -> None:
    """Take the running statistics of batch norms from one batch: with those of a new model, eval output vanishes."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the cumulative average
    model.train()(**tiny_inputs(model, batch_size=8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def tiny_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Seeded inputs for ``model(**inputs)``: every known input that the forward method names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = example_inputs(model, batch_size)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes no input known here (it wants {model.main_input_name})")
    return inputs


def output_tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, the caches left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name != "past_key_values":
                yield from output_tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from output_tensors(value)


def _weighted(tensor: Tensor) -> Tensor:
    """*tensor* times uneven weights in [0.5, 1.5): a plain mean of squares is constant behind a layer norm."""
    steps = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float64) * 0.6180339887
    return tensor * (0.5 + steps.frac()).to(tensor.dtype).view_as(tensor)


def forward_loss(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """A differentiable scalar: the mean of (weighted) squares of each floating output that requires grad, summed."""
    tensors = [t for t in output_tensors(model(**inputs)) if t.is_floating_point() and t.requires_grad]
    return torch.stack([_weighted(tensor).square().mean() for tensor in tensors]).sum()
