"""Registers the PEFT method BOTTLENECK as soon as PEFT is there, without importing PEFT for it.

What lives here: an import hook for one module. PEFT takes seconds to import, which a script that only freezes should
not pay; but a script that has imported hf_freeze and then loads an adapter with PEFT or transformers needs the method.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ADAPTERS = "hf_freeze.adapters"  # importing it registers the method


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as the other finders do, and has the method registered once PEFT has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of PEFT with a loader that registers the method; None for any other module."""
        if fullname != "peft":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next((s for finder in finders if (s := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Registers the method; where this PEFT does not let it, warns, since a script that only freezes needs no PEFT."""
    try:
        importlib.import_module(ADAPTERS)
    except Exception as error:
        warnings.warn(f"hf_freeze's adapters can't be used with this PEFT: {error}", stacklevel=2)


def register_with_peft() -> None:
    """Registers BOTTLENECK now if PEFT has been imported, else when it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
