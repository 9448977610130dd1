"""Detectors on a pretrained ResNet, and how precise they are: what the detection example trains.

Both heads put out what DETR does: `logits` of each place, those of no object last, and `pred_boxes` as centre, width
and height in shares of the image.
"""

import contextlib
import io

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetModel

NO_OBJECT = 0.1  # the weight of a place without an object, of which there are many


class Convolutional(nn.Module):
    """A plain head without anchors: each cell of the last feature map tells what has its centre there, and its box."""

    def __init__(self, backbone: ResNetModel, classes: int, width: int = 64) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        self.head = nn.Sequential(
            nn.Conv2d(backbone.config.hidden_sizes[-1], width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, classes + 1 + 4, 1),
        )

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor | None]:
        found = self.head(self.backbone(pixel_values).last_hidden_state).permute(0, 2, 3, 1)
        logits, box = found.split([self.classes + 1, 4], dim=-1)
        sides = torch.tensor(found.shape[2:0:-1], device=found.device)  # columns, rows
        places = torch.cartesian_prod(*(torch.arange(int(side), device=found.device) for side in sides.flip(0))).flip(1)
        centres = (box[..., :2].sigmoid() + places.view(*found.shape[1:3], 2)) / sides
        boxes = torch.cat([centres, box[..., 2:].sigmoid()], dim=-1)
        loss = None if labels is None else self._loss(logits, boxes, labels, sides)
        return {"loss": loss, "logits": logits.flatten(1, 2), "pred_boxes": boxes.flatten(1, 2)}

    def _loss(self, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], sides: Tensor) -> Tensor:
        wanted = torch.full(logits.shape[:3], self.classes, device=logits.device)
        off = []
        for image, label in enumerate(labels):
            column, row = (label["boxes"][:, :2] * sides).long().unbind(1)
            wanted[image, row, column] = label["class_labels"]
            off.append((boxes[image, row, column] - label["boxes"]).abs().sum(-1))
        weight = torch.tensor([1.0] * self.classes + [NO_OBJECT], device=logits.device)
        return nn.functional.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight) + 5 * torch.cat(off).mean()


def detr(backbone: ResNetModel, classes: int) -> DetrForObjectDetection:
    """Returns a small DETR with the weights of `backbone`."""
    config = DetrConfig(
        backbone_config=backbone.config, num_labels=classes, num_queries=10, d_model=64, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, dropout=0.0, auxiliary_loss=True, eos_coefficient=NO_OBJECT,
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(backbone.state_dict())
    return model


@torch.no_grad()
def average_precision(model: nn.Module, rows: list, size: int) -> tuple[float, float]:
    """Returns COCO's mean average precision, and that at an overlap of a half, by pycocotools."""
    model.eval()
    device = next(model.parameters()).device
    truth, found = [], []
    for image, row in enumerate(rows):
        for kind, box in zip(row["labels"]["class_labels"].tolist(), row["labels"]["boxes"], strict=True):
            x, y, width, height = _corner(box, size)
            known = {"id": len(truth) + 1, "iscrowd": 0, "area": width * height}  # an id of 0 is never matched
            truth.append({**known, "image_id": image, "category_id": kind, "bbox": [x, y, width, height]})
    for begin in range(0, len(rows), 32):
        images = torch.stack([row["pixel_values"] for row in rows[begin : begin + 32]]).to(device)
        output = model(pixel_values=images)
        scores, kinds = output["logits"].softmax(-1)[..., :-1].max(-1)
        for at, (own, kind, boxes) in enumerate(
            zip(scores.tolist(), kinds.tolist(), output["pred_boxes"], strict=True)
        ):
            found += [
                {"image_id": begin + at, "category_id": k, "bbox": _corner(b, size), "score": s}
                for s, k, b in zip(own, kind, boxes, strict=True)
            ]
    kinds = sorted({own["category_id"] for own in truth})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "annotations": truth,
        "categories": [{"id": kind} for kind in kinds],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of each of its steps
        coco.createIndex()
        measured = COCOeval(coco, coco.loadRes(found), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return float(measured.stats[0]), float(measured.stats[1])


def _corner(box: Tensor, size: int) -> list[float]:
    """Returns left, top, width and height in pixels."""
    x, y, width, height = (box * size).tolist()
    return [x - width / 2, y - height / 2, width, height]
