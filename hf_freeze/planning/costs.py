"""What training takes, as numbers and as a table.

What lives here: `Costs`, `Plan` and what they are made of. What may not: models, counting. How data
passes through:

    numbers of a step -> Costs, of this plan, of full fine-tuning, of LoRA -> Plan -> rich table, text, HTML or JSON
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..cache.codecs import STORED, encoded_bytes, require_dtype
from ..rendering import printed
from ..sizes import as_size

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class Costs:
    """What one training step takes.

    Attributes:
        parameters: Of the model (scalars), tied ones once.
        trainable: Those of them that train.
        weights: Bytes of parameters and buffers.
        gradients: Bytes of gradients.
        state: Bytes of the optimizer's state.
        activations: Bytes that are kept from the forward pass for the backward pass.
        forward: Floating-point operations of the forward pass.
        backward: Of the backward pass.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    state: int
    activations: int
    forward: int
    backward: int

    @property
    def share(self) -> float:
        """The part of the parameters that trains, from 0 to 1."""
        return self.trainable / self.parameters

    @property
    def memory(self) -> int:
        """Bytes of all four: what is held at the end of the forward pass of a step, gradients included."""
        return self.weights + self.gradients + self.state + self.activations

    @property
    def operations(self) -> int:
        """Floating-point operations of both passes."""
        return self.forward + self.backward

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers, sums included."""
        return {**asdict(self), "share": self.share, "memory": self.memory, "operations": self.operations}


@dataclass(frozen=True)
class SegmentCosts:
    """What a segment takes: parameters, bytes of activations, floating-point operations of both passes."""

    segment: str
    parameters: int
    trainable: int
    activations: int
    forward: int
    backward: int


@dataclass(frozen=True)
class StageCosts:
    """What trains in a stage of a schedule, and what it takes."""

    start: str
    trains: str
    costs: Costs


@dataclass(frozen=True)
class CacheCosts:
    """What a cache of a frozen prefix's output would hold.

    Attributes:
        prefix: What is frozen up to the first part that trains.
        tokens: Of a row.
        width: Numbers for a token.
    """

    prefix: str
    tokens: int
    width: int

    def token_bytes(self, dtype: str = "float32") -> int:
        """Returns the bytes of a token's hidden states; in int8 with a scale for each token.

        Raises:
            CacheError: a dtype that a cache does not hold.

        >>> CacheCosts("embeddings, layers[0]", tokens=128, width=384).token_bytes("int8")
        388
        """
        return encoded_bytes((1, self.width), require_dtype(dtype, STORED, "dtype"))

    def row_bytes(self, dtype: str = "float32") -> int:
        """Returns the bytes of a row."""
        return self.tokens * self.token_bytes(dtype)


@printed
@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will take, before it is started; beside it full fine-tuning, and LoRA with as many parameters.

    Attributes:
        model_class: The class of the model.
        trains: What trains, segment by segment: in the stage that takes the most memory, where there are stages.
        batch_size: Rows of a step.
        length: Tokens of a row; None for a model that reads no tokens.
        dtype: Of the weights.
        optimizer: ``"adamw"`` or ``"sgd"``.
        costs: What a step takes: in the stage that takes the most memory.
        segments: The same by segment, in depth order; last, ``rest``, what no segment holds, such as the loss.
        stages: All stages of a schedule; none without one.
        full: What full fine-tuning takes.
        lora: What LoRA on all linear layers takes, with a rank that brings its number of trainable parameters nearest;
            None where that takes factors larger than the matrices themselves, or there are no linear layers.
        lora_rank: That rank.
        cache: What a cache of the frozen prefix would hold; None where no layer is frozen in one.
    """

    model_class: str
    trains: str
    batch_size: int
    length: int | None
    dtype: str
    optimizer: str
    costs: Costs
    segments: tuple[SegmentCosts, ...]
    stages: tuple[StageCosts, ...]
    full: Costs
    lora: Costs | None
    lora_rank: int | None
    cache: CacheCosts | None

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data, for JSON: bytes, and floating-point operations."""
        plain = asdict(self)
        for name in ("costs", "full", "lora"):
            own = getattr(self, name)
            plain[name] = own and own.to_dict()
        for stage, own in zip(plain["stages"], self.stages, strict=True):
            stage["costs"] = own.costs.to_dict()
        if self.cache:
            plain["cache"]["token_bytes"] = {dtype: self.cache.token_bytes(dtype) for dtype in STORED}
            plain["cache"]["row_bytes"] = {dtype: self.cache.row_bytes(dtype) for dtype in STORED}
        return plain

    def __rich__(self) -> Group:
        from rich.console import Group

        parts = [self._comparison(), self._by_segment()]
        if self.stages:
            parts.append(self._by_stage())
        return Group(*parts)

    def _comparison(self) -> Table:
        from rich.table import Table

        shape = f"{self.batch_size} rows" + (f" of {self.length} tokens" if self.length else "")
        table = Table(
            title=f"{self.model_class}: {shape}, {self.dtype}, {self.optimizer}\ntrains: {self.trains}",
            caption=self._cache_line(),
        )
        table.add_column("a step takes")
        columns = {"this plan": self.costs, "full fine-tuning": self.full}
        if self.lora:
            columns[f"LoRA, rank {self.lora_rank}"] = self.lora
        for heading in columns:
            table.add_column(heading, justify="right")
        for title, cells in _rows([*columns.values()]).items():
            table.add_row(title, *cells, end_section=title in ("trainable", "memory, all four"))
        return table

    def _cache_line(self) -> str | None:
        if not self.cache:
            return None
        sizes = " or ".join(f"{as_size(self.cache.row_bytes(dtype))} in {dtype}" for dtype in ("float32", "int8"))
        return f"a cache of {self.cache.prefix}: {sizes} a row"

    def _by_segment(self) -> Table:
        from rich.table import Table

        table = Table()
        table.add_column("segment", overflow="fold")
        for heading in ("parameters", "trainable", "activations", "forward FLOPs", "backward FLOPs"):
            table.add_column(heading, justify="right")
        for own in self.segments:
            numbers = (f"{own.parameters:,}", f"{own.trainable:,}", as_size(own.activations))
            table.add_row(own.segment, *numbers, as_count(own.forward), as_count(own.backward))
        return table

    def _by_stage(self) -> Table:
        from rich.table import Table

        table = Table()
        for heading in ("stage", "from", "trains", "trainable", "memory", "FLOPs"):
            table.add_column(heading, justify="left" if heading in ("from", "trains") else "right", overflow="fold")
        for number, own in enumerate(self.stages, start=1):
            costs = (f"{own.costs.trainable:,}", as_size(own.costs.memory), as_count(own.costs.operations))
            table.add_row(str(number), own.start, own.trains, *costs)
        return table


def _rows(columns: list[Costs]) -> Mapping[str, list[str]]:
    """Returns the cells of each row of the comparison."""
    sizes = {"weights": "weights", "gradients": "gradients", "optimizer state": "state", "activations": "activations"}
    counts = {"forward FLOPs": "forward", "backward FLOPs": "backward", "FLOPs, both": "operations"}
    return {
        "parameters": [f"{own.parameters:,}" for own in columns],
        "trainable": [f"{own.trainable:,} ({own.share:.2%})" for own in columns],
        **{title: [as_size(getattr(own, name)) for own in columns] for title, name in sizes.items()},
        "memory, all four": [as_size(own.memory) for own in columns],
        **{title: [as_count(getattr(own, name)) for own in columns] for title, name in counts.items()},
    }


def as_count(count: int) -> str:
    """Returns a number of operations as text.

    >>> as_count(21_300_000_000), as_count(0)
    ('21.3 G', '0')
    """
    powers = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
    unit = max((name for name, own in powers.items() if count >= own), key=powers.__getitem__, default="")
    return f"{count / powers[unit]:.1f} {unit}" if unit else str(count)
