"""`PrefixCache` in several real processes: DDP, two on one folder, and processes killed while they fill it."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import prefixed
import pytest
import torch
from launching import launch
from prefixed import PLACES, ROWS, SMALL_CHUNK, small_model, small_rows, train
from training import differing

from hf_freeze import PrefixCache
from hf_freeze.cache import storage

KILLS = 8

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["transformers.trainer", "transformers.models.bert.modeling_bert", "hf_freeze.callbacks"])


pytestmark = pytest.mark.usefixtures("one_thread")


# DDP


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of one launch on two processes, and what each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(prefixed.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cached", "kept", "found"])
def test_each_rank_is_served_and_the_run_is_the_one_without_the_cache(ranks: Any, name: str) -> None:
    _, happened = ranks
    for own in happened:
        assert own[name]["hits"] > 0 and own[name]["reasons"] == []
        assert own[name]["hits"] + own[name]["misses"] == 3 * ROWS // 2
        assert own[name]["losses"] == own["plain"]["losses"]
        assert differing(own[name]["weights"], own["plain"]["weights"]) == []
    assert differing(happened[0][name]["weights"], happened[1][name]["weights"]) == []


@pytest.mark.slow
def test_each_rank_has_a_folder_of_its_own_and_finds_its_rows_there(ranks: Any) -> None:
    folder, happened = ranks
    assert sorted(path.name for path in (folder / "rows").iterdir()) == ["rank-0", "rank-1"]
    for rank, own in enumerate(happened):
        (index,) = (folder / "rows" / f"rank-{rank}").rglob(storage.INDEX)
        assert index.stat().st_size == own["kept"]["misses"] * storage._RECORD
        assert own["found"]["misses"] == 0 < own["kept"]["misses"]


# Two processes on one folder


@pytest.mark.slow
def test_the_second_of_two_processes_does_without_the_folder_and_says_so(tmp_path: Path) -> None:
    ours, theirs = _FORKS.Pipe()
    other = _FORKS.Process(target=prefixed.hold, args=(tmp_path, theirs))
    other.start()
    try:
        assert ours.recv() == (ROWS, [])
        before = written(tmp_path)
        plain, weights = train(None)
        second = PrefixCache(folder=tmp_path)
        with pytest.warns(UserWarning, match="does without the folder .*another process uses it"):
            cached, own = train(second)
        assert (cached, differing(own, weights)) == (plain, [])
        assert (second.hits, second.misses, len(second.reasons)) == (ROWS, ROWS, 1)
        assert written(tmp_path) == before
    finally:
        other.kill()
        other.join()
    third = PrefixCache(folder=tmp_path)  # the other's end has set the folder free, and its rows are whole
    assert train(third)[0] == plain
    assert (third.hits, third.misses, third.reasons) == (2 * ROWS, 0, [])


def written(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.name in (storage.INDEX, storage.META)}


def test_a_second_cache_of_one_process_does_without_the_folder_too(tmp_path: Path) -> None:
    one, two = small_model(), small_model()
    without = pytest.warns(UserWarning, match="does without the folder")
    with PrefixCache(one, folder=tmp_path) as first, without, PrefixCache(two, folder=tmp_path) as second:
        first.warm(small_rows())
        second.warm(small_rows())
    assert first.misses == second.misses == ROWS
    with PrefixCache(one, folder=tmp_path) as again:
        again.warm(small_rows())
    assert (again.hits, again.misses) == (ROWS, 0)


# Killed while filling


def killed(folder: Path, place: str, after: int, delay: float = 0.0) -> int:
    """Fills in a process that is killed for real; returns how many rows were whole, or -1 where it had ended."""
    ours, theirs = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=prefixed.fill, args=(folder, place, after, theirs))
    process.start()
    theirs.close()
    whole = -1
    try:
        while (whole := ours.recv()) < after:
            pass
        if not place:
            time.sleep(delay)
            process.kill()
        while True:
            whole = ours.recv()
    except EOFError:
        pass
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return whole


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    return train(None)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_what_a_killed_process_has_written_whole_is_served_and_nothing_else(
    place: str, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CHUNK", SMALL_CHUNK)
    after = 10 if place == "in a new file" else 13  # a file holds 10
    assert killed(tmp_path, place, after) == after
    cache = PrefixCache(folder=tmp_path)
    cached, weights = train(cache)
    assert (cached, differing(weights, plain[1])) == (plain[0], [])
    assert (cache.misses, cache.hits, cache.reasons) == (ROWS - after, ROWS + after, [])
    again = PrefixCache(folder=tmp_path)
    assert train(again)[0] == plain[0]
    assert (again.misses, again.reasons) == (0, [])


@pytest.mark.slow
def test_killed_at_random_moments_it_never_serves_half_a_row(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each start the fill goes on from what the killed process had."""
    monkeypatch.setattr(storage, "CHUNK", SMALL_CHUNK)
    dice, reached = random.Random(0), 0
    for _ in range(KILLS):  # each gets on by a row at least
        if reached < ROWS - 6:
            reached = killed(tmp_path, "", reached + 1, delay=dice.uniform(0, 2e-3))
    assert 0 < reached < ROWS
    cache = PrefixCache(folder=tmp_path)
    cached, weights = train(cache)
    assert (cached, differing(weights, plain[1])) == (plain[0], [])
    assert reached <= cache.hits - ROWS <= reached + 1 and cache.reasons == []
