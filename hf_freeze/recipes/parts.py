"""Parts of a recipe that have fields of their own.

What lives here: `TextSource`, the texts of a run, and `Cache`, whether frozen layers are computed once. What may not:
reading texts (`data.py`) and caching (`cache/`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..adapters import BottleneckConfig
from ..errors import RecipeError
from ..sizes import read_size
from ..stages import is_count
from .reading import require_types

Kept = Literal["float32", "bfloat16", "float16", "int8"]
Computed = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TextSource:
    """Where the texts of a run come from, as `data.load_corpus` takes it.

    Args:
        name: A folder of texts, a CSV, TSV or JSON file, the name of a data set on the hub, or ``embedded``.
        text_column: The column that holds the text.
        label_column: The column that holds the label.
        limit: At most so many training texts, each class in its share.

    Raises:
        RecipeError: a field of another type, or a limit that is no number of texts.
    """

    name: str
    text_column: str = "text"
    label_column: str = "label"
    limit: int | None = None

    def __post_init__(self) -> None:
        require_types(vars(self), TextSource, "dataset.")
        if self.limit is not None and not is_count(self.limit, least=1):
            raise RecipeError(f"dataset.limit is {self.limit}: write a number of training texts from 1.")


@dataclass(frozen=True)
class Cache:
    """How the output of frozen layers is kept, as `PrefixCache` takes it.

    Args:
        dtype: What the outputs are kept in; ``float32`` is bit-identical to a run without a cache.
        prefix_dtype: What the frozen layers compute in while they fill the cache; None for the model's own.
        memory: How much is kept in memory, such as ``2GiB``; what is beyond it lies on disk.
        folder: Where on disk; None for a temporary folder.

    Raises:
        RecipeError: a field of another type, or a memory that is no size.
    """

    dtype: Kept = "float32"
    prefix_dtype: Computed | None = None
    memory: str = "2GiB"
    folder: str | None = None

    def __post_init__(self) -> None:
        require_types(vars(self), Cache, "cache.")
        if read_size(self.memory) is None:
            raise RecipeError(f"cache.memory is {self.memory!r}: write a size, such as '2GiB' or '500MiB'.")


def said(part: TextSource | Cache) -> dict[str, Any]:
    """Returns what a part says other than the defaults.

    >>> said(TextSource("films.csv", limit=8))
    {'name': 'films.csv', 'limit': 8}
    """
    defaults = {field.name: field.default for field in fields(part)}
    return {key: own for key, own in asdict(part).items() if own != defaults[key]}


def adapter_fields() -> list[str]:
    """Returns the fields of an adapter that a recipe may say: ours, without what is written on saving."""
    return [name for name in BottleneckConfig.__annotations__ if name != "record"]
