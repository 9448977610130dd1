"""The vision examples, run small: what is frozen saves operations, stands still, and is served by the cache."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from example_scripts import load
from torch import nn
from transformers import ResNetConfig, ResNetModel

# The examples import each other's parts by name, which `load` makes possible.
images, parts = load("made_images"), load("vision_parts")


def by_way(rows: list) -> dict:
    return {row.way: row for row in rows}


def printed(shown: str) -> list[list[str]]:
    """Returns the cells of the table that an example prints, without its head."""
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_digits_are_split_by_class_and_no_image_is_in_both_parts():
    train, test = images.digits(range(5, 10), size=16)

    assert {row["labels"] for row in train} == {row["labels"] for row in test} == set(range(5))
    assert train[0]["pixel_values"].shape == (3, 16, 16)
    seen = {row["pixel_values"].numpy().tobytes() for row in train}
    assert not seen & {row["pixel_values"].numpy().tobytes() for row in test}
    assert torch.equal(images.digits(range(5, 10), size=16)[0][3]["pixel_values"], train[3]["pixel_values"])


def test_shapes_fill_their_boxes_and_do_not_overlap():
    rows = images.shapes(40, seed=3, size=64)
    again = images.shapes(40, seed=3, size=64)

    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rows, again, strict=True))
    assert {len(row["labels"]["boxes"]) for row in rows} == {1, 2, 3}
    for row in rows:
        centre, extent = row["labels"]["boxes"].split(2, dim=1)
        low, high = (64 * (centre - extent / 2)).round().long(), (64 * (centre + extent / 2)).round().long()
        assert low.min() >= 0 and high.max() <= 64
        covered = torch.zeros(64, 64, dtype=torch.long)
        for (left, top), (right, bottom) in zip(low.tolist(), high.tolist(), strict=True):
            covered[top:bottom, left:right] += 1
            middle = row["pixel_values"][:, (top + bottom) // 2, (left + right) // 2]
            bottom_row = row["pixel_values"][:, bottom - 2, (left + right) // 2]
            assert torch.equal(middle, bottom_row)  # one colour from the middle to the lower side: no noise inside
        assert covered.max() == 1


@pytest.mark.slow
def test_image_classification_keeps_batch_norm_still_where_it_is_frozen(tmp_path, capsys):
    small = ["--limit", "320", "--epochs", "3", "--pretrain-epochs", "2", "--output", str(tmp_path)]
    example = load("image_classification")

    example.main(small)

    rows = printed(capsys.readouterr().out)
    assert [row[0] for row in rows[:-1]] == list(example.WAYS)
    everything, by_hand, frozen, cached, staged = rows[:-1]
    assert float(by_hand[-1]) > 0 and float(frozen[-1]) == float(cached[-1]) == 0  # how far statistics have moved
    assert everything[1] == staged[1] == "100.0%" and by_hand[1] == frozen[1] == cached[1] != "100.0%"
    assert cached[4] == frozen[4]  # the same accuracy
    assert float(frozen[4]) > 0.5  # of five classes


class Stages(nn.Module):
    """torchvision's way: a stem, `layer1` to `layer4`, and `fc`; scores come out alone."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        for stage in range(1, 5):
            blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.bn1(self.conv1(images))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
        return self.fc(hidden.mean((2, 3)))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_model_of_timm_or_torchvision_gets_a_head_for_the_new_classes(library, monkeypatch):
    own = SimpleNamespace(
        create_model=lambda name, pretrained, num_classes: Stages(num_classes),
        get_model=lambda name, weights: Stages(),
    )
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, library, own)
        patched.setitem(sys.modules, f"{library}.models", own)
        model = parts.load_classifier(f"{library}:any", 5)

    found = model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    assert found["logits"].shape == (2, 5) and found["loss"].shape == ()


@pytest.mark.slow
def test_image_classification_takes_models_of_the_form_of_timm_and_torchvision(tmp_path, monkeypatch, recwarn):
    example = load("image_classification")
    monkeypatch.setattr(example, "load_classifier", lambda name, classes: parts.Plain(Stages(classes)))
    small = ["--model", "timm:any", "--limit", "160", "--epochs", "2", "--output", str(tmp_path)]

    rows = by_way(example.compare(example.parse_args(small)))

    stages = example.stages_of(parts.Plain(Stages()))
    assert stages == [[f"layers[{2 * at}]", f"layers[{2 * at + 1}]"] for at in range(4)]
    assert rows["all but the last stage frozen, by hand"].drift > 0
    assert rows["all but the last stage frozen"].drift == rows["the same, cached"].drift == 0
    assert rows["unfrozen stage by stage"].share == 1
    assert not [warning for warning in recwarn if "prefix cache" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_layers_of_a_real_resnet_of_timm_or_torchvision_fall_into_four_stages(library):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "timm":
        model = module.create_model("resnet18", pretrained=False)
    else:
        model = module.models.get_model("resnet18", weights=None)

    stages = load("image_classification").stages_of(parts.Plain(model))

    assert [len(stage) for stage in stages] == [2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_adapters_in_the_top_layers_leave_the_rest_to_the_cache(architecture, tmp_path, recwarn):
    example = load("image_adapters")
    small = ["--limit", "320", "--epochs", "4", "--pretrain-epochs", "6", "--batch-size", "16"]

    everything, every, top, cached = example.compare(
        example.parse_args([*small, "--architecture", architecture, "--output", str(tmp_path)])
    )

    assert everything.trainable > every.trainable > top.trainable == cached.trainable
    assert not [w for w in recwarn if "prefix cache" in str(w.message)]
    assert cached.hits == 0.75  # all but the first of four epochs
    assert abs(cached.accuracy - top.accuracy) <= 1 / 225  # rounding may turn one image
    assert top.accuracy > 0.3  # of five classes


@pytest.mark.slow
def test_a_tower_of_clip_that_is_frozen_is_certified_and_the_other_learns(tmp_path):
    example = load("clip_one_tower")
    small = [
        "--limit",
        "320",
        "--epochs",
        "6",
        "--pretrain-epochs",
        "8",
        "--batch-size",
        "16",
        "--output",
        str(tmp_path),
    ]

    rows = by_way(example.compare(example.parse_args(small)))

    locked, cached, reverse = (rows[f"{way} frozen"] for way in ("vision tower", "vision tower", "text tower"))
    assert locked.after > locked.before + 0.1
    assert "kept" in locked.proof and "kept" in reverse.proof
    assert locked.proof == rows["vision tower frozen, cached"].proof != reverse.proof
    assert rows["both towers train"].trainable > locked.trainable == cached.trainable


@pytest.mark.slow
@pytest.mark.parametrize("head", ["convolutional", "detr"])
def test_a_frozen_backbone_saves_operations_and_a_cached_one_more(head, tmp_path):
    example = load("detection")
    small = ["--limit", "64", "--epochs", "2", "--pretrain-epochs", "1", "--output", str(tmp_path), "--head", head]

    everything, frozen, cached = example.compare(example.parse_args(small))

    assert everything.share == 1 > frozen.share == cached.share
    assert everything.flops > frozen.flops > cached.flops
    assert 0 <= frozen.precision <= frozen.precision_at_half <= 1


def test_the_detr_of_transformers_comes_with_a_backbone_that_does_not_train():
    """The trap that `unfreeze(model, "all")` in the example is for; where it is gone, so may the line be."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = load("made_detectors").detr(ResNetModel(config), classes=3)

    assert not any(parameter.requires_grad for parameter in model.model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.model.encoder.parameters())


class Told(nn.Module):
    """A detector that has been told the answer; with `off`, its boxes are moved by so much."""

    def __init__(self, rows: list, off: float = 0.0) -> None:
        super().__init__()
        self.rows, self.off, self.weight = list(rows), off, nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        logits, boxes = torch.zeros(len(pixel_values), 3, 4), torch.full((len(pixel_values), 3, 4), 0.01)
        logits[..., -1] = 9  # no object
        for at, image in enumerate(pixel_values):
            labels = next(row["labels"] for row in self.rows if torch.equal(row["pixel_values"], image))
            for place, (kind, box) in enumerate(zip(labels["class_labels"], labels["boxes"], strict=True)):
                logits[at, place] = 9 * nn.functional.one_hot(kind, 4)
                boxes[at, place] = box + torch.tensor([self.off, 0, 0, 0])
        return {"logits": logits, "pred_boxes": boxes}


def test_average_precision_is_one_for_the_truth_and_falls_where_boxes_are_off():
    average_precision, rows = load("made_detectors").average_precision, images.shapes(40)

    assert average_precision(Told(rows), rows, 64) == pytest.approx((1, 1))
    close, at_half = average_precision(Told(rows, off=0.04), rows, 64)
    assert 0 < close < 0.8 and at_half == pytest.approx(1)
    assert average_precision(Told(rows, off=0.5), rows, 64)[1] < 0.1


class Maps(nn.Module):
    """A backbone whose feature map is broader than high, so that rows taken for columns show."""

    config = SimpleNamespace(hidden_sizes=[8])

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        draw = torch.Generator().manual_seed(0)
        return SimpleNamespace(last_hidden_state=torch.randn(len(images), 8, 4, 6, generator=draw))


def test_the_convolutional_head_learns_boxes_at_the_cells_of_their_centres():
    torch.manual_seed(0)
    detector = load("made_detectors").Convolutional(Maps(), classes=3)
    boxes = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.3, 0.8, 0.4, 0.2]])  # in column 5 of row 0, in column 1 of row 3
    labels = [{"class_labels": torch.tensor([2, 0]), "boxes": boxes}]
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        detector(torch.zeros(1, 3, 8, 8), labels)["loss"].backward()
        optimizer.step()

    found = detector(torch.zeros(1, 3, 8, 8))

    kinds = found["logits"].argmax(-1)[0]
    assert (kinds != 3).nonzero().flatten().tolist() == [5, 3 * 6 + 1]
    assert kinds[[5, 19]].tolist() == [2, 0]
    torch.testing.assert_close(found["pred_boxes"][0, [5, 19]], boxes, atol=0.02, rtol=0)
