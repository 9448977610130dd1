"""`audit` as a whole: what it refuses, what its report says, its three symptoms, and that it leaves no trace."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_freeze import AuditReport, BottleneckConfig, Finding, audit, freeze
from hf_freeze.auditing.codes import CODES
from hf_freeze.auditing.findings import in_bytes, merged
from hf_freeze.auditing.measuring import activations_kept, as_it_was, probe, relative_gradients
from hf_freeze.errors import AuditError
from hf_freeze.layers import layer_map
from tests.notebook_tables import rows_of
from tests.tiny import tiny_inputs, tiny_model

BATCH = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "labels": torch.tensor([0, 1])}


@pytest.fixture
def bert(make_bert):
    model = make_bert(num_hidden_layers=3).train()
    freeze(model, "embeddings, layers[:2]")
    return model


def backward(model):
    model(**BATCH).loss.backward()
    return model


def state(model):
    """All that a measurement could change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# What it takes, and what it refuses.


def test_an_audit_before_a_backward_is_refused(bert):
    with pytest.raises(AuditError, match=r"behind loss.backward\(\)"):
        audit(bert)


def test_an_unknown_symptom_is_refused(bert):
    with pytest.raises(AuditError, match="Did you mean 'memory'"):
        audit(bert, symptom="memoy")


@pytest.mark.parametrize("symptom", ["memory", "accuracy"])
def test_a_symptom_that_is_measured_wants_a_batch_with_labels(bert, symptom):
    with pytest.raises(AuditError, match="Pass batch="):
        audit(bert, symptom=symptom)
    with pytest.raises(AuditError, match="Put labels into it"):
        audit(bert, symptom=symptom, batch={"input_ids": BATCH["input_ids"]})


def test_wrapped_models_are_audited_as_what_they_wrap(bert, one_process_group):
    adapted = get_peft_model(bert, BottleneckConfig(bottleneck_size=4))
    wrapped = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    backward(wrapped)

    report = audit(wrapped, optimizer)

    assert report.model_class == type(adapted).__name__
    assert report.codes == ("HF005",)  # the base was frozen before, and PEFT was not told of the head


def test_a_wrongly_scaled_loss_is_found_in_a_wrapped_model_too(bert, one_process_group):
    args = TrainingArguments("unused", gradient_accumulation_steps=4, report_to=[], use_cpu=True)
    wrapped = backward(DistributedDataParallel(bert))

    assert audit(wrapped, args=args).codes == ("HF015",)


# The report.


def test_the_worst_comes_first_and_an_error_makes_it_false():
    report = AuditReport("M", (Finding("HF003"), Finding("HF013"), Finding("HF001")))

    assert report.codes == ("HF001", "HF013", "HF003")
    assert not report.ok
    assert AuditReport("M", (Finding("HF003"), Finding("HF013"))).ok


def test_a_report_reads_alike_in_a_terminal_and_a_notebook(bert):
    report = audit(backward(bert), torch.optim.SGD(bert.classifier.parameters(), lr=0.1))

    heading, row = rows_of(report._repr_html_())

    (found,) = report.findings
    assert heading == ["code", "severity", "what", "cause and mend"]
    assert row == ["HF006", "error", f"{found.title}: layers[2], pooler", f"{found.cause} {found.mend}"]
    assert {word for cell in row for word in cell.split()} <= set(str(report).split())


def test_with_a_symptom_a_notebook_shows_the_answer_and_the_figures(bert):
    report = audit(bert, symptom="memory", batch=BATCH)

    shown = report._repr_html_()

    assert shown.startswith(f"<p>{report.answer}</p>")
    assert rows_of(shown)[0] == ["segment", "trainable", "activations kept"]
    assert [row[0] for row in rows_of(shown)[1:]] == [row.segment for row in report.figures]


def test_a_mend_is_printed_to_the_letter(make_bert):
    """Rich reads ``[k]`` in what it prints as markup."""
    model = make_bert(num_hidden_layers=3).train()
    freeze(model, "layers[:2]")
    report = audit(backward(model), symptom="memory", batch=BATCH)

    assert report.codes == ("HF021",)
    assert "'layers[k]'" in report.findings[0].mend and report.findings[0].mend in report.answer
    assert str(report).count("'layers[k]'") == report._repr_html_().count("'layers[k]'") == 2


def test_a_report_is_saved_as_json(bert, tmp_path):
    report = audit(backward(bert), torch.optim.SGD(bert.classifier.parameters(), lr=0.1))

    report.save(tmp_path / "new" / "audit.json")

    content = json.loads((tmp_path / "new" / "audit.json").read_text())
    (found,) = content["findings"]
    assert content.keys() == {"version", "step", "findings"}
    assert found["code"] == "HF006" and found["severity"] == "error" and found["names"] == ["layers[2]", "pooler"]
    assert found["title"] == CODES["HF006"].title and found["mend"] == CODES["HF006"].mend
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["audit.json"]


def test_a_code_that_there_is_not_is_refused():
    with pytest.raises(AuditError, match="'HF999' is no code"):
        Finding("HF999")


def test_two_audits_are_merged_by_code():
    first, second = Finding("HF013", ("a",), "First."), Finding("HF013", ("b", "a"), "Second.")

    assert merged([first], [second, Finding("HF001")]) == (Finding("HF013", ("a", "b"), "First."), Finding("HF001"))


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB")])
def test_sizes_are_written_to_be_read(count, text):
    assert in_bytes(count) == text


# The symptoms.


def test_the_loss_does_not_fall(bert):
    sound = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=1e-3)
    still = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=0.0)
    backward(bert)

    assert audit(bert, sound, symptom="loss").answer.startswith("What trains is in order")
    assert "because of HF009" in audit(bert, still, symptom="loss").answer


def test_memory_did_not_drop(bert):
    bert.enable_input_require_grads()
    forced = audit(bert, symptom="memory", batch=BATCH)
    bert.disable_input_require_grads()
    mended = audit(bert, symptom="memory", batch=BATCH)

    assert "because of HF020" in forced.answer
    assert mended.findings == () and "Frozen segments keep 0 B" in mended.answer
    kept = [{row.segment: row.saved for row in report.figures} for report in (forced, mended)]
    assert kept[0]["layers[0]"] > 0 and kept[1]["layers[0]"] == 0
    assert kept[0]["layers[2]"] >= kept[1]["layers[2]"] > 0


def test_what_activations_are_kept_is_what_autograd_keeps(bert):
    """Counted by hand: a linear layer keeps its input once for its weight, and nothing where it is frozen."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model.forward = lambda x: {"loss": nn.Sequential.forward(model, x).sum()}
    kept = activations_kept(model, layer_map(model), {"x": torch.ones(4, 8)})

    assert sum(kept.values()) == 4 * (4 * 8 + 4 * 8)  # bytes: the input, and tanh's output, which both keep


def test_accuracy_fell(bert):
    report = audit(bert, symptom="accuracy", batch=BATCH)

    found = {each.code: each for each in report.findings}["HF022"]
    measured = {row.segment: row.gradient for row in report.figures}
    frozen = ["embeddings", "layers[0]", "layers[1]"]
    assert set(found.names) == set(frozen)
    assert list(found.names) == sorted(frozen, key=lambda name: -measured[name])
    assert f"unfreeze {found.names[0]} next" in report.answer


def test_the_relative_gradient_is_that_of_a_model_with_all_unfrozen(bert):
    found = relative_gradients(bert, layer_map(bert), BATCH)

    freeze(bert, "bias")  # whatever requires a gradient
    other = relative_gradients(bert, layer_map(bert), BATCH)
    plain = bert.eval().requires_grad_(True)
    plain(**BATCH).loss.backward()
    own = list(plain.bert.encoder.layer[0].parameters())
    norm = torch.stack([p.grad.norm() for p in own]).norm() / torch.stack([p.norm() for p in own]).norm()
    assert found == other
    assert found["layers[0]"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("lr", [None, 1e-3, 1e-5])
def test_a_probe_tells_how_far_the_loss_falls_as_it_is_and_with_all_unfrozen(bert, lr):
    """Against steps on a copy by hand."""
    trained = [name for name, own in bert.named_parameters() if own.requires_grad]
    found = probe(bert, BATCH, {} if lr is None else dict.fromkeys(trained, lr))

    def after(names):
        copied = copy.deepcopy(bert).eval().requires_grad_(True)
        for _ in range(5):
            copied.zero_grad()
            copied(**BATCH).loss.backward()
            for name, own in copied.named_parameters():
                if name in names:
                    rate = (lr if name in trained else None) or min(5e-5, lr or 5e-5)
                    own.data -= rate * own.grad / (own.grad.abs() + 1e-8)
        return copied(**BATCH).loss.item()

    everything = [name for name, _ in bert.named_parameters()]
    assert (found.steps, found.before) == (5, pytest.approx(bert.eval()(**BATCH).loss.item()))
    assert (found.frozen, found.unfrozen) == (pytest.approx(after(trained)), pytest.approx(after(everything)))
    assert found.unfrozen < found.frozen < found.before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_takes_steps_that_are_too_small_for_the_weights_own_precision(dtype):
    """bfloat16 rounds 1 - 0.001 to 1; in float16 the 1e-8 under a gradient of 0 is 0, and 0 / 0 no number."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=dtype))

        def forward(self, of):
            return {"loss": (self.weight.float() * of).sum()}

    found = probe(Sum(), {"of": torch.tensor([1.0, 0.0])}, {"weight": 1e-3})

    assert found.before == 1
    assert found.unfrozen == found.frozen == pytest.approx(1 - 5e-3, abs=2**-8)
    assert found.unfrozen < 1


def test_a_probe_of_what_the_loss_does_not_depend_on_says_so(make_bert):
    model = make_bert()
    freeze(model, "all - pooler")
    model.forward = lambda labels=None, **inputs: SequenceClassifierOutput(
        loss=nn.functional.cross_entropy(model.classifier(model.bert(**inputs).last_hidden_state[:, 0]), labels)
    )
    found = probe(model, BATCH, {})

    assert found.frozen == found.before > found.unfrozen


def test_the_answer_to_accuracy_fell_compares_with_the_unfrozen_probe(bert):
    optimizer = torch.optim.AdamW([own for own in bert.parameters() if own.requires_grad], lr=1e-3)
    report = audit(bert, optimizer, symptom="accuracy", batch=BATCH)

    own = probe(bert, BATCH, {name: 1e-3 for name, own in bert.named_parameters() if own.requires_grad})
    assert report.answer.endswith(
        f"In 5 steps on this batch the loss falls from {own.before:.4g} to {own.frozen:.4g} as it is, and to "
        f"{own.unfrozen:.4g} with all unfrozen."
    )


def test_nothing_frozen_would_learn_when_nothing_is_frozen(make_bert):
    report = audit(make_bert().train(), symptom="accuracy", batch=BATCH)

    assert report.findings == () and "Nothing is frozen" in report.answer


# It leaves no trace.


@pytest.mark.parametrize("symptom", [None, "loss", "memory", "accuracy"])
def test_a_model_is_afterwards_as_it_was(bert, symptom):
    optimizer = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=1e-3)
    backward(bert)
    before = state(bert)

    audit(bert, optimizer, symptom=symptom, batch=BATCH)

    assert same(state(bert), before)


def test_batch_norms_are_afterwards_as_they_were():
    model = tiny_model("resnet").train()
    before = state(model)

    with as_it_was(model):
        model.eval()
        model.train()(**tiny_inputs(model))
        torch.rand(1)
        model.requires_grad_(False)

    assert same(state(model), before)
