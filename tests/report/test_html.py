"""The report: one file, whole, with nothing from elsewhere, and what a run says of itself in it as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from training import make_trainer

from hf_freeze import FreezeError, RunRecorder, Stage, StagedUnfreezing, write_report
from hf_freeze.report.html import facts, in_short, page_of, stage_rows
from hf_freeze.report.reading import RecordedStage, RunRecord, read_run

STAGES = [Stage(0, "head", lr=0.05), Stage("2 steps", "layers[-1], bias", lr=0.02)]
EVIL = "<script>alert('&')</script>"
FINDING = {
    "code": "HF001", "severity": "error", "title": EVIL, "names": [f"{EVIL}.{at}" for at in range(5)],
    "cause": "No <b>.", "mend": "Unfreeze 'head' & train.",
}  # fmt: skip
CERTIFICATE = {
    "verdict": "broken", "tensors": 1234567, "bytes": 8, "changed": [EVIL],
    "begin": {"step": 0, "time": "2026-01-01T00:00:00", "sha256": "ab" * 32},
    "end": {"step": None, "time": "2026-01-01T01:00:00", "sha256": "cd" * 32},
}  # fmt: skip


class Page(HTMLParser):
    """What a page has: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            assert self.open, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}
    make_trainer(folder, StagedUnfreezing(STAGES), RunRecorder(), **options).train()
    return folder


@pytest.fixture(scope="module")
def record(folder) -> RunRecord:
    return replace(
        read_run(folder), audit={"findings": [FINDING]}, certificate=CERTIFICATE, recipe=f"freeze: '{EVIL}'\n"
    )


@pytest.fixture(scope="module")
def text(record) -> str:
    return page_of(record, title=f"a run {EVIL}")


def test_the_report_stands_beside_the_run_or_where_it_is_told(folder, tmp_path):
    assert write_report(folder) == folder / "report.html"
    assert write_report(str(folder), tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_the_page_has_nothing_from_elsewhere(text):
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
            assert not name.startswith("on")
    style = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", style + "".join(re.findall(r'style="[^"]*"', text)))
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places


def test_what_a_run_says_is_text(text):
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(EVIL) == 1 + 1 + 1 + 3 + 1 + 1  # title, heading, finding, its names, tensor, recipe
    assert "No <b>. Unfreeze 'head' & train." in page.text


def test_it_has_the_audit_the_certificate_and_the_recipe(text):
    page = Page(text).text
    assert f"{EVIL}.2 and 2 more" in page
    assert "1,234,567" in page and "cd" * 32 in page and "Frozen tensors: broken." in page
    assert f"freeze: '{EVIL}'" in page


def test_it_has_each_picture_for_a_wide_and_a_narrow_screen_in_the_pages_own_colours(text):
    assert text.count("<svg") == 2 * 5 and text.count("</svg>") == 2 * 5
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"#0[1234]0[1234]0[1234]", text)
    for variable in ("--ink", "--muted", "--grid", "--frozen"):
        assert f"var({variable})" in text
    assert "#000000" not in text  # black is lost on a dark page


def test_no_two_things_in_the_page_have_the_same_id(text):
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    assert used and used <= set(ids)


def test_the_table_of_stages_is_the_run(record):
    first, second = stage_rows(record)
    head = next(own.parameters for own in record.segments if own.name == "head")
    whole = sum(own.parameters for own in record.segments)
    assert (first.steps, first.trains, first.rates) == ("1 to 2", "head", "0.05")
    assert first.parameters == f"{head:,} ({head / whole:.2%})"
    assert (second.steps, second.trains) == ("3 to 6", "layers[2], head, parts of embeddings, layers[0:2], pooler")
    assert second.rates == "0.02 to 0.05"


def test_the_head_of_the_page_tells_how_far_the_run_came(record):
    told = dict(facts(replace(record, done=4, ended=False)))
    assert told["optimizer steps"] == "4 of 6 (did not end by itself)"
    assert told["audit"] == "1 finding"
    assert told["certificate"] == "broken"
    assert dict(facts(replace(record, audit={"findings": []})))["audit"] == "no findings"


def test_a_run_with_hundreds_of_stages_shows_some_of_them(record):
    stages = tuple(RecordedStage(at + 1, at, at + 1, {"head": 1.0}) for at in range(300))
    page = Page(page_of(replace(record, stages=stages, done=300), "long"))
    assert "And 240 stages more." in page.text


def test_without_matplotlib_the_page_has_tables_and_says_why(record, monkeypatch):
    monkeypatch.setattr("hf_freeze.report.plots.find_spec", lambda name: None)  # it is installed where tests run
    text = page_of(record, "bare")
    assert "<svg" not in text
    assert "pip install 'hf-freeze[report]'" in Page(text).text
    assert "Stages" in Page(text).text


def test_an_ordinary_run_has_a_report(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    text = write_report(tmp_path).read_text()
    assert text.count("<svg") == 2 * 2
    assert "<h2>" not in text  # neither stages nor audit, certificate, recipe


def test_an_audit_that_lacks_something_is_shown_as_far_as_it_goes(record):
    page = Page(page_of(replace(record, audit={"findings": [{"code": "HF009"}]}, certificate={}), "x")).text
    assert "HF009" in page


def test_a_report_that_can_not_be_written_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FreezeError, match=r"The report can't be written to .*Name another file"):
        write_report(folder, tmp_path / "file" / "report.html")


def test_in_short_it_is_plain_data(record):
    short = json.loads(json.dumps(in_short(record), allow_nan=False))
    assert (short["steps"], short["planned"], short["ended"]) == (6, 6, True)
    assert [stage["first"] for stage in short["stages"]] == [0, 2]
    assert short["findings"] == ["HF001"]
    assert short["certificate"] == "broken"
    assert set(short["metrics"]) == {"loss", "eval_loss"}
