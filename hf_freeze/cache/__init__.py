"""The cache of what a frozen prefix puts out: `PrefixCache`, and what it is made of.

keys.py      a batch's rows and their keys
storage.py   where rows are kept: memory, then memory-mapped files
prefix.py    which layers make up the prefix, and whether their output can be kept
replay.py    running the prefix alone, and the model without it
callback.py  `PrefixCache`
"""

from .callback import PrefixCache

__all__ = ["PrefixCache"]
