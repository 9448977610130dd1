"""What an adapter is told to be: `BottleneckConfig`, a `peft.PeftConfig`, and the presets of the literature.

What lives here: the fields and their validation, which raises before any model has been touched. What may not: modules,
and where an adapter goes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN

from ..errors import AdapterError, nearest
from ..selectors import parse
from .peft_method import PEFT_TYPE

Placement = Literal["layer", "pfeiffer", "houlsby", "parallel"]
Init = Literal["mam", "houlsby", "bert"]
# Options of a bottleneck that would do nothing in an AdapterFusion, which has none. Sizes, activation and init would do
# nothing either, but presets set them.
_NOT_FUSED = (
    "bottleneck_size", "scaling", "dropout", "stochastic_depth", "layer_norm_before", "layer_norm_after", "gating",
    "phm_dim",
)  # fmt: skip


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _help(text: str) -> dict[str, str]:
    return {"help": text}  # where transformers' HfArgumentParser looks for it


@dataclass
class BottleneckConfig(PeftConfig):
    """A bottleneck adapter in transformer layers (Houlsby et al. 2019, arXiv:1902.00751).

    An adapter adds to hidden states of width d what it makes of an input ``u`` (..., d); m = d / reduction_factor:

        delta(u) = scaling * up(act(down(u)))        down: d -> m, up: m -> d

    Where it goes, for a sub-layer with input x and output y, ``x + y`` being normalised behind (post-norm) or not:

    | placement | what is changed |
    |---|---|
    | ``layer`` | the layer's output: ``h + delta(h)``; on every architecture |
    | ``pfeiffer`` | feed-forward: ``norm(x + y + delta(norm(x + y)))`` (Pfeiffer et al. 2021, arXiv:2005.00247) |
    | ``houlsby`` | attention and feed-forward, each: ``y + delta(y)`` |
    | ``parallel`` | feed-forward: ``y + delta(x)`` (He et al. 2022, arXiv:2110.04366, table 1) |

    Args:
        reduction_factor: d / m, or one for each part of the model: ``{"layers[:6]": 32, "layers[6:]": 8}``.
        bottleneck_size: m itself, instead of `reduction_factor`.
        placement: See above.
        activation: The nonlinearity ``act``, by its name in transformers.
        scaling: A number, ``"learned"`` (one number an adapter), or ``"channel"`` (d numbers; arXiv:2406.06820).
        init: ``"mam"``: up = 0, so that a new adapter is the identity, bit for bit (He et al. 2022); ``"houlsby"``:
            both normal with std 0.01, cut off at 0.02, close to the identity; ``"bert"``: normal with std 0.02.
        dropout: The probability with which an element of ``delta`` is zeroed in training.
        stochastic_depth: The probability with which ``delta`` is left out for a whole sample in training.
        layer_norm_before: Whether a new LayerNorm stands before ``down``.
        layer_norm_after: Whether a new LayerNorm stands behind ``up``.
        gating: Whether ``delta`` is scaled by ``mean_over_positions(sigmoid(linear(u)))`` (UniPELT, arXiv:2110.07577).
            The mean is over all positions: padding counts, and a causal model sees what comes later, so that it
            generates something else with a cache than without. Not for generation. Like `stochastic_depth`, it is
            refused where a model does not keep samples apart; a window of Swin's attention counts as a sample.
        cross_attention: With ``houlsby``: whether cross-attention gets an adapter as well.
        phm_dim: n, to make both projections sums of n Kronecker products (Compacter, arXiv:2106.04647, equation 5).
        phm_rank: The rank of the factors of these products.
        fusion: Names of loaded adapters; this one then learns to mix them by attention (AdapterFusion,
            arXiv:2005.00247, section 3.2) and has no bottleneck of its own: sizes, activation and init are theirs.
        layers: Which layers get an adapter, as a selector: ``"layers[4:]"`` drops it from the lower ones (AdapterDrop).
        modules_to_save: Modules outside the adapters that train and are saved with them, such as the classifier.
        record: Written on saving: the base tensors in the file (``thawed``), selectors of what was ``frozen`` and what
            of the base was ``trainable``, and the base model's ``config``.

    Raises:
        AdapterError: a value out of its range, with what is expected. SelectorError: a selector that can't be read.

    Example:
        >>> BottleneckConfig(bottleneck_size=48).width(384)
        48
    """

    reduction_factor: float | dict[str, float] = field(
        default=16, metadata=_help("Layer width over bottleneck width, or one a selector.")
    )
    bottleneck_size: int | None = field(default=None, metadata=_help("Bottleneck width; beats reduction_factor."))
    placement: Placement = field(
        default="layer", metadata=_help("Where adapters go: layer, pfeiffer, houlsby or parallel.")
    )
    activation: str = field(default="relu", metadata=_help("The nonlinearity, by its name in transformers."))
    scaling: float | str = field(
        default=1.0, metadata=_help("Factor on what an adapter adds: a number, 'learned' or 'channel'.")
    )
    init: Init = field(default="mam", metadata=_help("How the projections start: mam (identity), houlsby or bert."))
    dropout: float = field(default=0.0, metadata=_help("Dropout on what an adapter adds, in training."))
    stochastic_depth: float = field(
        default=0.0, metadata=_help("Probability that a sample skips the adapter, in training.")
    )
    layer_norm_before: bool = field(default=False, metadata=_help("A new LayerNorm before the bottleneck."))
    layer_norm_after: bool = field(default=False, metadata=_help("A new LayerNorm behind the bottleneck."))
    gating: bool = field(default=False, metadata=_help("A learned gate on what an adapter adds."))
    cross_attention: bool = field(default=False, metadata=_help("With houlsby: adapters behind cross-attention too."))
    phm_dim: int | None = field(
        default=None, metadata=_help("Kronecker products in each projection (Compacter); None for plain ones.")
    )
    phm_rank: int = field(default=1, metadata=_help("Rank of the factors of the Kronecker products."))
    fusion: list[str] | None = field(
        default=None, metadata=_help("Loaded adapters that this one mixes (AdapterFusion).")
    )
    layers: str = field(default="layers", metadata=_help("The layers that get an adapter, as a selector."))
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules that train and are saved besides the adapters.")
    )
    record: dict[str, Any] | None = field(
        default=None, metadata=_help("Written on saving: the state of the base model.")
    )

    def __new__(cls, *args: Any, **options: Any) -> BottleneckConfig:
        """Refuses unknown options. PEFT would leave them out with a warning when it reads a file (0.21.2).

        Raises:
            AdapterError: with the nearest names.
        """
        known = [option.name for option in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise AdapterError(
                f"BottleneckConfig has no option {unknown[0]!r}.{nearest(unknown[0], known)} Leave it out, or upgrade "
                f"hf_freeze if a later version wrote it."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_modules: Any = None  # resolved on the model; PEFT's own machinery reads it
        self.is_read = False  # from a file, and not yet put into a model
        self.shapes: dict[str, list[int]] | None = None  # of the tensors in the file that it was read beside
        self._check_words()
        self._check_types()
        self._check_sizes()
        for name in ("dropout", "stochastic_depth"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise AdapterError(f"{name}={value!r}: write a probability from 0 up to but without 1.")
        if self.scaling not in ("learned", "channel") and not (_is_number(self.scaling) and self.scaling):
            raise AdapterError(f"scaling={self.scaling!r}: write a number, 'learned' or 'channel'; not 0.")
        if self.fusion is not None and len(self.fusion) < 2:
            raise AdapterError(f"fusion={self.fusion}: name two loaded adapters or more.")
        parse(self.layers)
        self._check_effects()

    def _check_words(self) -> None:
        for name, known in (("placement", get_args(Placement)), ("init", get_args(Init)), ("activation", ACT2FN)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                choice = f" Write one of {', '.join(known)}." if len(known) < 9 else ""
                raise AdapterError(f"{name}={value!r} is unknown.{nearest(str(value), known)}{choice}")
        if any(True for _ in ACT2FN[self.activation].parameters()):
            raise AdapterError(
                f"activation={self.activation!r} has weights of its own, which would neither train nor be saved. "
                f"Choose one without, such as 'relu'."
            )

    def _check_types(self) -> None:
        for name in ("fusion", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise AdapterError(f"{name}={value!r} is a string. Write a list: {name}=[{value!r}].")
        for name in ("layer_norm_before", "layer_norm_after", "gating", "cross_attention"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name}={getattr(self, name)!r}: write True or False.")

    def _check_sizes(self) -> None:
        for name in ("bottleneck_size", "phm_dim", "phm_rank"):
            value = getattr(self, name)
            if value is None and name != "phm_rank":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AdapterError(f"{name}={value!r}: an adapter needs a size of at least 1, a whole number.")
        factors = self.reduction_factor
        if isinstance(factors, dict):
            if not factors:
                raise AdapterError("reduction_factor={}: name layers, such as {'layers[:6]': 32, 'layers[6:]': 8}.")
            for selector in factors:
                parse(selector)
        for factor in factors.values() if isinstance(factors, dict) else [factors]:
            if not (_is_number(factor) and factor > 0):
                raise AdapterError(f"reduction_factor={factor!r}: write a positive number, such as 16.")

    def _check_effects(self) -> None:
        """Refuses options that would change nothing beside the others."""
        if self.cross_attention and self.placement != "houlsby":
            raise AdapterError(
                f"cross_attention=True has no effect with placement={self.placement!r}. "
                f"Use placement='houlsby', or leave it out."
            )
        if self.phm_rank != 1 and self.phm_dim is None:
            raise AdapterError(
                f"phm_rank={self.phm_rank} has no effect without phm_dim. Add phm_dim=4, or leave it out."
            )
        if self.fusion is None:
            return
        for option in fields(self):
            if option.name in _NOT_FUSED and getattr(self, option.name) != option.default:
                raise AdapterError(
                    f"{option.name}={getattr(self, option.name)!r} has no effect with fusion: it belongs to the "
                    f"adapters that are mixed. Leave it out."
                )

    def look_into(self, folder: Path) -> None:
        """Notes the shapes of the tensors in the file beside the config: they are read after the model was changed.

        Args:
            folder: Where the config was read. Nothing is noted of one that is on the hub.

        Raises:
            AdapterError: the file can't be read.
        """
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if folder.is_dir() and not any(file.with_suffix(end).is_file() for end in (".safetensors", ".bin")):
            self.shapes = {}  # no weights are no fault of a config, unless it is loaded for them
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as tensors:
                    self.shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise AdapterError(f"{file} can't be read ({error}). Save or download the adapter again.") from error

    def width(self, hidden_size: int, reduction_factor: float | None = None) -> int:
        """Returns the bottleneck's width m for a width d = `hidden_size`; at least 1, and a multiple of `phm_dim`.

        Args:
            hidden_size: d.
            reduction_factor: The factor where it differs from part to part of the model.
        """
        factor = reduction_factor if reduction_factor is not None else self.reduction_factor
        size = self.bottleneck_size or max(1, int(hidden_size / factor))  # type: ignore[operator]
        return size if self.phm_dim is None else max(1, round(size / self.phm_dim)) * self.phm_dim

    @classmethod
    def houlsby(cls, **options: Any) -> BottleneckConfig:
        """Returns the adapter of Houlsby et al. (2019): behind attention and feed-forward, swish, d / m = 16."""
        return cls(**{"placement": "houlsby", "activation": "swish", "reduction_factor": 16, **options})

    @classmethod
    def pfeiffer(cls, **options: Any) -> BottleneckConfig:
        """Returns the adapter of Pfeiffer et al. (2021): behind feed-forward, relu, d / m = 16."""
        return cls(**{"placement": "pfeiffer", "activation": "relu", "reduction_factor": 16, **options})

    @classmethod
    def parallel(cls, **options: Any) -> BottleneckConfig:
        """Returns the adapter of He et al. (2022): beside feed-forward, relu, d / m = 2, scaled by 4."""
        return cls(**{"placement": "parallel", "activation": "relu", "reduction_factor": 2, "scaling": 4.0, **options})

    @classmethod
    def compacter(cls, **options: Any) -> BottleneckConfig:
        """Returns Compacter (Mahabadi et al. 2021): as Houlsby, of 4 rank-one Kronecker products, gelu, d / m = 32."""
        preset = {"placement": "houlsby", "activation": "gelu", "reduction_factor": 32, "phm_dim": 4}
        return cls(**{**preset, **options})


# `inspect` would go by `__new__`, which takes anything.
_init = inspect.signature(BottleneckConfig.__init__)
BottleneckConfig.__signature__ = _init.replace(parameters=[*_init.parameters.values()][1:])


def _reads_with_weights(read: Callable[..., Any]) -> Any:
    """Returns PEFT's `from_pretrained` of configs, which then looks into the file of weights beside one of ours.

    It takes the place of the base class's own: transformers 5.23 reads by `PeftConfig.from_pretrained`, whichever the
    method, and has put the adapter in when it finds that the file does not fit.
    """

    @functools.wraps(read)
    def from_pretrained(
        cls: type[PeftConfig], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        config: PeftConfig = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, BottleneckConfig):
            config.is_read = True
            if not kwargs.get("ignore_mismatched_sizes"):
                config.look_into(Path(pretrained_model_name_or_path, subfolder or ""))
        return config

    return classmethod(from_pretrained)


PeftConfig.from_pretrained = _reads_with_weights(PeftConfig.from_pretrained.__func__)
