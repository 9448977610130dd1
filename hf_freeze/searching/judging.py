"""One trial: a recipe is run on the training texts and judged on the validation texts.

What lives here: `Judge`, and the callback that keeps time and ends a run that is behind. What may not: Optuna, and
which recipes to try. How data passes through:

    recipe -> parameters foreseen, on `meta` -> refused, or fine_tune with the cache -> half-way: behind? -> SearchPoint

The test split is not looked at: the validation split takes its place.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..cache import PrefixCache
from ..cache.prefix import Prefix, find_prefixes
from ..data import Split, tokenize
from ..errors import DataError, FreezeError, SearchError
from ..layers import layer_map
from ..planning.unloaded import on_meta, with_fake_tensors
from ..recipes import Cache, Recipe
from ..runs import corpus_of, fine_tune, load_base
from ..selectors import select
from ..timetable import trainable_sets
from .front import SearchPoint
from .pace import FIRST, ROWS, Pace, measure
from .space import frozen

ASIDE = "The prefix cache stands aside"  # above adapters, and in stages that train all: known, and many times over


class Refused(Exception):
    """A recipe that is not run; the message says why."""


class Behind(Exception):
    """A run that was ended half-way; the message says behind what."""


class Judge:
    """Runs recipes that have model and texts in common.

    Args:
        base: The recipe that the search begins with; it names model and texts.
        most: The most parameters that may train, or None.
        folder: Where the cached rows of this worker lie.
    """

    def __init__(self, base: Recipe, most: int | None, folder: Path) -> None:
        self.base, self.most, self.folder = base, most, folder
        corpus = corpus_of(base)
        self.corpus = replace(corpus, test=corpus.validation)
        self.tokenizer, model = load_base(str(base.model), corpus.label_names)
        self.bare = on_meta(model)
        layers = layer_map(self.bare)
        counts = [sum(own.stack == stack for own in layers.layers) for stack in layers.stacks]
        if not counts:
            raise SearchError(f"No layers are found in {type(model).__name__}, and a search is over their depth.")
        self.layers = min(counts)
        self.width = int(model.config.get_text_config().hidden_size)
        self.pace = Pace(self.layers, 0.0, 0.0)

    def measure(self) -> Pace:
        """Times the model's layers, for what the cache saves."""
        cache = self.base.cache
        if not isinstance(cache, Cache):
            return self.pace
        _, model = load_base(str(self.base.model), self.corpus.label_names)
        model.to(self.base.training_arguments(self.folder).device)  # where the Trainer will have it
        train, few = self.corpus.train, FIRST + ROWS
        rows = tokenize(Split(train.texts[:few], train.labels[:few]), self.tokenizer, self.base.max_length)
        return measure(model, self.layers, cache, rows, self.collator, self.base.batch_size)

    @cached_property
    def collator(self) -> DataCollatorWithPadding:
        """What pads, as in `fine_tune`."""
        return DataCollatorWithPadding(self.tokenizer)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The validation texts."""
        return tokenize(self.corpus.test, self.tokenizer, self.base.max_length)

    def depth(self, recipe: Recipe) -> int | None:
        """Returns how many layers a recipe freezes from the bottom, with the embeddings; None where it is otherwise."""
        names = set(select(self.bare, recipe.freeze)) if recipe.freeze else set()
        for depth in range(self.layers + 1):
            own = frozen(depth)
            if names == (set(select(self.bare, own)) if own else set()):
                return depth
        return None

    def trainable(self, recipe: Recipe) -> int:
        """Returns how many parameters any stage of a recipe trains, without running it.

        Raises:
            FreezeError: it does not fit the model.
        """
        model: Any = with_fake_tensors(self.bare)  # adapters inside a layer take a pass, and not all can on `meta`
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # it is copied
            recipe.apply(model)
        sizes = {name: own.numel() for name, own in model.named_parameters()}
        schedule = recipe.schedule(model)
        if schedule is None:
            return sum(sizes[name] for name, own in model.named_parameters() if own.requires_grad)
        names = frozenset().union(*trainable_sets(layer_map(model), schedule.stages_for(model)))
        return sum(sizes[name] for name in names)

    def run(self, number: int, recipe: Recipe, rivals: Callable[[], Sequence[SearchPoint]]) -> SearchPoint:
        """Runs a recipe.

        Args:
            number: The trial's.
            recipe: The recipe.
            rivals: Returns the points of trials that have been run to their end so far.

        Raises:
            Refused: more parameters train than may, or the recipe fits neither model nor run.
            Behind: it was ended half-way.
        """
        try:
            trainable = self.trainable(recipe)
            if self.most is not None and trainable > self.most:
                raise Refused(f"{trainable:,} parameters would train, and {self.most:,} may")
            return self._run(number, recipe, trainable, rivals)
        except DataError:  # of the machine, not of the recipe: all have the same model and texts
            raise
        except FreezeError as error:
            raise Refused(str(error)) from error

    def _run(
        self, number: int, recipe: Recipe, trainable: int, rivals: Callable[[], Sequence[SearchPoint]]
    ) -> SearchPoint:
        cache = None
        if isinstance(recipe.cache, Cache):
            cache = PrefixCache(**{**asdict(recipe.cache), "folder": self.folder})
        watch = Watch(self, trainable, cache, rivals)
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # the stages announce themselves
                warnings.filterwarnings("ignore", message=ASIDE)
                callbacks = [*([cache] if cache else []), watch]
                outcome = fine_tune(replace(recipe, cache=None), self.corpus, callbacks)
        finally:
            if cache:
                cache.detach()
        return SearchPoint(number, recipe, outcome.accuracy, outcome.trainable, watch.without_help(outcome.seconds))


class Watch(TrainerCallback):
    """Keeps the time of a run, less what the search itself takes, and ends the run half-way if it is behind.

    Args:
        judge: Validation texts, and how long a cached row takes.
        trainable: The parameters that the run trains.
        cache: The run's cache; it stands before this callback.
        rivals: Returns the points that the run is held against.
    """

    def __init__(
        self, judge: Judge, trainable: int, cache: PrefixCache | None, rivals: Callable[[], Sequence[SearchPoint]]
    ) -> None:
        self.judge, self.trainable, self.cache, self.rivals = judge, trainable, cache, rivals
        self._begin = self._asked = self._helped = 0.0
        self._prefixes: tuple[Prefix, ...] = ()
        self._depth = self._hits = 0

    def without_help(self, seconds: float) -> float:
        """Returns what a run of so many seconds takes by itself: with empty cache, and unasked."""
        return seconds - self._asked + self._helped

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to keep time."""
        self._begin = time.perf_counter()
        self._prefixes = find_prefixes(kwargs["model"]) if self.cache else ()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes how deep the prefix is in this stage."""
        self._depth = max((own.depth()[0] for own in self._prefixes), default=0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the rows of the first epoch that were there before it; half-way, holds the run against others.

        Raises:
            Behind: it is behind.
        """
        if self.cache is not None and (state.epoch or 0) <= 1:  # later, a row is found since this run has kept it
            self._helped += (self.cache.hits - self._hits) * self.judge.pace.of(self._depth)
        if state.global_step == -(-state.max_steps // 2) < state.max_steps:
            self._compare(kwargs["model"])
        if self.cache is not None:
            self._hits = self.cache.hits

    def _compare(self, model: nn.Module) -> None:
        began = time.perf_counter()
        elapsed = self.without_help(began - self._begin)
        rivals = [own for own in self.rivals() if own.seconds <= elapsed and own.trainable <= self.trainable]
        if rivals:
            best = max(rivals, key=lambda own: own.accuracy)
            if is_behind(accuracy := self._accuracy(model), best.accuracy):
                raise Behind(f"{accuracy:.3f} half-way, after {elapsed:.1f} s, behind trial {best.number}")
        self._asked += time.perf_counter() - began

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        """Returns the accuracy on the validation texts. No DataLoader: it would draw a random number of the run's."""
        size, rows, right = 4 * self.judge.base.batch_size, self.judge.rows, 0
        device = next(model.parameters()).device
        model.eval()
        for begin in range(0, len(rows), size):
            batch = self.judge.collator(rows[begin : begin + size]).to(device)
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        model.train()
        return right / len(rows)


def is_behind(accuracy: float, rival: float) -> bool:
    """Tells whether a run is behind one that took no longer to its end than this one half-way, and trains no more.

    The second half may well halve the errors; a run is behind if it would still not be better then.

    >>> is_behind(0.85, 0.95), is_behind(0.92, 0.95)
    (True, False)
    """
    return 1 - (1 - accuracy) / 2 <= rival
