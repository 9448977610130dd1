"""hf_freeze: freeze, adapt and unfreeze pretrained transformers models.

The public names are loaded when they are first used, so that importing hf_freeze costs next to nothing. The PEFT method
BOTTLENECK is registered at once where PEFT has been imported, else when it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_with_peft

__version__ = "0.1.0"

_HOMES = {
    "adapters": ["BottleneckConfig"],
    "adapters.adapterhub": ["load_adapterhub", "save_adapterhub"],
    "adapters.fusion": ["average_adapters"],
    "auditing": ["AuditCallback", "AuditReport", "Finding", "audit"],
    "cache": ["PrefixCache"],
    "callbacks": ["StagedUnfreezing"],
    "certify": ["CertifyCallback", "certify_frozen"],
    "checkpoints": ["last_whole_checkpoint"],
    "conditions": ["on_plateau"],
    "engine": ["attach_schedule"],
    "errors": ["FreezeError"],
    "freezing": ["freeze", "freeze_until", "frozen_modules", "unfreeze"],
    "layers": ["LayerMap", "Segment", "layer_map"],
    "optim": ["parameter_groups"],
    "planning": ["Plan", "fits", "plan"],
    "policies": [
        "AdaptiveFreezing",
        "AttentionFreezing",
        "Decision",
        "FreezePolicy",
        "GradientNormFreezing",
        "LayerStats",
        "LisaSampling",
        "PlasticityFreezing",
        "RelativeGradientTuning",
    ],
    "recipes": ["Recipe"],
    "report.html": ["write_report"],
    "report.plots": ["plot_run"],
    "report.recording": ["RunRecorder"],
    "schedules": ["UnfreezeSchedule"],
    "searching": ["SearchBudget", "SearchPoint", "SearchResult", "SearchSpace", "search"],
    "selectors": ["select"],
    "stages": ["Sample", "Stage"],
    "summary": ["trainable_summary"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from .adapters import BottleneckConfig as BottleneckConfig
    from .adapters.adapterhub import load_adapterhub as load_adapterhub
    from .adapters.adapterhub import save_adapterhub as save_adapterhub
    from .adapters.fusion import average_adapters as average_adapters
    from .auditing import AuditCallback as AuditCallback
    from .auditing import AuditReport as AuditReport
    from .auditing import Finding as Finding
    from .auditing.audit import audit as audit
    from .cache import PrefixCache as PrefixCache
    from .callbacks import StagedUnfreezing as StagedUnfreezing
    from .certify import CertifyCallback as CertifyCallback
    from .certify import certify_frozen as certify_frozen
    from .checkpoints import last_whole_checkpoint as last_whole_checkpoint
    from .conditions import on_plateau as on_plateau
    from .engine import attach_schedule as attach_schedule
    from .errors import FreezeError as FreezeError
    from .freezing import freeze as freeze
    from .freezing import freeze_until as freeze_until
    from .freezing import frozen_modules as frozen_modules
    from .freezing import unfreeze as unfreeze
    from .layers import LayerMap as LayerMap
    from .layers import Segment as Segment
    from .layers import layer_map as layer_map
    from .optim import parameter_groups as parameter_groups
    from .planning import Plan as Plan
    from .planning import fits as fits
    from .planning import plan as plan
    from .policies import AdaptiveFreezing as AdaptiveFreezing
    from .policies import AttentionFreezing as AttentionFreezing
    from .policies import Decision as Decision
    from .policies import FreezePolicy as FreezePolicy
    from .policies import GradientNormFreezing as GradientNormFreezing
    from .policies import LayerStats as LayerStats
    from .policies import LisaSampling as LisaSampling
    from .policies import PlasticityFreezing as PlasticityFreezing
    from .policies import RelativeGradientTuning as RelativeGradientTuning
    from .recipes import Recipe as Recipe
    from .report.html import write_report as write_report
    from .report.plots import plot_run as plot_run
    from .report.recording import RunRecorder as RunRecorder
    from .schedules import UnfreezeSchedule as UnfreezeSchedule
    from .searching import SearchBudget as SearchBudget
    from .searching import SearchPoint as SearchPoint
    from .searching import SearchResult as SearchResult
    from .searching import SearchSpace as SearchSpace
    from .searching import search as search
    from .selectors import select as select
    from .stages import Sample as Sample
    from .stages import Stage as Stage
    from .summary import trainable_summary as trainable_summary


register_with_peft()


def __getattr__(name: str) -> Any:
    home = "auto" if name.startswith("AutoFreezeModel") else _HOME_OF.get(name)  # one for each auto class there is
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
