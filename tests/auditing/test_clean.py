"""No false alarm: sound models of many architectures, behind a backward, give no finding."""

from __future__ import annotations

import pytest
import torch

from hf_freeze import audit, freeze, layer_map
from tests.tiny import ARCHITECTURES, forward_loss, tiny_inputs, tiny_model

# What these do not use without a second segment of text, an image beside the text, or global attention.
UNUSED = {"xlnet": "seg_embed", "blip": "crossattention", "longformer": "_global"}


def audited(model_type: str):
    """The report on a tiny model with its lowest layers frozen, behind the backward of its second step."""
    model = tiny_model(model_type).train()
    freeze(model, "embeddings, layers[:1]" if layer_map(model).find("embeddings") else "layers[:1]")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        forward_loss(model, tiny_inputs(model, batch_size=4)).backward()  # BatchNorm of two rows is all noise
        report = audit(model, optimizer)
        optimizer.step()
    return report


@pytest.mark.parametrize("model_type", [model_type for model_type in ARCHITECTURES if model_type not in UNUSED])
def test_a_sound_model_gives_no_finding(model_type):
    assert audited(model_type).findings == ()


@pytest.mark.parametrize(("model_type", "part"), UNUSED.items())
def test_what_a_sound_model_does_not_use_is_a_note(model_type, part):
    report = audited(model_type)

    assert report.codes == ("HF003",) and report.ok
    assert any(part in name for name in report.findings[0].names)
