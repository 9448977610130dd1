"""`search`: what a user calls.

What lives here: `search`, what one is asked for, and a worker's loop. What may not: the study (`study.py`), runs
(`judging.py`). How data passes through:

    recipe, space, budget, folder -> Asked -> workers: take a trial, draw a recipe, run it, tell -> SearchResult
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import FreezeError, SearchError
from ..recipes import Recipe
from ..report.plots import require_matplotlib
from ..runs import resolved
from ..stages import is_count
from .budget import SearchBudget
from .files import write
from .front import SearchPoint, SearchResult, in_words
from .judging import Behind, Judge, Refused
from .space import SearchSpace


@dataclass(frozen=True)
class Asked:
    """What a search is asked for.

    Attributes:
        recipe: What it begins with, model and texts named.
        space: What it may try.
        budget: How much it may take.
        folder: Where its study and its results lie.
        workers: How many processes work at it at a time.
    """

    recipe: Recipe
    space: SearchSpace
    budget: SearchBudget
    folder: Path
    workers: int

    @property
    def what(self) -> dict[str, Any]:
        """What has to be the same when a search goes on: not how much it may take."""
        return {"recipe": self.recipe.to_yaml(), "space": self.space.to_dict()}

    def to_json(self) -> str:
        """Returns it as text, for another process."""
        return json.dumps(
            {**self.what, "budget": asdict(self.budget), "folder": str(self.folder), "workers": self.workers}
        )

    @classmethod
    def from_json(cls, text: str) -> Asked:
        """Reads what `to_json` wrote."""
        told = json.loads(text)
        return cls(
            Recipe.from_yaml(told["recipe"]), SearchSpace(**told["space"]), SearchBudget(**told["budget"]),
            Path(told["folder"]), told["workers"],
        )  # fmt: skip


def search(
    recipe: Recipe | str = "fast",
    space: SearchSpace | None = None,
    budget: SearchBudget | None = None,
    folder: str | os.PathLike[str] = "outputs/search",
    workers: int = 1,
) -> SearchResult:
    """Looks for recipes that no other beats in accuracy, trainable parameters and time at once.

    How many layers are frozen, adapters and their sizes layer by layer, stages, rates and epochs are drawn by Optuna
    (``pip install 'hf-freeze[search]'``); each recipe is trained, and judged on the validation split. The test split is
    not looked at. All is kept in the folder: called again, a search goes on there, whatever it was ended by. At its end
    the folder holds each recipe of the front, and a picture.

    Args:
        recipe: A recipe, or the name or file of one. The search begins with it where the space holds it, and takes from
            it all that it does not vary: model, texts, batches, lengths, cache and seed.
        space: What may be tried; the whole of `SearchSpace` unless told.
        budget: How much may be taken; 20 trials unless told.
        folder: Where all is kept.
        workers: Processes that work side by side; the same call in another process is one more.

    Returns:
        A `SearchResult`; ``print`` it, or show it in a notebook.

    Raises:
        SearchError: Optuna is missing, the folder holds something else, or nothing in the space can be run.
        FreezeError: a recipe, a model or texts that can't be used.
    """
    if not is_count(workers, least=1):
        raise SearchError(f"workers is {workers!r}: write a whole number from 1.")
    if find_spec("optuna") is None:
        raise SearchError("A search needs Optuna, which is not installed: pip install 'hf-freeze[search]'.")
    require_matplotlib()
    told = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    asked = Asked(resolved(told), space or SearchSpace(), budget or SearchBudget(), Path(folder).absolute(), workers)
    from .study import Desk, read_result

    Desk(asked.folder, asked.what, asked.budget)  # refuses a folder before others are started on it
    helpers = [_helper(asked) for _ in range(workers - 1)]
    try:
        work(asked)
        codes = [helper.wait() for helper in helpers]
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()
    result = read_result(asked.folder, asked.budget.parameters)
    write(result)
    if failed := [code for code in codes if code]:
        raise SearchError(
            f"A worker has ended with exit code {failed[0]}; above stands why. What was found lies in "
            f"{str(asked.folder)!r}; search again to go on."
        )
    return result


def work(asked: Asked, alive: Callable[[], bool] = lambda: True) -> None:
    """Takes trials and runs them until the budget is spent.

    Args:
        asked: What is asked for.
        alive: Whether to go on.
    """
    from .study import REFUSED, STOPPED, Desk

    base = asked.recipe
    with _settled(asked.workers), Desk(asked.folder, asked.what, asked.budget, base.seed, alive) as desk:
        judge = Judge(base, asked.budget.parameters, desk.cache)
        judge.pace = desk.begin(lambda: asked.space.start(base, judge.depth(base), judge.layers), judge.measure)
        while (trial := desk.take()) is not None:
            try:
                recipe = _drawn(asked.space, trial, judge)
                desk.note(trial, recipe)
                point = judge.run(trial.number, recipe, desk.points)
            except (Refused, torch.OutOfMemoryError) as reason:  # the space goes from the head alone to the whole model
                desk.end(trial, REFUSED, str(reason))
            except Behind as reason:
                desk.end(trial, STOPPED, str(reason))
                _tell(f"trial {trial.number}: stopped: {reason}: {in_words(recipe)}")
            except Exception:
                desk.fail(trial)
                raise
            else:
                desk.finish(trial, point)
                _tell(_line(point))
        if alive():
            desk.tidy()


def _drawn(space: SearchSpace, trial: Any, judge: Judge) -> Recipe:
    """Returns the recipe of a trial.

    Raises:
        Refused: what was drawn does not go with the recipe that the search begins with.
    """
    try:
        return space.draw(trial, judge.base, judge.layers, judge.width)
    except FreezeError as error:
        raise Refused(str(error)) from error


@contextmanager
def _settled(workers: int) -> Iterator[None]:
    """Shares torch's threads among workers, and lets transformers report errors alone: it loads a model each trial."""
    from transformers.utils import logging

    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.set_num_threads(max(1, threads // workers))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _helper(asked: Asked) -> subprocess.Popen[bytes]:
    """Starts another worker, which takes no further trials once this process has ended."""
    return subprocess.Popen([sys.executable, "-m", f"{__package__}.worker", str(os.getpid()), asked.to_json()])


def _line(point: SearchPoint) -> str:
    numbers = f"accuracy {point.accuracy:.3f}, {point.trainable:,} parameters, {point.seconds:.1f} s"
    return f"trial {point.number}: {numbers}: {in_words(point.recipe)}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
