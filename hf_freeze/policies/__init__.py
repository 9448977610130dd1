"""Deciding what to freeze while a run goes on: one protocol, a file for each, and the callback that asks."""

from .attention import AttentionFreezing as AttentionFreezing
from .callback import AdaptiveFreezing as AdaptiveFreezing
from .gradient_norm import GradientNormFreezing as GradientNormFreezing
from .lisa import LisaSampling as LisaSampling
from .plasticity import PlasticityFreezing as PlasticityFreezing
from .protocol import Decision as Decision
from .protocol import FreezePolicy as FreezePolicy
from .protocol import LayerStats as LayerStats
from .protocol import Part as Part
from .relative_gradient import RelativeGradientTuning as RelativeGradientTuning
