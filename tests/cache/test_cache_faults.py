"""`PrefixCache` where something has gone wrong: files cut off or spoilt, a full disk, weights that were changed."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefixed import ROWS, SMALL_CHUNK, small_model, small_rows, train
from test_cache_architectures import DISENTANGLED
from tiny import tiny_model
from torch import Tensor, nn
from training import differing, losses, make_trainer, tiny_bert
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_freeze import PrefixCache, freeze, unfreeze
from hf_freeze.cache import storage
from hf_freeze.cache.prefix import checksum, fingerprint
from hf_freeze.cache.storage import Room, Store

Run = tuple[list[float], dict[str, Tensor]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the rows take three files."""
    monkeypatch.setattr(storage, "CHUNK", SMALL_CHUNK)


@pytest.fixture(scope="module")
def plain() -> Run:
    return train(None)


def require_trained_as(plain: Run, cache: PrefixCache) -> None:
    cached, weights = train(cache)
    assert (cached, differing(weights, plain[1])) == (plain[0], [])


# Files


def cut_index(folder: Path) -> None:
    (index,) = folder.rglob(storage.INDEX)
    os.truncate(index, index.stat().st_size - storage._RECORD // 2)


def cut_chunk(folder: Path) -> None:
    os.truncate(next(folder.rglob("chunk-1.bin")), 100)


def empty_chunk(folder: Path) -> None:
    os.truncate(next(folder.rglob("chunk-1.bin")), 0)


def remove_chunk(folder: Path) -> None:
    next(folder.rglob("chunk-0.bin")).unlink()


def spoil_meta(folder: Path) -> None:
    next(folder.rglob(storage.META)).write_text("{")


def remove_meta(folder: Path) -> None:
    next(folder.rglob(storage.META)).unlink()


def put_another_models(folder: Path) -> None:
    """Puts the rows of another model where this one's lay."""
    (own,) = [file.parent for file in folder.rglob(storage.META)]
    other = small_model()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1
    with PrefixCache(other, folder=folder) as cache:
        cache.warm(small_rows())
    (theirs,) = [file.parent for file in folder.rglob(storage.META) if file.parent != own]
    own.rename(folder / "away")
    theirs.rename(own)
    (folder / "away").rename(theirs)


@pytest.mark.parametrize(
    ("spoil", "reason", "kept"),
    [
        (cut_index, None, ROWS - 1),
        (cut_chunk, "begins anew: .*chunk-1.bin' is cut off", 0),
        (empty_chunk, "begins anew: .*chunk-1.bin' (is cut off|can't be read)", 0),
        (remove_chunk, "begins anew: .*chunk-0.bin' can't be read", 0),
        (spoil_meta, "begins anew: .*meta.json' can't be read", 0),
        (remove_meta, "begins anew: .*meta.json' can't be read", 0),
        (put_another_models, "begins anew: .* are of another weights", 0),
    ],
)
def test_spoilt_files_are_refused_and_filled_anew(
    spoil: Callable[[Path], None], reason: str | None, kept: int, plain: Run, tmp_path: Path
) -> None:
    train(PrefixCache(folder=tmp_path))
    spoil(tmp_path)
    after, again = PrefixCache(folder=tmp_path), PrefixCache(folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require_trained_as(plain, after)
    assert (after.misses, after.hits) == (ROWS - kept, ROWS + kept)
    assert len(after.reasons) == (reason is not None)
    assert reason is None or re.search(reason, after.reasons[0]), after.reasons
    require_trained_as(plain, again)
    assert (again.misses, again.reasons) == (0, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_index=st.booleans())
def test_whatever_bit_is_spoilt_a_row_is_itself_or_gone(
    where: float, bit: int, in_index: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = {bytes([number]) * 16: torch.full((3, 16), float(number)) for number in range(8)}
    first = Store("float32", Room(0), folder, {})
    for key, row in rows.items():
        first.put(key, row)
    first.close()
    file, used = (folder / storage.INDEX, None) if in_index else (folder / "chunk-0.bin", 8 * 192)
    flip(file, int(where * (used or file.stat().st_size)), bit)

    second = Store("float32", Room(0), folder, {})
    found = {key: second.get(key) for key in rows if key in second}
    whole = {key: row for key, row in found.items() if row is not None}
    assert all(torch.equal(row, rows[key]) for key, row in whole.items())
    assert second.refused or len(whole) == 7
    for key in second.places.keys() - rows.keys():  # a key that was spoilt: its row is that of no key
        assert second.get(key) is None


def flip(file: Path, byte: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("in_folder", [True, False], ids=["in a folder", "in a temporary file"])
def test_on_a_full_disk_further_rows_are_computed_each_time(
    in_folder: bool, kept: int, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since a disk that is really full takes a file system of its own, which needs root.

    `test_storage.py` writes beyond a real limit, of the size of files.
    """
    allocate, allocated = os.posix_fallocate, []

    def full(number: int, offset: int, size: int) -> None:
        if len(allocated) == kept:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocated.append(size)
        allocate(number, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = PrefixCache(folder=tmp_path) if in_folder else PrefixCache(memory=0)
    with pytest.warns(UserWarning, match="cache is full .*No space left"):
        require_trained_as(plain, cache)
    assert cache.hits == min(10 * kept, ROWS) and cache.misses == 2 * ROWS - cache.hits
    assert len(cache.reasons) == 1


def test_a_folder_that_cannot_be_made_is_done_without(plain: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = PrefixCache(folder=tmp_path / "file" / "rows")
    with pytest.warns(UserWarning, match="does without the folder"):
        require_trained_as(plain, cache)
    assert (cache.hits, cache.misses) == (ROWS, ROWS)


# Weights that change


class Change(TrainerCallback):
    """Changes something in the model behind a step."""

    def __init__(self, step: int, change: Callable[[nn.Module], None]) -> None:
        self.step, self.change = step, change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.change(kwargs["model"])


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] += 1


def through_data(model: Any) -> None:
    model.bert.encoder.layer[0].output.dense.bias.data[0] += 1


def by_another_tensor(model: Any) -> None:
    dense = model.bert.encoder.layer[0].output.dense
    dense.bias.data = dense.bias.data + 1


def by_another_parameter(model: Any) -> None:
    dense = model.bert.encoder.layer[0].output.dense
    dense.bias = nn.Parameter(dense.bias.detach() + 1, requires_grad=False)


def changing(folder: Path, change: Callable[[nn.Module], None], *callbacks: TrainerCallback) -> Run:
    """Three epochs of three steps; the change comes in the middle of the first."""
    model = tiny_bert()
    freeze(model, "embeddings, layers[:2]")
    trainer = make_trainer(folder, Change(2, change), *callbacks, model=model, steps=9)
    trainer.train()
    return [loss for _, loss in losses(trainer)], model.state_dict()


@pytest.mark.parametrize(("change", "found"), [(in_place, 8), (by_another_tensor, 8), (through_data, 6)])
def test_a_frozen_weight_that_is_changed_is_noticed_by_the_next_epoch(
    change: Callable[[nn.Module], None], found: int, tmp_path: Path
) -> None:
    """No row is seen twice in an epoch, so that what is found by its end is as good as at once."""
    plain, weights = changing(tmp_path / "plain", change)
    cache = PrefixCache()
    with pytest.warns(UserWarning, match="have been changed"):
        cached, own = changing(tmp_path / "cached", change, cache)
    assert (cached, differing(own, weights)) == (plain, [])
    assert (cache.hits, cache.misses, len(cache.reasons)) == (found, 18 - found, 1)


def test_a_frozen_part_that_is_exchanged_is_noticed_at_once(tmp_path: Path) -> None:
    plain, weights = changing(tmp_path / "plain", by_another_parameter)
    cache = PrefixCache()
    with pytest.warns(UserWarning, match="has been given other parts: attach the cache again"):
        cached, own = changing(tmp_path / "cached", by_another_parameter, cache)
    assert (cached, differing(own, weights)) == (plain, [])
    assert (cache.hits, cache.misses) == (0, 4)


@pytest.mark.parametrize("part", ["layers[1]", "norm"])
def test_what_was_trained_by_a_fused_optimizer_and_frozen_again_is_computed_anew(part: str) -> None:
    """Fused optimizers, the Trainer's own among them, write past torch's versions (2.13)."""
    model = with_a_shared_norm() if part == "norm" else small_model()
    (batch, *_) = batches()
    with PrefixCache(model) as cache:
        model(**batch)
        unfreeze(model, part)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prefix in which something shared trains is none
            model(**batch, output_hidden_states=True).loss.backward()
            optimizer.step()
        freeze(model, part)
        model.eval()
        found = model(**batch).logits
        assert cache.hits == 0
    torch.testing.assert_close(found, model(**batch).logits)


def with_a_shared_norm() -> nn.Module:
    """DeBERTa, whose layers read embeddings of distances through one norm."""
    model = tiny_model("deberta-v2", AutoModelForSequenceClassification, **DISENTANGLED)
    freeze(model, "embeddings, norm, layers[:1]")
    return model.train()


def test_a_change_of_which_torch_hears_nothing_is_told_of_at_the_end_at_the_latest() -> None:
    """A loop has no epochs at which the weights could be looked at."""
    model = small_model()
    cache = PrefixCache(model)
    with pytest.warns(UserWarning, match="were changed past torch's notice"), cache:
        cache.warm(small_rows())
        through_data(model)
    assert len(cache.reasons) == 1


def test_the_same_weights_written_again_are_no_change() -> None:
    model = small_model()
    with PrefixCache(model) as cache:
        cache.warm(small_rows())
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
        cache.warm(small_rows())
    assert (cache.hits, cache.misses, cache.reasons) == (ROWS, ROWS, [])


@given(index=st.integers(0, 11), bit=st.integers(0, 31))
def test_one_bit_of_one_weight_gives_another_fingerprint_and_another_checksum(index: int, bit: int) -> None:
    one = torch.arange(12, dtype=torch.float32)
    other = one.clone()
    other.view(torch.int32)[index] ^= 1 << bit if bit < 31 else -(2**31)
    assert fingerprint([one]) != fingerprint([other])
    assert checksum([one]) != checksum([other])


def test_a_weight_that_is_changed_between_two_runs_begins_another_folder(plain: Run, tmp_path: Path) -> None:
    first, second, third = small_model(), small_model(), small_model()
    weight = second.bert.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        weight[0, 0] *= 1 + 2**-20
    counts = []
    for model in (first, second, third):
        with PrefixCache(model, folder=tmp_path) as cache:
            cache.warm(small_rows())
            counts.append((cache.hits, cache.misses))
    assert counts == [(0, ROWS), (0, ROWS), (ROWS, 0)]
    assert len(list(tmp_path.rglob(storage.META))) == 2


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"problem_type": "single_label_classification", "id2label": {0: "a", 1: "b"}}, ROWS),
        ({"hidden_act": "relu"}, 0),
    ],
)
def test_of_a_configuration_what_hidden_states_depend_on_counts(
    changed: dict[str, Any], found: int, tmp_path: Path
) -> None:
    """transformers sets `problem_type` when a model is first called with labels."""
    first, second = small_model(), small_model()
    for name, value in changed.items():
        setattr(second.config, name, value)
    with PrefixCache(first, folder=tmp_path) as cache:
        cache.warm(small_rows())
    with PrefixCache(second, folder=tmp_path) as cache:
        cache.warm(small_rows())
    assert cache.hits == found


# How rows are kept


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_token"),
    [("bfloat16", 2**-8, 0.0), ("float16", 2**-11, 0.0), ("int8", 2**-22, 1 / 254)],
)
def test_reduced_rows_and_their_losses_are_off_by_what_rounding_explains(
    dtype: str, of_value: float, of_token: float
) -> None:
    """Rounding to p bits moves a value by 2**-p of itself at most, int8 by half of a token's largest over 127.

    A loss moves by the sum of |gradient| * |error|, to first order; half of that again is left for the second.
    """
    model, seen = small_model().eval(), []

    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[-1], *inputs[1:])

    model.bert.encoder.layer[2].register_forward_pre_hook(watch)
    exact = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        exact.append((batch, loss.item(), seen[-1].detach(), seen[-1].grad.abs()))
    with PrefixCache(model, dtype=dtype) as cache:
        for batch, before, hidden, gradient in (*exact, *exact):  # as they are filled, and as they are found
            loss = model(**batch).loss.item()
            moved = (seen[-1].detach() - hidden).abs()
            smallest = 2**-25  # half of float16's smallest step
            bound = of_value * hidden.abs() + of_token * hidden.abs().amax(-1, keepdim=True) + smallest
            assert moved.max() > 0 and (moved <= bound).all()
            assert abs(loss - before) <= 1.5 * float((gradient * bound).sum())
    assert (cache.hits, cache.misses) == (ROWS, ROWS)


def batches() -> Iterator[dict[str, Tensor]]:
    """All rows, in batches of eight."""
    rows = small_rows()
    for begin in range(0, ROWS, 8):
        yield {name: torch.stack([torch.as_tensor(row[name]) for row in rows[begin : begin + 8]]) for name in rows[0]}
