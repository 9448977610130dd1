"""Tiny randomly initialised transformers models of any type, with the inputs they need.

A config is made small by attribute name: every known size attribute that is larger than its tiny value takes the
tiny value, also inside sub-configs; attributes derived from those are left to the config class to derive again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

MAX_PARAMETERS = 30_000_000
SEQUENCE = 16
FRAMES = 64
SAMPLES = 6000
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

# Attribute name (whole match) -> the largest value it keeps; the first match counts.
INTEGER_LIMITS: tuple[tuple[str, int], ...] = (
    (r"vocab_size|num_hash_buckets", VOCABULARY),
    (r"attention_hidden_size|ffn_hidden_size|.*intermediate_size|d_ff|.*ffn_dim|d_inner|n_inner|hidden_dim", 64),
    (r".*hidden_size|.*embedding_size|d_model|n_embd|dim|emb(ed)?_dim|d_latents|word_embed_proj_dim", 32),
    (r".*codevector_dim|projection_(dim|size)|pooler_output_size|conv_channels|\w+_channels(?<!num_channels)", 32),
    (r"num_(key_value|kv)_heads|num_experts_per_tok", 2),
    (r".*(attention|n|num|mamba)_heads?|num_query_groups|num_(local_)?experts", 4),
    (r"(v_)?head_dim|d_kv|d_head|kv_channels|key_dim|groups_width|rotary_dim", 8),
    (r"n_layers?|(encoder|decoder)_layers|(decoder_)?num_(hidden_|encoder_|decoder_)?layers", 2),
    (r"num_self_attends_per_block|mask_(time|feature)_length", 2),
    (r"image_size", IMAGE),
    (r"patch_size|sliding_window|attention_window|local_attention", 8),
    (r"window_size|num_frames|num_groups", 4),
    (r"max_(2d_)?position_embeddings|n_positions|max_(source|target)_positions|segment_means_seq_len", 128),
    (r"num_mel_bins|input_feat_per_channel|num_conv_pos_embeddings", 16),
    (r"max_length", FRAMES),
    (r"num_latents|num_detection_tokens", 8),
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

# Where the rules fall short: sizes that a model wants to fit together, or that its code takes for granted.
STRONGER = {"initializer_range": 0.5}  # for models that draw batch norm weights from it too
OVERRIDES: dict[str, dict[str, Any]] = {
    "cvt": {"depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "efficientnet": {
        **STRONGER,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "image_size": 64,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "levit": {"image_size": 64, "patch_size": 16},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {**STRONGER, "image_size": 64},
    "segformer": {"image_size": 64},
    "swin": {"image_size": 64, "window_size": 2},
    "swinv2": {"image_size": 64, "window_size": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


@contextmanager
def on_meta() -> Iterator[None]:
    """Models built inside have shapes and ties but no numbers, so that one of any size takes milliseconds."""
    with torch.device("meta"):
        yield


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


def _small_value(name: str, value: Any) -> Any:
    """The tiny form of one attribute, or None to leave the attribute to the config class."""
    if isinstance(value, PretrainedConfig):
        return _small_kwargs(value)
    if isinstance(value, float) and value > 0:
        return next((new for pattern, new in FLOAT_VALUES if re.fullmatch(pattern, name)), None)
    if isinstance(value, list | tuple):
        return _small_list(name, list(value))
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if name.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    limit = _limit(name)
    return None if limit is None else min(value, limit)


def _small_kwargs(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments that make a tiny config of *config*'s class."""
    small = {name: _small_value(name, value) for name, value in vars(config).items() if not name.startswith("_")}
    kwargs = {name: value for name, value in small.items() if value is not None}
    if "vocab_size" in kwargs and getattr(config, "pad_token_id", None) is None:
        kwargs["pad_token_id"] = 0
    return kwargs


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The default config of *model_type* made tiny; *overrides* are config attributes that go before it."""
    kwargs = _small_kwargs(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**kwargs, **OVERRIDES.get(model_type, {}), **overrides})


def tiny_model(model_type: str, auto_class: Any = transformers.AutoModel, **overrides: Any) -> PreTrainedModel:
    """A tiny float32 model with seeded random weights in eval mode; *overrides* are config attributes."""
    config = tiny_config(model_type, **overrides)
    classes = auto_class._model_mapping[type(config)]
    if isinstance(classes, tuple):  # the auto class then picks by name
        config.architectures = [classes[0].__name__]
    with torch.device("meta"):
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


def _size(config: PretrainedConfig, names: str, default: int) -> int:
    """The first of the attributes *names* the config or its sub-configs have as an integer."""
    subs = [sub for sub in vars(config).values() if isinstance(sub, PretrainedConfig)]
    for holder in (config, *subs):
        for name in names.split():
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return default


def _token_ids(config: PretrainedConfig, batch: int) -> Tensor:
    """Random token ids clear of the special ones, but for the end-of-sequence token last."""
    ids = torch.randint(10, min(VOCABULARY, _size(config, "vocab_size", VOCABULARY)) - 10, (batch, SEQUENCE))
    ids[:, -1] = _size(config, "eos_token_id", 10)
    return ids


def _boxes(config: PretrainedConfig, batch: int) -> Tensor:
    """Random boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1."""
    corners = torch.randint(0, _size(config, "max_2d_position_embeddings", 128), (2, batch, SEQUENCE, 2))
    return torch.cat([corners.amin(0), corners.amax(0)], dim=-1)


def _pixels(config: PretrainedConfig, batch: int) -> Tensor:
    """Random images, or clips of frames for a config that has a number of frames."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 2 * IMAGE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    return torch.randn(batch, *frames, _size(vision, "num_channels", 3), height, width)


def _waves(config: PretrainedConfig, batch: int) -> Tensor:
    """Random sound: raw samples, or a spectrogram for a config that has mel bins."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(batch, _size(config, "max_length", FRAMES), config.num_mel_bins)
    return torch.randn(batch, SAMPLES)


def _features(config: PretrainedConfig, batch: int) -> Tensor:
    """Random log-mel features: bins first for a config that has mel bins, else time first."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(batch, config.num_mel_bins, 2 * _size(config, "max_source_positions", FRAMES))
    return torch.randn(batch, FRAMES, _size(config, "input_feat_per_channel hidden_size", 16))


def _patch_noise(config: PretrainedConfig, batch: int) -> Tensor:
    """The noise a masked autoencoder orders its patches by, which otherwise it draws itself."""
    return torch.rand(batch, (config.image_size // config.patch_size) ** 2)


INPUTS: dict[str, Callable[[PretrainedConfig, int], Tensor]] = {
    "input_ids": _token_ids,
    "decoder_input_ids": _token_ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "inputs": lambda config, batch: torch.randn(batch, SEQUENCE, _size(config, "d_model", 32)),
    "past_values": lambda config, batch: torch.randn(
        batch, _size(config, "context_length", SEQUENCE), _size(config, "num_input_channels", 1)
    ),
    "noise": _patch_noise,
}


def tiny_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Seeded inputs for ``model(**inputs)``: every known input that the forward method names."""
    names = inspect.signature(model.forward).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = {name: make(model.config, batch_size) for name, make in INPUTS.items() if name in names}
    if len(inputs) > 1:
        inputs.pop("inputs", None)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes no input known here (it wants {model.main_input_name})")
    if "input_ids" in inputs and "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: torch.stack([tensor, tensor.flip(1)], dim=1) for name, tensor in inputs.items()}
    return inputs


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, the caches left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name != "past_key_values":
                yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _weighted(tensor: Tensor) -> Tensor:
    """*tensor* times uneven weights in [0.5, 1.5): a plain mean of squares is constant behind a layer norm."""
    steps = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float64) * 0.6180339887
    return tensor * (0.5 + steps.frac()).to(tensor.dtype).view_as(tensor)


def forward_loss(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """A differentiable scalar: the mean of (weighted) squares of each floating output that requires grad, summed."""
    tensors = [t for t in _tensors(model(**inputs)) if t.is_floating_point() and t.requires_grad]
    return torch.stack([_weighted(tensor).square().mean() for tensor in tensors]).sum()
