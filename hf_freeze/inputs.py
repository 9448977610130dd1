"""Small inputs that a model takes, made from its forward method and its config.

What lives here: one maker for each kind of input that transformers' models name. What may not: running the model. Used
where a model has to be watched for one pass: to find where its layers add to their hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE = 16
FRAMES = 64
SAMPLES = 6000
IDS = 100


def example_inputs(model: nn.Module, batch_size: int = 1) -> dict[str, Tensor]:
    """Returns inputs for ``model(**inputs)``: every input that its forward method names and that is known here.

    Args:
        model: A model with a ``config``, on any device.
        batch_size: Rows of each input.

    Returns:
        Token ids of shape (batch, 16), images of shape (batch, channels, height, width), and so on, drawn from torch's
        random numbers; none where nothing is known.
    """
    names = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    inputs = {name: make(config, batch_size) for name, make in _MAKERS.items() if name in names and config is not None}
    if len(inputs) > 1:
        inputs.pop("inputs", None)
    if "input_ids" in inputs and "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: torch.stack([tensor, tensor.flip(1)], dim=1) for name, tensor in inputs.items()}
    like = next(model.parameters())
    return {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() and like.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _size(config: Any, names: str, default: int) -> int:
    """Returns the first of the attributes `names` that the config, or one of its sub-configs, has as an integer."""
    subs = [sub for sub in vars(config).values() if hasattr(sub, "model_type")]
    for holder in (config, *subs):
        for name in names.split():
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return default


def _token_ids(config: Any, batch: int) -> Tensor:
    """Returns token ids clear of the special ones, but for the end-of-sequence token last."""
    vocabulary = _size(config, "vocab_size", IDS)
    known = min(IDS, vocabulary)
    ids = torch.randint(min(10, known // 2), max(known - 10, known // 2 + 1), (batch, SEQUENCE))
    ids[:, -1] = min(_size(config, "eos_token_id", 10), vocabulary - 1)
    return ids


def _boxes(config: Any, batch: int) -> Tensor:
    """Returns boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1."""
    corners = torch.randint(0, _size(config, "max_2d_position_embeddings", 128), (2, batch, SEQUENCE, 2))
    return torch.cat([corners.amin(0), corners.amax(0)], dim=-1)


def _pixels(config: Any, batch: int) -> Tensor:
    """Returns images, or clips of frames for a config that has a number of frames."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", FRAMES)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    return torch.randn(batch, *frames, _size(vision, "num_channels", 3), height, width)


def _waves(config: Any, batch: int) -> Tensor:
    """Returns sound: raw samples, or a spectrogram for a config that has mel bins."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(batch, _size(config, "max_length", FRAMES), config.num_mel_bins)
    return torch.randn(batch, SAMPLES)


def _features(config: Any, batch: int) -> Tensor:
    """Returns log-mel features: bins first for a config that has mel bins, else time first."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(batch, config.num_mel_bins, 2 * _size(config, "max_source_positions", FRAMES))
    return torch.randn(batch, FRAMES, _size(config, "input_feat_per_channel hidden_size", 16))


_MAKERS: dict[str, Callable[[Any, int], Tensor]] = {
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
    "noise": lambda config, batch: torch.rand(batch, (config.image_size // config.patch_size) ** 2),
}
