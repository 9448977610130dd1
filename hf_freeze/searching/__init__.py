"""The search for recipes: which to try, what came of each, and those that no other beats.

A room of its own: what may be tried (`space.py`), how long (`budget.py`), what comes of a trial (`judging.py`,
`pace.py`), what was found (`front.py`, `picture.py`, `files.py`), the study that all workers share (`study.py`), and
the call that a user makes (`searcher.py`). Optuna is imported by `study.py` alone, and when a search begins.
"""

from .budget import SearchBudget as SearchBudget
from .front import SearchPoint as SearchPoint
from .front import SearchResult as SearchResult
from .searcher import search as search
from .space import SearchSpace as SearchSpace
