"""The report as pages."""

import json
import re

import pytest
import torch

from lightning_prune.reporting import Report, Scores, SizeCheckpoint
from lightning_prune.structure import Size


@pytest.fixture
def report(make_report) -> Report:
    report = make_report()
    scores = {name: Scores.of(torch.arange(20.0), kept=range(2, 20)) for name in report.widths}
    vars(report.cuts[-1])["scores"] = scores
    report.final = Size(640, 3200, report.widths, bytes=4096)
    report.config = {"pruning_ratio": 0.2, "cuts": [["epoch", 2, 0.5], ["epoch", 4, 1.0]]}
    return report


def test_the_page_is_one_file_with_everything(report):
    beside, inside = report.pages()
    text = inside.html()
    assert [picture.name for picture in inside.pictures] == ["metric", "size", "widths", "sizes", "cut_scores"]
    assert [picture.name for picture in beside.pictures] == ["report", "sizes", "cut_scores"]
    assert text.count("<img ") == text.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing is loaded from elsewhere"
    for words in ("Before and after", "dense, after 2 of 6 epochs, not fully trained", "Widths", "Seed 7. torch 2.15"):
        assert words in text
        assert words in beside.markdown()
    for line in ("pruning_ratio: 0.2", "- [epoch, 4, 1.0]"):
        assert line in text
        assert line in beside.markdown()
    assert 'name="viewport"' in text
    assert beside.markdown().count("](") == 3


def test_scores_survive_storing(report):
    stored = json.loads(json.dumps(report.to_plain()))
    assert Report.from_plain(stored) == report
    for cut in stored["cuts"]:
        cut.pop("scores")  # as older versions wrote it
    assert Report.from_plain(stored).cuts[-1].scores == {}


def test_sizes_are_those_between_the_cuts_or_those_that_were_saved(report):
    def found(report):
        return [(one.params, one.metric, one.is_final) for one in report.networks()]

    assert found(report) == [(1000, 0.7, False), (800, 0.6, False), (640, 0.5, True)]
    report.size_checkpoints = [
        SizeCheckpoint("a", 1000, 5000, 2, 20, 0.7),
        SizeCheckpoint("b", 800, 4000, 4, 40),
        SizeCheckpoint("c", 640, 3200, 6, 60, 0.55),
    ]
    assert found(report) == [(1000, 0.7, False), (640, 0.55, True)]
    assert Report().networks() == []


def test_a_notebook_shows_the_picture_and_the_tables(report, monkeypatch):
    shown = report._repr_html_()
    assert shown.index("<img ") < shown.index("<table>")
    monkeypatch.setattr("lightning_prune.reporting.report.find_spec", lambda name: None)
    assert "<img " not in report._repr_html_()
    assert "Before and after" in report._repr_html_()
