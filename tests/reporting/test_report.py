"""What a run tells about its pruning."""

import io
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from rich.console import Console

from lightning_prune.reporting import Cut, Measurement, Report, SizeCheckpoint, Timing, plain, timed
from lightning_prune.structure import Size


def test_metrics_of_one_step_are_one_measurement():
    report = Report()
    report.log(0, 10, {"val_acc": torch.tensor(0.5)})
    report.log(0, 10, {"train_loss": 1.5, "val_acc": 0.6})
    report.log(1, 20, {"val_acc": 0.7})
    assert report.history == [
        Measurement(0, 10, {"val_acc": 0.6, "train_loss": 1.5}),
        Measurement(1, 20, {"val_acc": 0.7}),
    ]


@pytest.mark.parametrize(
    ("names", "expected", "mode"),
    [
        (["lr", "train_loss", "train_acc", "val_loss", "val_acc"], "val_acc", "max"),
        (["train_loss", "train_Accuracy", "val_loss"], "train_Accuracy", "max"),
        (["train_loss", "val/loss"], "val/loss", "min"),
        (["loss", "val_loss"], "val_loss", "min"),  # what most training steps log
        (["train_loss", "loss"], "loss", "min"),
        (["train_acc_step", "train_acc_epoch"], "train_acc_epoch", "max"),
        (["loss_bce"], "loss_bce", "min"),
        (["lr", "perplexity"], None, "max"),
        (["lr", "train_mse", "val_mse"], "val_mse", "min"),
        (["val_f1"], "val_f1", "max"),
        (["train_loss", "val_f1"], "val_f1", "max"),
        (["val_loss", "val_f1"], "val_loss", "min"),
        (["val_distance"], None, "max"),
        ([], None, "max"),
    ],
)
def test_the_metric_that_counts(names, expected, mode):
    report = Report()
    report.log(0, 1, dict.fromkeys(names, 1.0))
    assert report.main_metric == expected
    assert report.mode == mode


def test_the_metric_can_be_named():
    report = Report(metric="perplexity")
    report.log(0, 1, {"val_acc": 0.5})
    assert report.main_metric is None
    report.log(0, 1, {"perplexity": 30.0})
    assert report.main_metric == "perplexity"
    assert report.mode == "min"


def test_metric_before_a_cut_after_it_and_recovered(make_report):
    report = make_report()  # accuracies .6 .7 | .5 .6 | .4 .5
    assert report.around(report.cuts[0]) == (0.7, 0.5, 0.6)
    assert report.around(report.cuts[1]) == (0.6, 0.4, 0.5)
    assert report.outcome == (0.7, 0.5, 0.5)


@pytest.mark.parametrize("losses", [[9.0, 3.0, math.nan, 5.0], [math.nan, 9.0, 3.0, 5.0]], ids=str)
@pytest.mark.parametrize(("name", "best"), [("val_loss", 3.0), ("val_acc", 9.0)])
def test_best_at_the_final_size_is_a_number(losses, name, best):
    report = Report()
    for step, loss in enumerate(losses):
        report.log(step, step, {name: loss})
    assert report.outcome == (5.0, best, 5.0)
    assert Report().outcome == (None, None, None)


def test_a_cut_that_was_never_measured(make_report):
    report = make_report(epochs=5, cut_epochs=(1, 2))
    first, last = report.cuts
    report.history = [row for row in report.history if row.step not in (20, 50, 40, 30)]
    assert report.around(first) == (0.6, None, None)
    assert report.around(last) == (0.6, None, None)
    assert "–" in str(report)


def test_size_now(make_report):
    report = make_report(cut_epochs=())
    assert report.size is report.dense
    assert report.pruning_ratio == 0
    report = make_report()
    assert report.widths == {"net.0": 16, "net.1": 24}
    assert report.size == Size(640, 3200, {"net.0": 16, "net.1": 24})
    assert report.pruning_ratio == pytest.approx(0.2)
    report.final = Size(640, 3200, report.widths, bytes=4096, latency={1: 0.25})
    assert report.size is report.final
    assert report.metrics() == {
        "pruning/params": 640,
        "pruning/macs": 3200,
        "pruning/ratio": pytest.approx(0.2),
        "pruning/width/net.0": 16,
        "pruning/width/net.1": 24,
        "pruning/disk_bytes": 4096,
        "pruning/latency_ms/batch_1": 0.25,
    }
    assert Report().metrics() == Report().summary() == {}


def test_the_summary_has_shares_and_the_metric_of_each_network(make_report):
    report = make_report()
    numbers = report.summary()
    assert numbers.items() >= report.metrics().items()
    assert {name: numbers[name] for name in numbers.keys() - report.metrics().keys()} == {
        "pruning/params_left": 0.64,
        "pruning/macs_left": 0.64,
        "val_acc": 0.5,
        "pruning/val_acc_best": 0.5,
        "pruning/val_acc_dense": 0.7,
    }
    report.pruned_before(report.dense, Size(900, 4000, {"net.0": 18}), 1)
    assert "pruning/val_acc_dense" not in report.summary(), "of a network that was pruned already"


@pytest.mark.parametrize(
    ("step", "params", "cuts", "metric"), [(10, 1000, 0, 0.6), (20, 1000, 0, 0.7), (30, 800, 1, 0.5), (60, 640, 2, 0.5)]
)
def test_the_network_of_a_checkpoint(make_report, step, params, cuts, metric):
    found = make_report().at_step(step)  # cut after steps 20 and 40, accuracies .6 .7 | .5 .6 | .4 .5
    assert found == {"step": step, "params": params, "macs": 5 * params, "cuts": cuts, "val_acc": metric}
    assert Report().at_step(5) == {"step": 5}


def test_only_changed_groups_are_in_a_cut(make_report):
    report = make_report(cut_epochs=(2,))
    report.cuts[0].after.pop("net.1")  # type: ignore[attr-defined]
    assert report.widths == {"net.0": 18, "net.1": 30}


def test_round_trip_through_a_checkpoint(make_report):
    report = make_report()
    report.final = Size(640, 3200, report.widths, bytes=4096, latency={1: 0.25, 64: math.inf})
    report.config = {"schedule": {"start": 0.1}, "layers": ["a"]}
    file = io.BytesIO()
    torch.save(report.to_plain(), file)
    file.seek(0)
    again = Report.from_plain(torch.load(file, weights_only=True))
    assert again == report
    again.log(9, 99, {"val_acc": 1.0})
    assert again != report
    assert Report.from_plain(Report().to_plain()) == Report()


def test_a_newer_format_is_refused():
    stored = {**Report().to_plain(), "format": 99}
    with pytest.raises(ValueError, match=r"format 4 or older, got 99.*update"):
        Report.from_plain(stored)


def test_json_has_null_where_there_is_no_number(make_report, tmp_path):
    report = make_report()
    report.log(9, 99, {"val_acc": math.nan, "val_loss": -math.inf})
    report.final = Size(640, 3200, report.widths, bytes=4096, latency={64: math.nan})
    report.to_json(tmp_path / "report.json")

    def refuse(word):
        raise AssertionError(word)

    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert stored["history"][-1]["metrics"] == {"val_acc": None, "val_loss": None}
    assert stored["summary"]["pruning/params"] == 640
    assert stored["summary"]["pruning/latency_ms/batch_64"] is None
    assert stored["cuts"][0]["after"] == {"net.0": 18, "net.1": 27}
    assert stored["seed"] == 7


def test_markdown_says_what_was_won_and_lost(make_report):
    report = make_report()
    report.final = Size(640, 3200, report.widths, bytes=4096, latency={1: 0.25, 64: math.nan})
    report.config = {"pruning_ratio": 0.2}
    page = report.pages()[0].markdown()
    for line in (
        "![metrics, size and widths](report.png)",
        "| parameters | 1,000 | 640 | 64.0 % |",
        "| size on disk, KiB | 8.0 | 4.0 | 50.0 % |",
        "| latency at batch 1, ms | 0.5 | 0.25 | 50.0 % |",
        "| latency at batch 64, ms | 4 | – | – |",
        "|  | dense, after 2 of 6 epochs, not fully trained | pruned, after 6 epochs | left |",
        "| val_acc | 0.7 | 0.5 | – |",
        "| val_acc, best at the final size | – | 0.5 | – |",
        "| cut | after epoch | step | units | parameters | MACs | seconds | last before | first after | at the end |",
        "| 1 | 2 | 20 | 50 → 45 | 800 | 4,000 | 0.01 | 0.7 | 0.5 | 0.6 |",
        "| net.1 | 30 | 24 | 80.0 % |",
        "Seed 7. torch 2.15",
        "{pruning_ratio: 0.2}",
    ):
        assert line in page.splitlines(), line
    assert "20.0 % of the units are gone, in 2 cuts. 1 MAC = 2 FLOPs." in page
    assert "The dense network had trained for 2 of 6 epochs when it was first cut, so it is no baseline" in page
    assert "val_acc 0.7 (dense, after 2 of 6 epochs, not fully trained) → 0.5 (after 6 epochs)" in page
    report.cuts[0] = replace(report.cuts[0], epoch=0)
    assert "dense, after 20 of 60 steps, not fully trained" in str(report)
    report.cuts[0] = replace(report.cuts[0], step=0)
    assert "dense, before the first cut" in str(report)
    assert "trained for" not in str(report)
    report.cuts = [replace(report.cuts[1], epoch=6, step=60)]
    assert "dense, before the first cut" in str(report)
    assert "trained for" not in str(report)


def test_units_are_those_of_the_whole_network(make_report):
    report = make_report(cut_epochs=(2, 4))
    report.cuts = [replace(report.cuts[0], after={"net.0": 18}), replace(report.cuts[1], after={"net.1": 24})]
    assert [row[3] for row in report.grids()[1].rows] == ["50 → 48", "48 → 42"]


@pytest.mark.parametrize("are_pruned", [False, True])
def test_features_of_heads_are_counted_where_they_were_pruned(make_report, are_pruned):
    report = make_report(cut_epochs=(2,))
    report.dense = replace(report.dense, widths={**report.dense.widths, "net.0#head_dim": 50})
    after = {"net.0": 10, "net.1": 15, **({"net.0#head_dim": 20} if are_pruned else {})}
    report.cuts = [replace(report.cuts[0], after=after)]
    assert report.pruning_ratio == pytest.approx(0.55 if are_pruned else 0.5)
    assert report.grids()[1].rows[0][3] == ("100 → 45" if are_pruned else "50 → 25")
    assert [row[0] for row in report.grids()[-1].rows] == ["net.0", "net.1", *["net.0#head_dim"] * are_pruned]


def timed_report(old, new):
    """Of a network whose latency at batch 1 was ``(ms, spread)`` and is another one."""
    report = Report(timed(Size(100, 1000, {"a": 10}), {1: Timing(*old)}))
    report.final = timed(Size(50, 500, {"a": 5}), {1: Timing(*new)})
    return report


@pytest.mark.parametrize(
    ("old", "new", "cells"),
    [
        ((0.12345, 0.004), (0.0951, 0.0012), ("0.123 ± 0.004", "0.095 ± 0.001", "77.0 %")),
        ((134.0, 12.4), (99.96, 1.0), ("134 ± 12", "100 ± 1", "74.6 %")),
        ((1.2345678, 1e-7), (2.0, 0.05), ("1.23 ± 0.01", "2.00 ± 0.05", "162.0 %")),
        ((134.0,), (99.96,), ("130", "100", "74.6 %")),
    ],
)
def test_latency_comes_with_its_spread(old, new, cells):
    report = timed_report(old, new)
    rows = {row[0]: row[1:] for row in report.grids()[0].rows}
    assert rows["latency at batch 1, ms"] == cells
    assert ("median ± half of the interquartile range" in str(report)) is (len(old) == 2)
    assert Report.from_plain(report.to_plain()) == report


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ((0.123, 0.001), (0.115, 0.001), "0.123 ± 0.001 ms before, 0.115 ± 0.001 ms after"),  # 7 % apart
        ((0.20, 0.06), (0.12, 0.05), "0.20 ± 0.06 ms before, 0.12 ± 0.05 ms after"),
    ],
)
def test_a_latency_that_is_noise_is_left_out(old, new, words):
    page = timed_report(old, new).pages(pictures=False)[0].markdown()
    assert "| latency" not in page
    assert f"Too close to measure a difference: latency at batch 1 ({words})." in page


def test_a_masks_report_counts_zeros():
    report = Report(Size(110, 1000, {"a": 60, "b": 40}, zeros=0), what="weights")
    report.final = Size(60, 1000, {"a": 20, "b": 30}, zeros=50)
    report.cuts = [Cut.of(report.final, 0, 3, 30, {"a": 60, "b": 40}, {"a": 20, "b": 30}, 0.1)]
    report.log(3, 40, {"val_acc": 0.5})
    summary, cuts, layers = report.grids()
    rows = {row[0]: row[1:] for row in summary.rows}
    assert rows["non-zero weights"] == ("110", "60", "54.5 %")
    assert rows["zero weights (masked)"] == ("0", "50", "–")
    assert "50.0 % of the maskable weights are zero or gone, in 1 cut." in summary.note
    assert "parameters" not in str(report)
    assert dict(zip(cuts.columns, cuts.rows[0], strict=True)).items() >= {
        ("zero weights", "50"),
        ("non-zero weights", "60"),
    }
    assert layers.rows[0] == ("a", "60", "40", "20", "66.7 %")
    numbers = report.metrics()
    assert (numbers["pruning/params"], numbers["pruning/nonzero_weights"]) == (110, 60)


def test_a_network_that_was_pruned_before_has_its_own_column(make_report):
    report = make_report()
    report.pruned_before(report.dense, Size(900, 4000, {"net.0": 18}), 1)
    summary = report.grids()[0]
    assert summary.columns[1:4] == (
        "dense",
        "pruned earlier, after 2 of 6 epochs, before the first cut",
        "pruned, after 6 epochs",
    )
    rows = {row[0]: row[1:] for row in summary.rows}
    assert rows["parameters"] == ("1,000", "900", "640", "64.0 %")
    assert rows["val_acc"] == ("–", "0.7", "0.5", "–")
    assert "had trained for" not in str(report)


def test_a_network_that_nothing_was_cut_of(make_report):
    assert make_report(cut_epochs=()).grids()[0].columns == ("", "dense", "now", "left")


def test_same_figures_in_terminal_and_notebook(make_report):
    report = make_report()
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(report)
    for text in (capture.get(), str(report), report._repr_html_()):
        assert all(word in text for word in ("64.0 %", "50 → 45", "net.1", "first after", "1 MAC = 2 FLOPs"))


def test_an_empty_report_can_be_shown():
    assert str(Report()) == "nothing recorded"
    assert [page.markdown() for page in Report().pages()] == ["# Pruning report\n"] * 2
    assert Report()._repr_html_() == ""


def test_plain():
    @dataclass(frozen=True)
    class Setting:
        cuts: tuple[int, ...] = (1, 2)

    value = {1: Setting(), "t": torch.tensor(2.5), "n": np.float32(0.5), "none": None, "kind": int, "set": {3}}
    assert plain(value) == {
        "1": {"cuts": [1, 2]},
        "t": 2.5,
        "n": 0.5,
        "none": None,
        "kind": "<class 'int'>",
        "set": [3],
    }
    assert type(plain(np.float64(0.5))) is float
    assert type(plain(np.int64(5))) is int


def test_sizes_and_notes_are_shown_and_stored():
    report = Report(dense=Size(100, 1000, {"a": 10}), notes=["Cut 2 was taken back."])
    report.log(0, 5, {"val_acc": 0.5})
    report.size_checkpoints = [
        SizeCheckpoint("sizes/params=100.ckpt", 100, 1000, 1, 5, 0.5),
        SizeCheckpoint("sizes/params=40.ckpt", 40, 300, 3, 15),
    ]
    again = Report.from_plain(report.to_plain())
    assert again == report
    page = again.pages(pictures=False)[0].markdown()
    assert "| sizes/params=40.ckpt | 3 | 40 | 300 | 40.0 % | – |" in page
    assert "| sizes/params=100.ckpt | 1 | 100 | 1,000 | 100.0 % | 0.5 |" in page
    assert page.count("Cut 2 was taken back.") == 1
    stored = report.to_plain()
    del stored["notes"]  # as older versions wrote it
    stored |= {"format": 1, "rungs": stored.pop("size_checkpoints")}
    assert Report.from_plain(stored).size_checkpoints == report.size_checkpoints
    del stored["rungs"]
    assert Report.from_plain(stored).size_checkpoints == []


def test_a_step_stays_in_its_epoch() -> None:
    """After the last epoch Lightning's number is one higher; what is measured there belongs to the last step."""
    report = Report()
    report.log(4, 50, {"val_acc": 0.9})
    report.log(5, 50, {"train_acc": 0.8})
    assert [(row.epoch, dict(row.metrics)) for row in report.history] == [(4, {"val_acc": 0.9, "train_acc": 0.8})]


def test_a_latency_by_the_table_had_another_name():
    size = Size(10, 20, {"a": 2}, table_latency=1.5)
    cut = Cut.of(size, 0, 1, 2, {"a": 4}, {"a": 2}, 0.1)
    stored = Report(dense=size, start=size, cuts=[cut]).to_plain()
    beside = ("params", "macs", "memory", "table_latency", "backbone", "zeros")
    for made in stored["cuts"]:
        size_then = made.pop("size")
        made.update({name: size_then[name] for name in beside})
    for old in (stored["dense"], stored["start"], *stored["cuts"]):
        old["reckoned"] = old.pop("table_latency")
    found = Report.from_plain({**stored, "format": 2})
    assert found.dense == found.start == size
    assert found.cuts == [cut]
    assert found.size is not None
    assert found.size.table_latency == 1.5
