"""AdapterHub's options, and what they are in a `BottleneckConfig`.

What lives here: `HubOptions`, all options of a bottleneck in `adapters` 1.3.0, and their translation both ways. What
may not: files, weights, models. How data passes through:

    the object "config" in adapter_config.json -> HubOptions -> BottleneckConfig -> HubOptions

An option that changes what an adapter computes is translated exactly or refused by name; one that only chose the start
of training is left aside, since the trained weights are in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from ..errors import AdapterError, nearest
from ..layers import LayerMap
from .config import BottleneckConfig

INIT = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
# (original_ln_before, original_ln_after, residual_before_ln) by placement; None where the option changes nothing
RESIDUALS: dict[str, tuple[bool | None, bool, bool | None]] = {
    "parallel": (None, True, None),
    "houlsby": (False, True, None),
    "pfeiffer": (True, True, True),
    "layer": (True, False, False),
}
# In files of older versions, and without effect in 1.3.0
_OLD = {"new_attention_norm", "attention_type", "invertible_adapter"}
_WIDEST = 2**20  # a bottleneck beyond it is a mistake in the file
# Compacter as `BottleneckConfig` has it; `adapters` can also factorise the rule, share W, or leave out the bias
_COMPACTER = {
    "shared_phm_rule": True, "factorized_phm_rule": False, "factorized_phm_W": True, "shared_W_phm": False,
    "learn_phm": True, "phm_bias": True,
}  # fmt: skip


@dataclass(frozen=True)
class HubOptions:
    """The options of a bottleneck, as `adapters.BnConfig` 1.3.0 has them: same names, same defaults.

    Raises:
        AdapterError: an option has a value of another type.
    """

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | dict
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list | None = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool | None = True
    shared_W_phm: bool | None = False
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for index in self.leave_out or ():
            _check_type("leave_out", index, int)
        if isinstance(self.reduction_factor, dict):
            for factor in self.reduction_factor.values():
                _check_type("reduction_factor", factor, float)


def _check_type(name: str, value: Any, hint: Any) -> None:
    accepted = get_args(hint) or (hint,)
    if type(value) not in accepted and not (type(value) is int and float in accepted):
        kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in accepted)
        raise AdapterError(f"Adapter config: {name}={value!r} is no {kinds}. Save the adapter again.")


def read_options(content: Any) -> HubOptions:
    """Returns the options in the object ``config`` of an `adapter_config.json`.

    Raises:
        AdapterError: it is no bottleneck's config, has an option that is unknown, or lacks one.
    """
    if not isinstance(content, Mapping):
        raise AdapterError(
            f"Adapter config: 'config' is {content!r}, not an object of options. Save the adapter again."
        )
    if content.get("architecture") is not None:
        raise AdapterError(
            f"The adapter is no bottleneck but {content['architecture']!r}. Train it anew, with PEFT's own methods."
        )
    if content.get("invertible_adapter"):  # how version 1 wrote inv_adapter
        content = {"inv_adapter": "nice", **content}
    known = {option.name for option in fields(HubOptions)}
    if unknown := [name for name in content if name not in known | _OLD | {"architecture"}]:
        raise AdapterError(
            f"Adapter config: option {unknown[0]!r} is unknown, so its outputs can't be reproduced."
            f"{nearest(unknown[0], known)} Known are those of `adapters` 1.3.0."
        )
    try:
        return HubOptions(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:  # names the missing ones
        raise AdapterError(f"Adapter config: {str(error).split('__() ')[-1]}. Save the adapter again.") from None


def to_config(options: HubOptions, layers: LayerMap, width: int) -> BottleneckConfig:
    """Returns the `BottleneckConfig` of the adapter that `options` describe.

    Args:
        options: The options.
        layers: The layers of the model.
        width: The width d of its hidden states.

    Raises:
        AdapterError: an option has no counterpart; the message names it.
    """
    _refuse(options, width)
    return BottleneckConfig(
        reduction_factor=_reduction(options, layers, width),
        placement=_placement(options),  # type: ignore[arg-type]
        activation={"leakyrelu": "leaky_relu"}.get(options.non_linearity.lower(), options.non_linearity.lower()),
        scaling=options.scaling,
        init=INIT[options.init_weights],  # type: ignore[arg-type]
        dropout=options.dropout,
        # the parallel adapters of `adapters` never apply it
        stochastic_depth=0.0 if options.is_parallel else options.stochastic_depth or 0.0,
        layer_norm_before=options.ln_before,
        layer_norm_after=options.ln_after,
        gating=options.use_gating,
        cross_attention=options.cross_adapter,
        phm_dim=options.phm_dim if options.phm_layer else None,
        phm_rank=options.phm_rank or 1,
        layers=_selector(options, layers),
    )


def _refuse(options: HubOptions, width: int) -> None:
    """Refuses what has no counterpart, apart from the residuals."""
    if options.inv_adapter is not None:
        raise AdapterError(
            f"inv_adapter={options.inv_adapter!r} is an invertible adapter on the embeddings, which hf_freeze has not. "
            f"Train the adapter anew, without it."
        )
    if options.ln_after and options.adapter_residual_before_ln and not options.is_parallel:
        raise AdapterError(
            "adapter_residual_before_ln=True normalises the sum of the adapter and its residual, where hf_freeze "
            "normalises what the adapter adds. Train the adapter anew, without it."
        )
    if options.phm_layer and (odd := [name for name, value in _COMPACTER.items() if getattr(options, name) != value]):
        raise AdapterError(
            f"{odd[0]}={getattr(options, odd[0])}: hf_freeze has Compacter with {odd[0]}={_COMPACTER[odd[0]]} alone. "
            f"Train the adapter anew."
        )
    if options.phm_layer and (
        options.phm_dim < 1 or width % options.phm_dim or not 1 <= (options.phm_rank or 1) <= width
    ):
        raise AdapterError(
            f"Adapter config: phm_dim={options.phm_dim}, phm_rank={options.phm_rank} fit no layer of width {width}. "
            f"Save the adapter again."
        )
    if options.init_weights not in INIT:
        raise AdapterError(f"init_weights={options.init_weights!r} is unknown. `adapters` 1.3.0 has {', '.join(INIT)}.")


def _placement(options: HubOptions) -> str:
    """Returns the placement whose arithmetic is that of the options."""
    residuals = (options.original_ln_before, options.original_ln_after, options.residual_before_ln)
    for placement, wanted in RESIDUALS.items():
        same_residuals = all(want in (None, given) for want, given in zip(wanted, residuals, strict=True))
        if placement == "houlsby" and options.residual_before_ln not in (True, False):
            continue
        same_places = options.output_adapter and options.mh_adapter == (placement == "houlsby")
        if same_places and same_residuals and options.is_parallel == (placement == "parallel"):
            if options.cross_adapter and placement != "houlsby":
                raise AdapterError(
                    f"cross_adapter=True has no counterpart with placement {placement!r}, only with 'houlsby'. "
                    f"Train the adapter anew."
                )
            return placement
    names = (
        "mh_adapter", "output_adapter", "is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln",
    )  # fmt: skip
    said = ", ".join(f"{name}={getattr(options, name)}" for name in names)
    raise AdapterError(
        f"No placement computes the same as {said}. hf_freeze has {', '.join(RESIDUALS)}. Train the adapter anew."
    )


def size_of(width: int, factor: float) -> int:
    """Returns the bottleneck's width m in `adapters`, which rounds the quotient down.

    Raises:
        AdapterError: there is no such bottleneck.

    >>> size_of(32, 0.1)
    319
    """
    if not (0 < factor < math.inf and width / factor <= _WIDEST):  # not a number either
        raise AdapterError(f"Adapter config: reduction_factor={factor} makes no bottleneck. Save the adapter again.")
    return max(1, int(width // factor))


def factor_of(width: int, size: int, factor: Any = None) -> float:
    """Returns a reduction factor that gives the bottleneck's width `size` there and here: `factor` itself if it does.

    >>> factor_of(384, 24, 16), factor_of(384, 48), factor_of(32, 5)
    (16, 8.0, 5.818181818181818)
    """
    for candidate in (factor, width / size):
        if isinstance(candidate, int | float) and size_of(width, candidate) == max(1, int(width / candidate)) == size:
            return candidate
    return width / (size + 0.5)  # so far from a whole number that no rounding error matters


def _reduction(options: HubOptions, layers: LayerMap, width: int) -> float | dict[str, float]:
    """Returns the reduction factors; `adapters` counts layers through all stacks, from 0."""
    factors = options.reduction_factor
    if not isinstance(factors, dict):
        return factor_of(width, size_of(width, factors), factors)
    by_layer = {
        segment.name: factor_of(width, size_of(width, factors[str(index)]), factors[str(index)])
        for index, segment in enumerate(layers.layers)
        if str(index) in factors
    }
    if "default" in factors:
        by_layer["layers"] = factor_of(width, size_of(width, factors["default"]), factors["default"])
    return by_layer


def _selector(options: HubOptions, layers: LayerMap) -> str:
    left_out = set(options.leave_out or ())
    return " - ".join(["layers", *(s.name for index, s in enumerate(layers.layers) if index in left_out)])


def from_config(config: BottleneckConfig, sizes: Mapping[int, int], count: int, width: int) -> HubOptions:
    """Returns the options of the adapter that `config` describes.

    Args:
        config: The config.
        sizes: The bottleneck's width in each layer that has one, by the layer's number through all stacks.
        count: How many layers the model has.
        width: The width d of its hidden states.

    Raises:
        AdapterError: AdapterHub has no counterpart.
    """
    if config.fusion:
        raise AdapterError("An AdapterFusion has a format of its own in AdapterHub. Save with `save_pretrained`.")
    before, after, residual = RESIDUALS[config.placement]
    is_compacter = config.phm_dim is not None
    return HubOptions(
        mh_adapter=config.placement == "houlsby",
        output_adapter=True,
        reduction_factor=_written_factors(config, sizes, width),
        non_linearity=config.activation,
        original_ln_before=bool(before),
        original_ln_after=after,
        residual_before_ln=residual is not False,
        ln_before=config.layer_norm_before,
        ln_after=config.layer_norm_after,
        init_weights={ours: theirs for theirs, ours in INIT.items()}[config.init],
        is_parallel=config.placement == "parallel",
        scaling=config.scaling if isinstance(config.scaling, str) else float(config.scaling),
        use_gating=config.gating,
        cross_adapter=config.placement == "houlsby" and config.cross_attention,
        leave_out=[index for index in range(count) if index not in sizes],
        dropout=config.dropout,
        phm_layer=is_compacter,
        phm_dim=config.phm_dim if config.phm_dim is not None else 4,
        phm_rank=config.phm_rank,
        stochastic_depth=config.stochastic_depth,
    )


def _written_factors(config: BottleneckConfig, sizes: Mapping[int, int], width: int) -> float | dict[str, float]:
    given = None if config.bottleneck_size else config.reduction_factor
    candidates = list(given.values()) if isinstance(given, dict) else [given]
    factors = {
        index: next((f for f in candidates if f and factor_of(width, size, f) == f), factor_of(width, size))
        for index, size in sizes.items()
    }
    if len(set(factors.values())) == 1:
        return next(iter(factors.values()))
    return {str(index): factor for index, factor in factors.items()}
