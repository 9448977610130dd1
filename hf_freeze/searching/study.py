"""The study of a search: Optuna's, in a file that all workers share, also those to come.

What lives here: `Desk`, at which a worker takes trials and gives them back, and `read_result`. What may not: what a
trial is made of. This file alone imports Optuna; `searcher.py` imports it once that is known to be there. How data
passes through:

    folder -> study.db -> a trial is claimed -> told: finished, stopped, refused -> points -> SearchResult

A worker holds a lock on a file of its own as long as it lives: the system lets go of it however it ends. A trial whose
worker's lock is free is lost, and what it was to try is put in line again. Optuna's heartbeats would do so after some
time and by a thread; they pass over a trial whose worker died before the first beat (Optuna 5.0).
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ..errors import SearchError
from ..recipes import Recipe
from .budget import SearchBudget
from .front import SearchPoint, SearchResult, pareto
from .pace import Pace

STUDY, CLAIM, WORKERS, CACHE = "study.db", "claim.lock", "workers", "cache"
NAME = "search"
PAUSE = 0.5  # seconds, for a worker that has to wait for what others are at
REFUSALS = 100  # in a row; there is next to nothing in the space that can be run
MOST_TRIES = 3  # of a recipe whose process was killed, by itself perhaps
ASKED, PACE, WORKER, RECIPE, REFUSED, STOPPED = "asked", "pace", "worker", "recipe", "refused", "stopped"
TRIES = "tries"
_OVER = (TrialState.COMPLETE, TrialState.PRUNED)
_CANNOT_WAIT = 100  # seconds for which SQLite waits for another worker's write


class Desk:
    """A worker's place at the study of a folder. Use it in a `with`.

    Args:
        folder: The folder of the search.
        asked: What is searched, in plain data: another search in the same folder is refused.
        budget: How much may be taken.
        seed: Seeds the draws, with the number of each trial, so that an interrupted search does not draw the same anew.
        alive: Whether to take further trials.

    Raises:
        SearchError: the folder holds another search, or something else.
    """

    def __init__(
        self,
        folder: Path,
        asked: Mapping[str, Any],
        budget: SearchBudget,
        seed: int = 0,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder, self.asked, self.budget, self.seed, self.alive = folder, dict(asked), budget, seed, alive
        _require_own(folder)
        self._claim = FileLock(folder / CLAIM)
        self._refused: list[str] = []  # in a row
        with _quiet(), _kept_in(folder), self._claim:
            self.study = _opened(folder)
            if PACE not in self.study.user_attrs and not self._trials():  # what it was asked for may have been a slip
                self.study.set_user_attr(ASKED, self.asked)
            self._require_same()

    def __enter__(self) -> Desk:
        with self._claim:
            for number in count():
                if lock := self._locked(number):
                    self.number, self._lock = number, lock
                    return self
        raise AssertionError("numbers never end")

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    @property
    def cache(self) -> Path:
        """Where the rows lie that this worker caches."""
        return self.folder / CACHE / str(self.number)

    def begin(self, start: Callable[[], Mapping[str, Any] | None], measure: Callable[[], Pace]) -> Pace:
        """Begins the search, unless another worker has: puts its first trial in line, and measures the pace.

        Args:
            start: Returns the draws of the first trial, or None where they are drawn too.
            measure: Measures the pace, which is the same for all workers then.
        """
        with _quiet(), self._claim:
            self._require_same()
            if (known := self.study.user_attrs.get(PACE)) is not None:
                return Pace(**known)
            if not self._trials() and (draws := start()) is not None:
                self.study.enqueue_trial(dict(draws))
            pace = measure()
            self.study.set_user_attr(PACE, asdict(pace))
            return pace

    def take(self) -> optuna.Trial | None:
        """Returns a trial that is this worker's now, or None where the budget is spent.

        Where all that is left is other workers' it waits: one of them may be lost.
        """
        while self.alive():
            with _quiet(), self._claim:
                self._put_lost_in_line()
                trials = self._trials()
                over = [own for own in trials if own.state in _OVER]
                if self._spent(over):
                    return None
                told = sum(REFUSED not in own.user_attrs for own in over)
                running = sum(own.state == TrialState.RUNNING for own in trials)
                if self.budget.trials is None or told + running < self.budget.trials:
                    seed = (1000 * self.seed + len(trials)) % 2**32  # the most that numpy takes
                    self.study.sampler = optuna.samplers.TPESampler(seed=seed)
                    trial = self.study.ask()
                    trial.set_user_attr(WORKER, self.number)
                    return trial
            time.sleep(PAUSE)
        return None

    def note(self, trial: optuna.Trial, recipe: Recipe) -> None:
        """Writes down what a trial runs."""
        trial.set_user_attr(RECIPE, recipe.to_yaml())

    def finish(self, trial: optuna.Trial, point: SearchPoint) -> None:
        """Writes down what came of a trial."""
        self._refused = []
        with _quiet():
            self.study.tell(trial, [point.accuracy, point.trainable, point.seconds])

    def end(self, trial: optuna.Trial, kind: str, reason: str) -> None:
        """Writes down why a trial was not run to its end: `STOPPED` or `REFUSED`."""
        self._refused = [*self._refused, reason] if kind == REFUSED else []
        with _quiet():
            trial.set_user_attr(kind, reason)
            self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial) -> None:
        """Writes down that a trial has failed; it is not tried again."""
        with _quiet():
            self.study.tell(trial, state=TrialState.FAIL)

    def points(self) -> list[SearchPoint]:
        """Returns the trials that have been run to their end so far."""
        return _points(self._trials())

    def tidy(self) -> None:
        """Removes the cached rows of this worker, and of those that are gone."""
        with self._claim:
            for folder in (self.folder / CACHE).glob("*"):
                if folder.name.isdecimal() and (folder.name == str(self.number) or self._is_gone(folder.name)):
                    shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another worker has rows there
                (self.folder / CACHE).rmdir()

    def _require_same(self) -> None:
        """Refuses a study of another search.

        Raises:
            SearchError: it is one.
        """
        known = self.study.user_attrs.get(ASKED, {})
        if known != self.asked:
            other = next(key for key in {**known, **self.asked} if known.get(key) != self.asked.get(key))
            raise SearchError(
                f"{str(self.folder)!r} holds a search with another {other}. Name another folder, or search as before."
            )

    def _spent(self, over: list[FrozenTrial]) -> bool:
        """Tells whether no other trial begins."""
        told = [own for own in over if REFUSED not in own.user_attrs]
        seconds = sum((own.duration.total_seconds() for own in told if own.duration), 0.0)
        if len(self._refused) >= REFUSALS:
            said = f"Of {REFUSALS} recipes in a row none could be run. The last: {self._refused[-1]}"
            if not told:
                raise SearchError(f"{said} Widen the space or the budget.")
            warnings.warn(f"The search ends before its budget is spent. {said}", stacklevel=2)
            return True
        return (self.budget.trials is not None and len(told) >= self.budget.trials) or (
            self.budget.seconds is not None and seconds >= self.budget.seconds
        )

    def _put_lost_in_line(self) -> None:
        """Puts in line again what a worker was at that is gone. Twice, where this one ends in between; never not."""
        for own in self._trials():
            if own.state != TrialState.RUNNING:
                continue
            worker = own.user_attrs.get(WORKER)  # None of one that was gone at once: its claim is over
            if worker is not None and worker != self.number and not self._is_gone(str(worker)):
                continue
            tries = own.user_attrs.get(TRIES, 0) + 1
            draws = {**own.system_attrs.get("fixed_params", {}), **own.params}
            if draws and tries < MOST_TRIES:
                self.study.enqueue_trial(draws, user_attrs={TRIES: tries})
            self.study.tell(own.number, state=TrialState.FAIL)

    def _locked(self, number: int | str) -> FileLock | None:
        """Returns the lock of a worker's place, or None where one sits there."""
        (self.folder / WORKERS).mkdir(exist_ok=True)
        lock = FileLock(self.folder / WORKERS / f"{number}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock

    def _is_gone(self, number: str) -> bool:
        if lock := self._locked(number):
            lock.release()
        return lock is not None

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)


def read_result(folder: Path, most: int | None = None) -> SearchResult:
    """Returns what a search has found so far; no point is in the front in which more parameters train than `most`."""
    with _quiet():
        trials = _opened(folder).get_trials(deepcopy=False)
    points = _points(trials)
    front = pareto(own for own in points if most is None or own.trainable <= most)
    numbers = {own.number for own in front}
    pruned = [own for own in trials if own.state == TrialState.PRUNED]
    refused = sum(REFUSED in own.user_attrs for own in pruned)
    others = tuple(own for own in points if own.number not in numbers)
    return SearchResult(front, others, len(pruned) - refused, refused, folder / STUDY)


def _points(trials: list[FrozenTrial]) -> list[SearchPoint]:
    found = []
    for own in trials:
        if own.state == TrialState.COMPLETE:
            accuracy, trainable, seconds = own.values
            recipe = Recipe.from_yaml(own.user_attrs[RECIPE])
            found.append(SearchPoint(own.number, recipe, accuracy, int(trainable), seconds))
    return found


def _opened(folder: Path) -> optuna.Study:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(folder / STUDY).absolute()}", engine_kwargs={"connect_args": {"timeout": _CANNOT_WAIT}}
    )
    if others := set(optuna.get_all_study_names(storage)) - {NAME}:
        raise SearchError(f"{str(folder / STUDY)!r} holds {min(others)!r}, a study of your own. Name another folder.")
    return optuna.create_study(
        storage=storage,
        study_name=NAME,
        directions=["maximize", "minimize", "minimize"],  # accuracy, trainable parameters, seconds
        load_if_exists=True,
    )


def _require_own(folder: Path) -> None:
    """Refuses a folder in which something else is.

    Raises:
        SearchError: it is a file, or holds files and no study.
    """
    if folder.exists() and not folder.is_dir():
        raise SearchError(f"The folder {str(folder)!r} is a file. Name another one.")
    if folder.is_dir() and not (folder / STUDY).exists() and any(file.name != CLAIM for file in folder.iterdir()):
        raise SearchError(f"The folder {str(folder)!r} is not empty, and holds no search. Name another one.")


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Makes a folder for a search.

    Raises:
        SearchError: the folder can't be made or written to, or its study can't be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SearchError(
            f"The search can't be kept in {str(folder)!r}: {reason}. Free space, or name another folder."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Lets Optuna warn alone: what it would tell of each trial is told here in other words."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
