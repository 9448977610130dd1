"""What a run will take, before it is started: parameters, memory, operations; and what fits into some memory.

A room of its own: models without numbers (`unloaded.py`), a step followed (`step.py`), what comes of it (`costs.py`),
and the two questions that a user asks (`planner.py`, `fitting.py`).
"""

from .costs import CacheCosts, Costs, Plan, SegmentCosts, StageCosts
from .fitting import Fit, fits
from .planner import plan

__all__ = ["CacheCosts", "Costs", "Fit", "Plan", "SegmentCosts", "StageCosts", "fits", "plan"]
