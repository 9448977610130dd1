"""Audits and certificates on two real processes, under DDP and under FSDP2."""

from __future__ import annotations

import json

import pytest
import watched
from launching import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of one launch on two processes with all scenarios."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(watched.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


def seen(folder, name):
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_the_first_process_audits_and_finds_nothing_in_a_sound_run(two, name):
    first, second = seen(two, name)

    assert first["audited"]["findings"] == [] and first["audited"]["step"] == 5
    assert second["audited"] is None
    assert first["told"] == second["told"] == []


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_what_has_not_changed_on_any_process_is_kept(two, name):
    certificate = json.loads((two / name / "certificate.json").read_text())

    assert [own["error"] for own in seen(two, name)] == [None, None]
    assert certificate["verdict"] == "kept"
    assert certificate["begin"]["sha256"] == certificate["end"]["sha256"]


def test_shards_together_are_as_large_as_the_whole(two):
    whole, shards = (json.loads((two / name / "certificate.json").read_text()) for name in ("ddp", "sharded"))

    assert (whole["tensors"], whole["bytes"]) == (shards["tensors"], shards["bytes"])


@pytest.mark.parametrize("name", ["ddp, broken", "sharded, broken"])
def test_what_has_changed_on_one_process_is_named_on_each(two, name):
    certificate = json.loads((two / name / "certificate.json").read_text())

    assert all("'bert.encoder.layer.0.output.dense.weight' was frozen" in own["error"] for own in seen(two, name))
    assert certificate["changed"] == ["bert.encoder.layer.0.output.dense.weight"]
