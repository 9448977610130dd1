"""SmartFRZ: a small attention model reads the history of each layer and tells whether it may freeze.

What lives here: `AttentionFreezing`, the predictor, and the features that it reads. What may not: training it
(`benchmarks/train_attention_freezing.py`). How data passes through:

    statistics -> features of each layer, the same for any architecture -> the last of them -> attention -> probability
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .parts import growing, ladders
from .probing import distance
from .protocol import Decision, LayerStats, Similarity, require_between, require_counts

WEIGHTS = Path(__file__).with_name("attention.safetensors")
HISTORY = 8  # measurements that it looks at
LEAST = 3  # with fewer nothing is said
WIDTH = 16
FEATURES = ("drift", "drift of its largest", "way", "gradient of its first", "relative gradient", "depth", "time")
_SMALL = 1e-8


@dataclass(frozen=True)
class Trace:
    """What is remembered of a layer.

    Attributes:
        first: Its similarities at the first measurement.
        last: Those at the last.
        gradient: Its relative gradient at the first.
        largest: The farthest that it has moved from one measurement to the next.
        features: Of the last measurements.
    """

    first: Similarity
    last: Similarity
    gradient: float
    largest: float = 0.0
    features: Sequence[Sequence[float]] = ()

    def further(self, now: Similarity, gradient: float, depth: float, time: float) -> Trace:
        """Returns the trace with one measurement more."""
        drift = distance(now, self.last)
        largest = max(self.largest, drift)
        seen = [
            math.log10(drift + _SMALL),
            math.log10((drift + _SMALL) / (largest + _SMALL)),
            math.log10(distance(now, self.first) + _SMALL),
            math.log10((gradient + _SMALL) / (self.gradient + _SMALL)),
            math.log10(gradient + _SMALL),
            depth,
            time,
        ]
        return Trace(self.first, now, self.gradient, largest, [*self.features, seen][-HISTORY:])


class Predictor(nn.Module):
    """Attention over the last measurements of a layer, and the probability that nothing is lost if it freezes now."""

    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("spread", torch.ones(len(FEATURES)))
        self.embed = nn.Linear(len(FEATURES), WIDTH)
        self.age = nn.Parameter(torch.zeros(HISTORY, WIDTH))  # how long ago a measurement was
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """Returns logits.

        Args:
            histories: Of shape (layers, `HISTORY`, features): the last measurement last, zeros before the first.
            lengths: How many there are of each layer.
        """
        states = torch.tanh(self.embed((histories - self.mean) / self.spread) + self.age)
        missing = torch.arange(HISTORY) < HISTORY - lengths[:, None]
        scores = (self.key(states) @ self.query(states[:, -1:]).transpose(1, 2)).squeeze(-1) / WIDTH**0.5
        weights = scores.masked_fill(missing, -math.inf).softmax(-1)
        read = (weights[:, None] @ self.value(states)).squeeze(1)
        logits: Tensor = self.out(torch.cat([read, states[:, -1]], dim=-1)).squeeze(-1)
        return logits


def batch_of(histories: Sequence[Sequence[Sequence[float]]]) -> tuple[Tensor, Tensor]:
    """Returns histories as the predictor takes them."""
    padded = torch.zeros(len(histories), HISTORY, len(FEATURES))
    for row, own in enumerate(histories):
        padded[row, HISTORY - len(own) :] = torch.tensor(own)
    return padded, torch.tensor([len(own) for own in histories], dtype=torch.long)


@cache
def trained() -> Predictor:
    """Returns the predictor that comes with the package; no random number of the run is drawn for it."""
    with torch.device("meta"):
        predictor = Predictor()
    predictor.load_state_dict(safetensors.torch.load_file(WEIGHTS), assign=True)
    return predictor.eval()


def traced(traces: Mapping[str, Trace], stats: LayerStats) -> dict[str, Trace]:
    """Returns the traces of the layers that train, with one measurement more."""
    found: dict[str, Trace] = {}
    for rungs in ladders(stats.parts):
        for at, rung in enumerate(rungs):
            name = rung[-1].name
            if name not in stats.similarities or name not in stats.gradients:
                continue
            now = stats.similarities[name]
            gradient = stats.gradients[name] / max(stats.weights.get(name, 0.0), _SMALL)
            depth = at / max(1, len(rungs) - 1)
            before = traces.get(name)
            found[name] = (
                before.further(now, gradient, depth, stats.step / stats.total_steps)
                if before is not None
                else Trace(now, now, gradient)
            )
    return found


@dataclass
class AttentionFreezing:
    """Freezes the prefix of which a small attention model says that nothing is lost (SmartFRZ: Li et al. 2024).

    Of each layer l at each measurement t it reads (arXiv:2401.16720, with features instead of weights)

        x_l(t) = how far its outputs for four rows have moved since t-1, also as a share of the farthest so far, and
                 since the first measurement; norm(g) / norm(w), also as a share of the first; its depth, from 0 to 1;
                 the share of the run that is done

    and answers, by attention from the last measurement to the last eight,

        a = softmax(q(x(t)) . k(x(t-7 .. t))),    p = sigmoid(mlp(sum of a v(x), x(t)))

    From the edge of the frozen prefix up, layers freeze whose p is at least `confidence`, until the first that is not.
    Nothing is unfrozen. The model comes with the package: it was trained on full fine-tuning of the embedded model,
    where it was known of each measurement how far the layer still was from its end
    (`benchmarks/train_attention_freezing.py`).

    Where we differ: the paper reads samples of the weights; here features are such as any architecture has. Its labels
    come from the likeness (CKA) of a layer to that of a model trained to its end, ours from similarities of four rows.

    Args:
        every: Optimizer steps from one measurement to the next: a forward pass of four rows each.
        confidence: How likely it has to be that nothing is lost.

    Raises:
        PolicyError: a number out of range; in a run: inputs that can't be kept.

    Example:
        >>> from hf_freeze import AdaptiveFreezing, PrefixCache
        >>> callbacks = [AdaptiveFreezing(AttentionFreezing(every=10)), PrefixCache()]
    """

    reads: ClassVar = ("gradients", "weights", "similarities")

    every: int = 10
    confidence: float = 0.8
    _traces: dict[str, Trace] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_counts(self, every=1)
        require_between(self, 0, 1, "confidence")

    def decide(self, stats: LayerStats) -> Decision:
        """Returns which layers join the frozen prefix."""
        if not stats.similarities:
            return Decision()
        self._traces = traced(self._traces, stats)
        known = {name: own.features for name, own in self._traces.items() if len(own.features) >= LEAST}
        if not known:
            return Decision()
        with torch.no_grad():
            likely = dict(zip(known, trained()(*batch_of([*known.values()])).sigmoid().tolist(), strict=True))
        frozen = growing(stats, [name for name, own in likely.items() if own >= self.confidence])
        if not frozen:
            return Decision()
        shown = ", ".join(f"{part.name} {likely[part.name]:.1%}" for part in frozen if part.name in likely)
        return Decision(
            f"nothing is lost: probability of {shown}; threshold {self.confidence:.1%}",
            freeze=", ".join(part.selector for part in frozen),
            statistics=likely,
            threshold=self.confidence,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the trace of each layer."""
        return {"traces": {name: asdict(own) for name, own in self._traces.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was."""
        self._traces = {name: Trace(**own) for name, own in state["traces"].items()}
