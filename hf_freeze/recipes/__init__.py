"""Recipes: one YAML for a whole run. The presets lie beside this file."""

from .parts import Cache as Cache
from .parts import TextSource as TextSource
from .recipe import Recipe as Recipe
