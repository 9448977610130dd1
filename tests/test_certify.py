"""Certificates: what is hashed, what breaks one, and whole runs of the Trainer."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn
from training import make_trainer, tiny_bert

from hf_freeze import (
    BottleneckConfig,
    CertifyCallback,
    Stage,
    StagedUnfreezing,
    certify_frozen,
    freeze,
    freeze_until,
    select,
)
from hf_freeze.certify import Seal, frozen_tensors, hash_of
from hf_freeze.errors import CertificateError
from tests.tiny import forward_loss, tiny_inputs, tiny_model

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def bert():
    model = tiny_bert()
    freeze(model, "embeddings, layers[:2]")
    return model


def read(folder):
    return json.loads((folder / "certificate.json").read_text())


# What is hashed.


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]
)
def test_each_bit_counts(dtype):
    tensor = torch.zeros(3, 5).to(dtype)
    other = tensor.clone()
    other.view(torch.uint8).view(-1)[7] ^= 1

    assert hash_of("a", tensor) == hash_of("a", tensor.clone())
    assert hash_of("a", tensor) != hash_of("a", other)


def test_name_dtype_and_shape_count():
    tensor = torch.zeros(2, 3)
    others = [("b", tensor), ("a", tensor.view(3, 2)), ("a", tensor.int())]

    assert all(hash_of("a", tensor) != hash_of(*other) for other in others)


def test_the_hash_is_sha256_of_the_bytes_whatever_the_layout():
    tensor = torch.arange(6.0).view(2, 3)
    by_hand = hashlib.sha256(b"a torch.float32 (3, 2)" + tensor.t().contiguous().numpy().tobytes())

    assert hash_of("a", tensor.t()) == by_hand.hexdigest()


def test_a_large_tensor_is_hashed_in_parts(monkeypatch):
    tensor = torch.arange(1000.0)
    whole = hash_of("a", tensor)
    monkeypatch.setattr("hf_freeze.certify._CHUNK", 7)

    assert hash_of("a", tensor) == whole


def test_frozen_parameters_and_the_statistics_beside_them_are_certified():
    model = tiny_model("resnet")
    names = freeze(model, "embeddings, layers[:1]")

    certified = set(frozen_tensors(model))

    statistics = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] + ".weight" in names}
    assert certified == set(names) | statistics
    assert any(name.endswith("running_mean") for name in statistics)


def test_adapters_in_a_frozen_layer_are_not(bert):
    bert.add_adapter(BottleneckConfig(bottleneck_size=2))

    assert set(frozen_tensors(bert)) == {name for name, p in bert.named_parameters() if not p.requires_grad}


def test_a_tied_tensor_is_certified_once():
    model = tiny_model("t5")
    freeze(model, "embeddings")

    assert list(frozen_tensors(model)) == ["shared.weight"]


def test_what_has_no_data_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)

    with pytest.raises(CertificateError, match="'weight' has no data here to hash"):
        Seal(model.requires_grad_(False))


# In a block.


def test_a_block_in_which_nothing_frozen_changes_is_certified(bert, tmp_path):
    with certify_frozen(bert, tmp_path / "certificate.json"):
        bert.classifier.weight.data.zero_()

    found, names = read(tmp_path), select(bert, "embeddings, layers[:2]")
    assert found["verdict"] == "kept" and found["changed"] == []
    assert found["tensors"] == len(names)
    assert found["bytes"] == sum(4 * bert.get_parameter(name).numel() for name in names)
    assert found["begin"]["sha256"] == found["end"]["sha256"] and found["begin"]["step"] is None


def test_a_frozen_weight_that_changes_is_named(bert, tmp_path):
    with (
        pytest.raises(CertificateError, match=r"'bert.embeddings.LayerNorm.bias' was frozen and has changed"),
        certify_frozen(bert, tmp_path / "certificate.json"),
    ):
        bert.bert.embeddings.LayerNorm.bias.data[0] = 1e-30

    found = read(tmp_path)
    assert found["verdict"] == "broken" and found["changed"] == ["bert.embeddings.LayerNorm.bias"]
    assert found["begin"]["sha256"] != found["end"]["sha256"]


def test_statistics_that_drift_break_a_certificate():
    model = tiny_model("resnet")
    for parameter in model.embedder.parameters():  # by hand, so that BatchNorm stays live
        parameter.requires_grad_(False)

    with pytest.raises(CertificateError, match="running_mean"), certify_frozen(model):
        forward_loss(model.train(), tiny_inputs(model))
    freeze(model, "embeddings")
    with certify_frozen(model):
        forward_loss(model.train(), tiny_inputs(model))


def test_a_tensor_that_is_gone_or_in_another_dtype_has_changed(bert):
    with pytest.raises(CertificateError, match="embeddings"), certify_frozen(bert):
        bert.bert.embeddings.half()
    with pytest.raises(CertificateError, match="token_type"), certify_frozen(bert):
        del bert.bert.embeddings.token_type_embeddings


def test_an_error_in_the_block_is_the_one_that_is_seen(bert, tmp_path):
    with pytest.raises(KeyError), certify_frozen(bert, tmp_path / "certificate.json"):
        raise KeyError

    assert not (tmp_path / "certificate.json").exists()


def test_a_model_of_which_nothing_is_frozen_is_told():
    with pytest.warns(UserWarning, match="nothing to certify"), certify_frozen(tiny_bert()):
        pass


# In the Trainer.


def test_a_run_is_certified(bert, tmp_path):
    trainer = make_trainer(tmp_path, CertifyCallback(), model=bert)
    trainer.train()

    found = read(tmp_path)
    assert found["verdict"] == "kept" and "note" not in found
    assert (found["begin"]["step"], found["end"]["step"]) == (0, 6)
    assert found["tensors"] == len(select(bert, "embeddings, layers[:2]"))


def test_a_run_in_which_something_frozen_changes_fails_and_names_it(bert, tmp_path):
    class Writes(CertifyCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["model"].bert.encoder.layer[1].output.dense.bias.data += 1e-3

    with pytest.raises(CertificateError, match=r"'bert.encoder.layer.1.output.dense.bias' was frozen"):
        make_trainer(tmp_path, Writes(), model=bert).train()
    assert read(tmp_path)["verdict"] == "broken"


@pytest.mark.parametrize("first", [True, False])
def test_under_stages_what_no_stage_trains_is_certified(bert, tmp_path, first):
    stages = StagedUnfreezing([Stage(0, "head, layers[0]"), Stage("2 steps", "layers[-1]", freeze="layers[0]")])
    callbacks = [CertifyCallback(), stages] if first else [stages, CertifyCallback()]

    make_trainer(tmp_path, *callbacks, model=bert).train()

    assert read(tmp_path)["tensors"] == len(select(bert, "embeddings, layers[1], pooler"))
    assert read(tmp_path)["verdict"] == "kept"


def test_a_resumed_run_is_certified_from_where_it_goes_on(bert, tmp_path):
    make_trainer(tmp_path, model=bert, **SAVING).train()
    again = tiny_bert()
    freeze_until(again, "layers[2]")

    make_trainer(tmp_path, CertifyCallback(), model=again, **SAVING).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )

    found = read(tmp_path)
    assert (found["begin"]["step"], found["end"]["step"]) == (2, 6)
    assert found["note"] == "The run was resumed at step 2: what was before is not certified."


def test_a_second_run_has_a_certificate_of_its_own(bert, tmp_path):
    callback = CertifyCallback()
    trainer = make_trainer(tmp_path, callback, model=bert)
    trainer.train()
    first = callback.certificate
    freeze(bert, "layers")
    trainer.train()

    assert callback.certificate.tensors > first.tensors
