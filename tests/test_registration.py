"""BOTTLENECK is known to PEFT in any order of imports, and hf_freeze does not import PEFT for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = "from peft import PeftType, get_peft_config; get_peft_config({'peft_type': PeftType.BOTTLENECK})"


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_freeze, peft",
        "import peft, hf_freeze",
        "import hf_freeze; from peft import PeftModel",
        "import hf_freeze, importlib.util; importlib.util.find_spec('peft'); import peft",
        "from hf_freeze import BottleneckConfig",
        "import hf_freeze.adapters",
    ],
)
def test_the_method_is_registered_in_any_order(imports: str) -> None:
    run(f"{imports}; {KNOWN}")


def test_importing_hf_freeze_does_not_import_peft() -> None:
    run("import sys, hf_freeze; assert 'peft' not in sys.modules")


@pytest.mark.slow
def test_nothing_is_left_behind_in_the_import_system() -> None:
    run(
        "import sys; before = list(sys.meta_path); import hf_freeze, peft; "
        "assert [f for f in sys.meta_path if type(f).__module__.startswith('hf_freeze')] == []"
    )
