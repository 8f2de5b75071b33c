"""The picture of a run."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_prune.reporting import Cut, Report, Scores, report_figure
from lightning_prune.reporting.plots import _Clock, panel_figures, scores_figure
from lightning_prune.structure import Size


def draw(report):
    """Axes of the figure, after it was drawn for real."""
    figure = report_figure(report)
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure.axes


def cut_lines(axes):
    return [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]


@pytest.mark.parametrize("layers", [1, 2, 50, 120])
def test_any_number_of_layers(make_report, layers):
    report = make_report(layers)
    _, _, widths = draw(report)
    dense, pruned = widths.containers
    assert [bar.get_height() for bar in dense] == list(report.dense.widths.values())
    assert [bar.get_height() for bar in pruned] == list(report.widths.values())


def test_metrics_and_sizes_over_epochs_with_the_cuts(make_report):
    report = make_report()
    metric, size, _ = draw(report)
    assert cut_lines(metric) == cut_lines(size) == [2, 4]
    curves = {line.get_label(): line for line in metric.lines}
    assert list(curves["val_acc"].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(curves["val_acc"].get_ydata()) == [0.6, 0.7, 0.5, 0.6, 0.4, 0.5]
    assert "train_acc" in curves
    assert "val_loss" not in curves
    assert "train_acc_step" not in curves
    params = next(line for line in size.lines if line.get_label().startswith("parameters: 1,000 → 640"))
    np.testing.assert_allclose(params.get_xdata(), [0, 2, 4, 6])
    assert params.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(params.get_ydata(), [100, 80, 64, 64])
    assert metric.get_xlabel() == "epochs trained, cuts dashed"


@pytest.mark.parametrize("metric", ["val_acc", "validation/multiclass_accuracy_top_5"])
def test_the_title_fits_into_the_picture(make_report, metric):
    report = make_report()
    for row in report.history:
        row.metrics[metric] = row.metrics["val_acc"]
    report.metric = metric
    figure = report_figure(report)
    figure.savefig(io.BytesIO())
    inside, title = figure.bbox, figure._suptitle.get_window_extent()
    assert metric in figure._suptitle.get_text()
    assert inside.x0 <= title.x0 < title.x1 <= inside.x1
    assert title.y1 <= inside.y1


def test_a_report_draws_itself(make_report):
    report = make_report()
    assert [axes.get_ylabel() for axes in report.figure().axes] == [a.get_ylabel() for a in report_figure(report).axes]


def test_a_network_that_was_pruned_before_begins_below_the_dense_one(make_report):
    report = make_report(cut_epochs=(2,))
    report.pruned_before(report.dense, Size(900, 4000, {"net.0": 18}), 1)
    _, size, _ = draw(report)
    params = next(line for line in size.lines if line.get_label().startswith("parameters: 1,000 → 800"))
    np.testing.assert_allclose(params.get_ydata(), [90, 80, 80])


def test_no_cuts(make_report):
    metric, size, _ = draw(make_report(cut_epochs=()))
    assert cut_lines(metric) == []
    assert all(set(line.get_ydata()) == {100} for line in size.lines)


def test_one_epoch_is_drawn_in_steps(make_report):
    report = make_report(epochs=1, cut_epochs=())
    report.cuts.append(Cut(0, 0, 4, {"net.0": 20}, {"net.0": 10}, Size(500, 2500), 0.1))
    metric, size, _ = draw(report)
    assert metric.get_xlabel() == "optimizer steps trained, cuts dashed"
    assert cut_lines(size) == [4]


def test_cuts_inside_an_epoch_lie_inside_it(make_report):
    clock = _Clock(make_report())
    np.testing.assert_allclose(clock.at([0, 5, 10, 25, 60]), [0, 0.5, 1, 2.5, 6])


def test_two_hundred_cuts(make_report):
    metric, size, _ = draw(make_report(layers=3, epochs=202, cut_epochs=range(1, 201)))
    assert cut_lines(metric) == cut_lines(size) == list(range(1, 201))


def test_missing_things_leave_a_note(make_report):
    texts = [axes.texts[0].get_text() for axes in draw(Report())]
    assert texts == ["no accuracy or loss was logged", "no size was recorded", "no widths were recorded"]
    report = Report(Size(100, 200), metric="val_iou")
    assert draw(report)[0].texts[0].get_text() == "val_iou was not logged"
    broken = make_report()
    broken.log(9, 99, {"val_acc": math.nan, "train_acc": math.inf})
    draw(broken)


def test_no_global_state_of_matplotlib() -> None:
    """No figure is registered with pyplot, which would keep it alive and show it in a notebook a second time."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    report_figure(Report())
    assert pyplot.get_fignums() == before


def test_a_figure_is_the_value_of_a_cell(make_report):
    """IPython shows what has this method; without it the cell ends with `<Figure size ...>`."""
    from IPython.core.formatters import PNGFormatter

    assert PNGFormatter()(report_figure(make_report())).startswith(b"\x89PNG")


def test_the_scores_of_a_cut():
    scores = {"a": Scores.of(torch.arange(11.0), kept=[5, 6, 7, 8, 9, 10]), "b": Scores.of(torch.ones(3))}
    assert (scores["a"].q25, scores["a"].median, scores["a"].max, scores["a"].removed) == (2.5, 5.0, 10.0, 4.0)
    assert scores["b"].removed is None
    (axes,) = scores_figure(Cut(0, 1, 2, {}, {}, Size(1, 1), 0.1, scores=scores)).axes
    ranges, quartiles = ([path.vertices[:, 1].tolist() for path in lines.get_paths()] for lines in axes.collections)
    assert ranges == [[0, 10], [1, 1]]
    assert quartiles == [[2.5, 7.5], [1, 1]]
    removed = next(line for line in axes.lines if line.get_label() == "removed up to here")
    assert (list(removed.get_xdata()), list(removed.get_ydata())) == ([0], [4.0])
    assert axes.get_yscale() == "linear"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]


def test_scores_that_differ_by_orders_are_drawn_on_a_logarithmic_axis():
    cut = Cut(0, 1, 2, {}, {}, Size(1, 1), 0.1, scores={"a": Scores.of(torch.tensor([0.01, 1.0]))})
    assert scores_figure(cut).axes[0].get_yscale() == "log"


def test_the_title_fits(make_report):
    figure = report_figure(make_report())
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert figure.bbox.x0 <= title.x0 < title.x1 <= figure.bbox.x1
    assert "(dense, after 2 of 6 epochs, not fully trained)" in figure._suptitle.get_text()


def test_a_legend_that_is_too_long_has_a_line_for_each_name(make_report):
    report = make_report()
    assert panel_figures(report)[1].axes[0].get_legend()._ncols == 3
    report.dense = replace(report.dense, params=123_456, macs=999_999)
    report.cuts[-1] = replace(report.cuts[-1], size=Size(100_000, 990_000))
    report.what = "weights"
    figure = panel_figures(report)[1]
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    assert legend._ncols == 1
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_panels_for_a_phone_are_those_of_the_picture(make_report):
    report = make_report()
    whole = [axes.get_ylabel() for axes in report_figure(report).axes]
    figures = panel_figures(report)
    assert [figure.axes[0].get_ylabel() for figure in figures] == whole
    assert all(figure.get_figwidth() < 6 for figure in figures)


def test_long_names_leave_room_for_the_panel(make_report):
    """Constrained layout warns of axes without height, and warnings are errors."""
    names = [f"bert.encoder.layer.{n}.attention.self.query#head_dim.{'x' * 40}" for n in range(5)]
    scores = {name: Scores.of(torch.arange(4.0), kept=[2, 3]) for name in names}
    report = make_report()
    widths = dict.fromkeys(names, 8)
    report.dense = replace(report.dense, widths=widths)
    report.cuts = [replace(cut, before=widths, after=widths) for cut in report.cuts]
    for figure in (scores_figure(Cut(0, 1, 2, {}, {}, Size(1, 1), 0.1, scores=scores)), panel_figures(report)[2]):
        figure.draw_without_rendering()
        assert figure.axes[0].get_window_extent().height > 100
