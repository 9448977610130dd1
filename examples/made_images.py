"""Images that need no download, for the examples and the benchmarks: written digits, and coloured shapes with boxes.

Rows are dicts as transformers' models take them, so that a `Trainer` collates them as they are.
"""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

SHAPES = ("rectangle", "circle", "triangle")


def digits(classes: Sequence[int], size: int = 32, test_share: float = 0.25, seed: int = 0) -> tuple[list, list]:
    """Returns training and test rows of scikit-learn's handwritten digits, those of `classes` alone.

    Each row has `pixel_values`, 3 x `size` x `size` from -1 to 1, and `labels`, the place of its digit in `classes`.
    There are about 180 images of a digit.
    """
    data = load_digits()
    chosen = [index for index, digit in enumerate(data.target) if digit in set(classes)]
    images = torch.tensor(data.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    labels = [list(classes).index(digit) for digit in data.target[chosen]]
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    tests = round(len(rows) * test_share)
    return [rows[index] for index in order[tests:]], [rows[index] for index in order[:tests]]


def shapes(count: int, seed: int = 0, size: int = 64, most: int = 3) -> list:
    """Returns `count` rows with one to `most` coloured shapes on a noisy ground; no two boxes of an image overlap.

    Each row has `pixel_values`, 3 x `size` x `size` from -1 to 1, and `labels` as DETR takes them: a dict of
    `class_labels`, indices into `SHAPES`, and `boxes`, centre x, centre y, width and height as shares of the image.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_draw(size, int(torch.randint(1, most + 1, (), generator=generator)), generator) for _ in range(count)]


def _draw(size: int, wanted: int, generator: torch.Generator) -> dict:
    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    image = between(-0.5, 0.5) + 0.15 * torch.randn(3, size, size, generator=generator)
    corners: list[tuple[int, int, int, int]] = []
    kinds = []
    for _ in range(20):  # a place that is taken is drawn anew, and given up where the image is full
        width, height = (round(size * between(0.2, 0.4)) for _ in range(2))
        left, top = round(between(0, size - width)), round(between(0, size - height))
        box = (left, top, left + width, top + height)
        if len(corners) == wanted or any(_overlap(box, other) for other in corners):
            continue
        kind = int(torch.randint(len(SHAPES), (), generator=generator))
        colour = torch.rand(3, 1, generator=generator).round() * 1.6 - 0.8 + 0.2 * torch.rand(3, 1, generator=generator)
        image[:, top : top + height, left : left + width][:, _mask(SHAPES[kind], height, width)] = colour
        corners.append(box)
        kinds.append(kind)
    sides = torch.tensor(corners, dtype=torch.float32) / size
    boxes = torch.cat([(sides[:, :2] + sides[:, 2:]) / 2, sides[:, 2:] - sides[:, :2]], dim=1)
    return {"pixel_values": image.clamp(-1, 1), "labels": {"class_labels": torch.tensor(kinds), "boxes": boxes}}


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mask(kind: str, height: int, width: int) -> torch.Tensor:
    """Returns which pixels of a box the shape covers; each shape touches all four sides of its box."""
    y = (torch.arange(height)[:, None] + 0.5) / height
    x = (torch.arange(width)[None] + 0.5) / width
    if kind == "circle":
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    if kind == "triangle":
        return (x - 0.5).abs() <= y / 2
    return torch.ones(height, width, dtype=torch.bool)
