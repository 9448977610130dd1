"""`hf-freeze report`: what it writes and prints, and that a mistake ends in one line with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from training import make_trainer

from hf_freeze import RunRecorder, Stage, StagedUnfreezing, cli


@pytest.fixture
def hf_freeze(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-freeze", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path, capsys):
    stages = [Stage(0, "head"), Stage("2 steps", "layers[-1]")]
    make_trainer(tmp_path / "out", StagedUnfreezing(stages), RunRecorder()).train()
    capsys.readouterr()
    return tmp_path / "out"


def test_the_report_is_written_into_the_folder(folder, hf_freeze):
    assert hf_freeze("report", folder) == (0, f"The report is in {folder}/report.html: open it in a browser.\n", "")
    assert "<svg" in (folder / "report.html").read_text()


def test_the_report_is_written_where_it_is_told_and_json_stands_alone(folder, hf_freeze, tmp_path):
    code, out, err = hf_freeze("report", folder, "--output", tmp_path / "page.html", "--json")
    short = json.loads(out)
    assert (code, err) == (0, "")
    assert short["report"] == str(tmp_path / "page.html")
    assert [(stage["first"], stage["end"]) for stage in short["stages"]] == [(0, 2), (2, 6)]
    assert (tmp_path / "page.html").exists() and not (folder / "report.html").exists()


def test_a_folder_without_a_run_is_one_line(hf_freeze, tmp_path):
    code, out, err = hf_freeze("report", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and "holds neither record.jsonl nor" in err and err.count("\n") == 1


def test_reading_a_run_needs_no_torch(folder):
    code = (
        f"import sys; from hf_freeze.report.html import write_report; write_report({str(folder)!r}); "
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
