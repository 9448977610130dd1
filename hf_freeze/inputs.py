"""Small inputs that a model takes, made from its forward method and its config.

What lives here: one maker for each kind of input that transformers' models name. Used where a model has to be watched
for one pass: to find where its layers add to their hidden states, or what a step takes. How data passes through:

    names in forward + sizes in the config -> a tensor for each name -> placeholder tokens for images and sounds
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE = 16
FRAMES = 64
SAMPLES = 6000
IDS = 100
GRID = 4  # patches along each side of an image that is given as patches
BY_TOKEN = ("input_ids", "decoder_input_ids", "bbox")
KINDS = ("image", "video", "audio")  # what takes the place of tokens; `mm_token_type_ids` counts them from 1
AUDIO = "audio_config audio_encoder_config encoder_config speech_encoder_config"

Maker = Callable[[Any, int, Collection[str]], Tensor]


def example_inputs(model: nn.Module, batch_size: int = 1, length: int = SEQUENCE) -> dict[str, Tensor]:
    """Returns inputs for ``model(**inputs)``: every input that its forward method names and that is known here.

    A model that puts features of images or sounds in the place of tokens gets as many such tokens as there are
    features; its own method is asked for them, without gradients and in eval mode.

    Args:
        model: A model with a ``config``, on any device.
        batch_size: Rows of each input.
        length: Tokens of a row.

    Returns:
        Token ids of shape (batch, length), images of shape (batch, channels, height, width), and so on, drawn from
        torch's random numbers; none where nothing is known.
    """
    names = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    known = [name for name in _MAKERS if config is not None and name in names and not _is_surplus(name, names, config)]
    inputs = {name: _MAKERS[name](config, batch_size, names) for name in known}
    if length != SEQUENCE:
        inputs |= {name: _of_length(inputs[name], length) for name in BY_TOKEN if name in inputs}
    if "input_ids" in inputs and "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: torch.stack([tensor, tensor.flip(1)], dim=1) for name, tensor in inputs.items()}
    like = next(model.parameters())
    inputs = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() and like.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    for kind in KINDS:
        _add_placeholders(model, kind, inputs)
    return inputs


def _of_length(tokens: Tensor, length: int) -> Tensor:
    """Returns what holds something for each token, over and over, with what stands last where it stood."""
    order = torch.arange(length) % (SEQUENCE - 1)
    order[-1] = SEQUENCE - 1
    return tokens[:, order]


def _is_surplus(name: str, names: Collection[str], config: Any) -> bool:
    """Tells an input that another one stands for, or for which the model has no tower."""
    tower = "vision_config" if name.startswith("pixel_values") else "audio_config"
    return (
        (name == "inputs" and len(_MAKERS.keys() & names) > 1)
        or (name in ("pixel_values_videos", "video_grid_thw") and "pixel_values" in names)
        or (name == "hidden_states" and "grid_thw" not in names)
        or (name == "pixel_attention_mask" and "spatial_shapes" not in names)
        or (name.startswith(("pixel_values", "input_features")) and getattr(config, tower, config) is None)
    )


def _add_placeholders(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> None:
    """Puts in front of the token ids as many of the special token for `kind` as the model has features for it."""
    tokens = [getattr(model.config, f"{kind}_token_{end}", None) for end in ("id", "index")]
    token = next((token for token in tokens if isinstance(token, int)), None)
    extract = getattr(model, f"get_{kind}_features", None)
    if extract is None or token is None or "input_ids" not in inputs:
        return
    wanted = inspect.signature(extract).parameters
    given = {name: tensor for name, tensor in inputs.items() if name in wanted and name != "input_ids"}
    needed = {name for name, parameter in wanted.items() if parameter.default is parameter.empty and parameter.kind < 2}
    if needed - given.keys():  # something that is not known here: text alone has to do
        for name in given:
            del inputs[name]
    elif given:
        ids = inputs["input_ids"]
        before = ids.new_full((len(ids), _count_features(model, extract, given) // len(ids)), token)
        _put_in_front(before, kind, inspect.signature(model.forward).parameters, inputs)


@torch.no_grad()
def _count_features(model: nn.Module, extract: Callable[..., Any], given: dict[str, Tensor]) -> int:
    """Returns how many vectors `extract`, a method of `model`, makes of all that is `given`."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        features = extract(**given)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return sum(part[..., 0].numel() for part in _tensors(getattr(features, "pooler_output", features)))


def _put_in_front(before: Tensor, kind: str, names: Collection[str], inputs: dict[str, Tensor]) -> None:
    """Puts the tokens `before` in front of the token ids, and in the inputs that tell of each token what it is."""
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([before, ids], dim=1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in names:
        kinds = inputs.get("mm_token_type_ids", torch.zeros_like(ids))
        inputs["mm_token_type_ids"] = torch.cat([torch.full_like(before, 1 + KINDS.index(kind)), kinds], dim=1)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _parts(config: Any) -> Iterator[Any]:
    """Yields the config, its sub-configs, and theirs."""
    yield config
    subs = [sub for sub in vars(config).values() if hasattr(sub, "model_type")]
    yield from subs
    for sub in subs:
        yield from (inner for inner in vars(sub).values() if hasattr(inner, "model_type"))


def _part(config: Any, names: str) -> Any:
    """Returns the first sub-config that is called by one of `names`, else the config itself."""
    found = (getattr(part, name, None) for name in names.split() for part in _parts(config))
    return next((part for part in found if hasattr(part, "model_type")), config)


def _size(config: Any, names: str, default: int) -> int:
    """Returns the first of the attributes `names` that the config, or one of its sub-configs, has as an integer."""
    for part in _parts(config):
        for name in names.split():
            if isinstance(value := getattr(part, name, None), int):
                return value
    return default


def _token_ids(config: Any, batch: int, names: Collection[str]) -> Tensor:
    """Returns token ids clear of the special ones, but for the end-of-sequence token last."""
    vocabulary = _size(config, "vocab_size", IDS)
    known = min(IDS, vocabulary)
    ids = torch.randint(min(10, known // 2), max(known - 10, known // 2 + 1), (batch, SEQUENCE))
    ids[:, -1] = min(_size(config, "eos_token_id", 10), vocabulary - 1)
    return ids


def _boxes(config: Any, batch: int, names: Collection[str]) -> Tensor:
    """Returns boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1."""
    corners = torch.randint(0, _size(config, "max_2d_position_embeddings", 128), (2, batch, SEQUENCE, 2))
    return torch.cat([corners.amin(0), corners.amax(0)], dim=-1)


def _vision(config: Any) -> Any:
    return _part(config, "vision_config vision_encoder_config image_config")


def _image_size(config: Any) -> tuple[int, int]:
    found = (getattr(part, name, None) for part in (_vision(config), config) for name in ("image_size", "crop_size"))
    size = next((size for size in found if size), FRAMES)
    return (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)


def _pixels(config: Any, batch: int, names: Collection[str]) -> Tensor:
    """Returns images, clips of frames for a config that has a number of frames, or patches for a model that asks so."""
    vision = _vision(config)
    channels = _size(vision, "num_channels in_channels in_chans", 3)
    if "grid_thw" in names or "image_grid_thw" in names:
        size = channels * _size(vision, "temporal_patch_size", 1) * _size(vision, "patch_size", 14) ** 2
        return torch.randn(batch * GRID**2, size)
    if "spatial_shapes" in names:
        return torch.randn(batch, GRID**2, channels * _size(vision, "patch_size", 16) ** 2)
    frames = _size(vision, "num_frames frames_per_clip", 0)
    many = (frames,) if frames else (1,) if "pixel_attention_mask" in names else ()
    return torch.randn(batch, *many, channels, *_image_size(config))


def _grid(config: Any, batch: int, names: Collection[str]) -> Tensor:
    return torch.tensor([[1, GRID, GRID]] * batch)


def _waves(config: Any, batch: int, names: Collection[str]) -> Tensor:
    """Returns sound: a spectrogram for a config that has mel bins, one channel for a codec, else raw samples."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(batch, _size(config, "max_length", FRAMES), config.num_mel_bins)
    return torch.randn(batch, SAMPLES) if "attention_mask" in names else torch.randn(batch, 1, SAMPLES)


def _features(config: Any, batch: int, names: Collection[str]) -> Tensor:
    """Returns log-mel features: (batch, bins, time) as Whisper takes them, or (batch, time, bins).

    Whisper has a fixed length of sound: its positions, which two convolutions halve. A model that subsamples takes time
    first, as does one whose config does not speak of mel bins.
    """
    audio = _part(config, AUDIO)
    bins = _size(audio, "num_mel_bins", 0)
    if bins and not any(name.startswith("subsampl") for part in _parts(audio) for name in vars(part)):
        return torch.randn(batch, bins, 2 * _size(audio, "max_source_positions", FRAMES))
    other = "input_feat_per_channel feature_projection_input_dim input_feat_size input_dim hidden_size"
    return torch.randn(batch, FRAMES, bins or _size(audio, other, 16))


def _feature_mask(config: Any, batch: int, names: Collection[str]) -> Tensor:
    features = _features(config, batch, names)
    audio = _part(config, AUDIO)
    return torch.ones(batch, features.shape[1 if features.shape[-1] == _size(audio, "num_mel_bins", -1) else -1]).long()


def _series(config: Any, batch: int, names: Collection[str]) -> Tensor:
    channels = (config.num_input_channels,) if hasattr(config, "num_input_channels") else ()
    return torch.randn(batch, _size(config, "context_length", SEQUENCE), *channels)


_MAKERS: dict[str, Maker] = {
    "input_ids": _token_ids,
    "decoder_input_ids": _token_ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "hidden_states": _pixels,  # of a vision tower that is given patches
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "video_grid_thw": _grid,
    "spatial_shapes": lambda config, batch, names: torch.tensor([[GRID, GRID]] * batch),
    "pixel_attention_mask": lambda config, batch, names: torch.ones(batch, GRID**2).long(),
    "image_sizes": lambda config, batch, names: torch.tensor([_image_size(config)] * batch),
    "input_values": _waves,
    "input_features": _features,
    "input_features_mask": _feature_mask,
    "feature_attention_mask": _feature_mask,
    "inputs": lambda config, batch, names: torch.randn(batch, SEQUENCE, _size(config, "d_model", 32)),
    "past_values": _series,
    "noise": lambda config, batch, names: torch.rand(batch, (config.image_size // config.patch_size) ** 2),
}
