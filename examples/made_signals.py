"""Videos and sounds that are made, not recorded: what is in them has to be told from how they change.

The same arguments give the same data. No frame tells which way a shape moves, and no moment whether a tone rises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RATE = 16_000  # samples a second
STRAIGHT = ("right", "left", "down", "up")
SLANTED = ("right and down", "right and up", "left and down", "left and up")
CONTOURS = ("steady", "rising", "falling", "wavering")
_WAYS = {
    **{"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)},
    **{"right and down": (1, 1), "right and up": (-1, 1), "left and down": (1, -1), "left and up": (-1, -1)},
}


def moving_shapes(
    count: int, frames: int, size: int, seed: int, motions: Sequence[str] = STRAIGHT
) -> tuple[Tensor, Tensor]:
    """Returns videos of one disk or square each, that moves over half the picture and comes in again where it leaves.

    Returns:
        Videos of shape (count, frames, 3, size, size), about 0 to 1, and the index in `motions` of each.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(motions), (count,), generator=draw)
    way = torch.tensor([_WAYS[name] for name in motions])[labels]
    speed = size / 2 / frames * (0.75 + 0.5 * torch.rand(count, 1, 1, generator=draw))
    start = size * torch.rand(count, 1, 2, generator=draw)
    centre = start + speed * torch.arange(frames)[None, :, None] * way[:, None]
    radius = size * (0.12 + 0.08 * torch.rand(count, 1, 1, 1, generator=draw))
    is_disk = torch.rand(count, 1, 1, 1, generator=draw) < 0.5
    colour = 0.4 + 0.6 * torch.rand(count, 1, 3, 1, 1, generator=draw)

    away = (torch.arange(size) - centre[..., None] + size / 2) % size - size / 2  # (count, frames, axis, size)
    down, right = away[:, :, 0, :, None], away[:, :, 1, None, :]
    distance = torch.where(is_disk, torch.hypot(down, right), torch.maximum(down.abs(), right.abs()))
    shape = (radius - distance + 0.5).clamp(0, 1)  # soft edges, so that less than a pixel is seen too
    noise = 0.05 * torch.randn(count, frames, 3, size, size, generator=draw)
    return shape[:, :, None] * colour + noise, labels


def tones(count: int, seed: int, seconds: float = 0.5, contours: Sequence[str] = CONTOURS) -> tuple[Tensor, Tensor]:
    """Returns tones of a voice-like pitch with two overtones, in some noise.

    Returns:
        Waveforms of shape (count, samples) at 16 kHz, and the index in `contours` of each.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(contours), (count,), generator=draw)
    time = torch.linspace(-1, 1, int(seconds * RATE))
    shapes = {"steady": 0 * time, "rising": time, "falling": -time, "wavering": torch.cos(3 * torch.pi * time)}
    contour = torch.stack([shapes[name] for name in contours])[labels]
    pitch = 200 * 2 ** torch.rand(count, 1, generator=draw)
    octaves = 0.2 + 0.2 * torch.rand(count, 1, generator=draw)
    phase = 2 * torch.pi * torch.cumsum(pitch * 2 ** (octaves * contour) / RATE, dim=1)
    volume = 0.1 + 0.2 * torch.rand(count, 1, generator=draw)
    sound = torch.sin(phase) + 0.5 * torch.sin(2 * phase) + 0.25 * torch.sin(3 * phase)
    return volume * (sound + 0.1 * torch.randn(sound.shape, generator=draw)), labels


def log_mel(waves: Tensor, bins: int = 80, seconds: int = 1) -> Tensor:
    """Returns what Whisper takes: log-mel spectrograms of shape (count, bins, 100 * seconds), padded with silence."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=bins, sampling_rate=RATE, chunk_length=seconds)
    return extractor([wave.numpy() for wave in waves], sampling_rate=RATE, return_tensors="pt").input_features
