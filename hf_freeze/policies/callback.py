"""`AdaptiveFreezing`: what a user puts into a Trainer, to let a policy decide.

What lives here: the callback. What may not: what is decided (a file for each policy), how stages are carried out
(`engine.py`, by `StagedUnfreezing`). How data passes through:

    backward -> norms taken -> optimizer's step -> statistics -> decision of the main process -> a further stage of the
    engine, in the checkpoint of that step -> entered before the next
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..callbacks import StagedUnfreezing
from ..distributed import FSDP1, of_main_process, trainer_launch
from ..engine import StageEngine
from ..errors import PolicyError
from ..layers import layer_map
from ..presets import all_that_trains
from ..resuming import RECORD, recorded
from ..selectors import select
from ..stages import Stage
from .measuring import Gauge
from .parts import parts_of, selector_of
from .protocol import Decision, FreezePolicy, LayerStats, require_policy


class AdaptiveFreezing(StagedUnfreezing):
    """Lets a policy decide, while a `Trainer` runs, what trains and at what rate.

    It is `StagedUnfreezing` whose stages come one by one, from what the policy says: what that holds of optimizers,
    processes, checkpoints and `PrefixCache` holds here. It starts with all that trains; what `freeze` has frozen before
    stays so. A run that was killed resumes to the last bit, and the policy with it: its state and its decisions are in
    the checkpoint's ``trainer_state.json``. What a resumed checkpoint has decided holds on under another policy too.

    Each decision is announced with its reason, and stands in the Trainer's log history as ``freeze/decision``, with
    what it was made of; the logs count ``freeze/decisions``. A step whose gradients are not finite is not counted.

    Args:
        policy: The policy, see `FreezePolicy`.

    Raises:
        PolicyError: what was passed is no policy; when training begins: a model without layers; FSDP1, whose gradients
            lie elsewhere; in a run: a decision after which nothing would train.
        ScheduleError: as `StagedUnfreezing`; DeepSpeed is refused.

    Attributes:
        policy: The policy.
        decisions: What it has changed in this process, each with the optimizer steps done before.
        seconds: What measuring and deciding have taken in this process.

    Example:
        >>> from hf_freeze import GradientNormFreezing
        >>> callback = AdaptiveFreezing(GradientNormFreezing(every=10))
    """

    def __init__(self, policy: FreezePolicy) -> None:
        self.policy = require_policy(policy)
        self.decisions: list[tuple[int, Decision]] = []
        self.seconds = 0.0
        self.engine: StageEngine | None = None
        self._wrapper = lambda: None
        self._beginning = copy.deepcopy(policy.state_dict())
        self._gauge: Gauge | None = None
        self._kept: dict[str, Any] = {}
        self._stages: dict[str, Any] | None = None  # as checkpoints keep them; None where another has come
        self._count = 0
        self._resumes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up what a checkpoint has decided, or asks for the first time."""
        super().on_train_begin(args, state, control, **kwargs)
        assert self.engine is not None  # it has been made
        model = self.engine.model
        parts = parts_of(layer_map(model), self.engine.union)
        if not any(part.kind == "layer" for part in parts):
            raise PolicyError(f"No layers of {type(model).__name__} train: a policy has nothing to decide on.")
        if trainer_launch(args, model).kind == FSDP1:
            raise PolicyError("Under FSDP1 gradients lie where no policy sees them. Set fsdp_config={'version': 2}.")
        self._gauge = Gauge(model, parts, self.policy.reads, state.max_steps, self._kept)
        if not self._resumes:
            self._ask(state, self._gauge.read(state.global_step))
            self._enter(state, model)
        self._write_down(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enters what has been decided, and lets the first batch be seen."""
        super().on_step_begin(args, state, control, **kwargs)
        if self._gauge is not None:
            self._gauge.wait()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the norms, where a measurement is due."""
        if self._gauge is not None and self._is_due(state.global_step + 1, state):
            begun = time.perf_counter()
            self._gauge.take()
            self.seconds += time.perf_counter() - begun

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the policy, so that the checkpoint of this step knows what it has decided."""
        if self._gauge is None or not self._is_due(state.global_step, state):
            return
        begun = time.perf_counter()
        if (stats := self._gauge.read(state.global_step)) is not None:
            self._ask(state, stats)
            self._write_down(state)
        self.seconds += time.perf_counter() - begun

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the number of decisions to what `StagedUnfreezing` logs."""
        super().on_log(args, state, control, **kwargs)
        if self._gauge is not None:
            kwargs["logs"]["freeze/decisions"] = self._count
            state.log_history[-1]["freeze/decisions"] = self._count

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends as `StagedUnfreezing` does."""
        super().on_train_end(args, state, control, **kwargs)
        if self._gauge is not None:
            self._gauge.close()
        self._gauge = None

    def _engine_for(self, model: nn.Module) -> StageEngine:
        return StageEngine(model, [Stage(0, all_that_trains(layer_map(model), type(self.policy).__name__))], grows=True)

    def _take_up(self, engine: StageEngine, state: TrainerState) -> None:
        """Gives engine and policy what a checkpoint knows of them; without one, what they began with."""
        opening = Stage(0, engine.stages[0].unfreeze)
        known = state.stateful_callbacks.get(RECORD)
        known = known if isinstance(known, Mapping) and "policy" in known else {}
        parameters = recorded([opening], state.max_steps, None, engine.union)["parameters"]
        same = known.get("parameters") == parameters  # else the caller tells what differs
        engine.stages = tuple(Stage(**own) for own in known["stages"]) if same else (opening,)
        self._stages = None
        before = known.get("policy", {})
        self._resumes = before.get("name") == type(self.policy).__name__
        self._count = before.get("decisions", 0)
        self._kept = dict(before.get("measured", {}))
        self.policy.load_state_dict(before["state"] if self._resumes else copy.deepcopy(self._beginning))

    def _is_due(self, step: int, state: TrainerState) -> bool:
        return step % self.policy.every == 0 and step < state.max_steps

    def _ask(self, state: TrainerState, stats: LayerStats | None) -> None:
        """Asks the policy, and passes what the main process's has decided on to the engine."""
        assert self.engine is not None and stats is not None
        decision = self.policy.decide(stats)
        if not isinstance(decision, Decision):
            raise PolicyError(f"{type(self.policy).__name__} has decided {decision!r}: return a Decision.")
        decision = of_main_process(decision)
        if (stage := stage_of(decision, self.engine, stats.step)) is None:
            return
        self.engine.extend(stage)
        self._stages = None
        self._count += 1
        self.decisions.append((stats.step, decision))
        state.log_history.append({**_entry(decision, stage), "epoch": state.epoch, "step": stats.step})
        if state.is_world_process_zero:
            tqdm.write(f"step {stats.step}: {type(self.policy).__name__}: {decision.reason}")

    def _write_down(self, state: TrainerState) -> None:
        """Puts decisions and the policy's state where the next checkpoint takes them from."""
        assert self.engine is not None
        if self._stages is None:
            self._stages = recorded(self.engine.stages, state.max_steps, None, self.engine.union)
        state.stateful_callbacks[RECORD] = {
            **self._stages,
            "policy": {
                "name": type(self.policy).__name__,
                "decisions": self._count,
                "state": copy.deepcopy(self.policy.state_dict()),
                "measured": self._kept,  # the gauge may fill it before the next checkpoint
            },
        }


def stage_of(decision: Decision, engine: StageEngine, step: int) -> Stage | None:
    """Returns the stage that carries a decision out from a step on; None where it changes nothing.

    Raises:
        PolicyError: nothing would train.
        SelectorError: a selector that matches nothing.
    """
    if not decision.changes:
        return None
    layers, now = layer_map(engine.model), engine.planned[-1].trainable

    def named(selector: str | None) -> frozenset[str]:
        return frozenset(select(layers, selector)) & engine.union if selector else frozenset()

    goes = named(decision.freeze)
    comes = named(decision.unfreeze) - now - goes
    goes &= now
    trains = (now | comes) - goes
    if not trains:
        raise PolicyError(f"Nothing would train from step {step} on: {decision.reason!r} freezes {decision.freeze!r}.")
    factors = {name: factor for selector, factor in decision.scale.items() for name in named(selector) & trains}
    if not (goes or comes or factors):
        return None
    begins = comes | factors.keys()
    if engine.planned[-1].step == step:  # what is decided takes that stage's place
        begins, goes = engine.union, engine.union - trains
    rates: dict[float, set[str]] = {}
    for name, factor in factors.items():
        rates.setdefault(engine.rates[name] * factor, set()).add(name)
    return Stage(
        f"{step} steps",
        unfreeze=selector_of(layers, begins) or None,
        freeze=selector_of(layers, goes) or None,
        lr={selector_of(layers, names): rate for rate, names in rates.items()} or None,
    )


def _entry(decision: Decision, stage: Stage) -> dict[str, Any]:
    """Returns what the log history tells of a decision."""
    said = {
        "freeze/decision": decision.reason,
        "freeze/freezes": stage.freeze,
        "freeze/unfreezes": decision.unfreeze,
        "freeze/scale": dict(decision.scale),
        "freeze/statistics": dict(decision.statistics),
        "freeze/threshold": decision.threshold,
    }
    return {key: value for key, value in said.items() if value not in (None, {})}
