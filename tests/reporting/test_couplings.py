"""The picture of what can be pruned: every coupling and every reason is on it."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from lightning_prune.reporting import Inspection
from lightning_prune.reporting.couplings import couplings
from lightning_prune.structure import TracedModel, trace


class Residual(nn.Module):
    """Two layers that share a width, one used twice, and a norm that follows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 3)
        self.stem, self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 5)
        self.norm, self.again, self.last = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.last(self.again(self.norm(x)) + x))


def inspection(model=None):
    return Inspection(trace(TracedModel.of(model or Residual(), torch.zeros(3, 4))))


def test_every_layer_meets_its_groups():
    inspected = inspection()
    layers, cells = couplings(inspected.structure)
    assert layers == ["head", "stem", "inner", "outer", "again", "last"]  # as they are defined
    assert list(inspected.structure.widths) == ["stem", "inner", "last"]
    expected = [[0, 0, 2], [1, 0, 0], [2, 1, 0], [1, 2, 0], [3, 0, 0], [2, 0, 1]]
    assert np.array_equal(cells, expected)


def words(figure):
    figure.canvas.draw()
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())] + [
        text.get_text() for part in (*figure.legends, figure) for text in getattr(part, "texts", [])
    ]


def test_the_picture_says_widths_names_and_reasons():
    inspected = inspection()
    figure = inspected.figure()
    shown = words(figure)
    assert {"head", "again", "5", "6", "7", "\N{BLACK SQUARE} 3", "both"} <= set(shown)
    assert "not pruned: an output of the network (1 layer)" in shown
    assert any("1 MAC = 2 FLOPs" in text for text in shown)
    painted = figure.axes[0].collections[0].get_array()
    assert np.array_equal(np.asarray(painted).reshape(6, 3), couplings(inspected.structure)[1])


def test_everything_lies_inside_the_picture():
    layers = [layer for i in range(90) for layer in (nn.Linear(4, 4), nn.Sigmoid())]
    two = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for model in (Residual(), nn.Linear(4, 2), two, nn.Sequential(*layers)):
        figure = inspection(model).figure()
        renderer = FigureCanvasAgg(figure).get_renderer()
        frame = figure.bbox
        for part in (*figure.axes, *figure.legends, *figure.texts):
            box = part.get_tightbbox(renderer)
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def test_the_rarest_reasons_share_a_colour():
    class Many(nn.Module):
        """Seven widths, each frozen for a reason of its own."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 6) for _ in range(7))

        def forward(self, x):
            a, b, c, d, e, f, g = (layer(x) for layer in self.layers)
            told = a.softmax(-1).sum(), b[:, 1], c.roll(1, 1), d.unbind(1)[0], e.split([2, 4], 1)[0]
            return *told, torch.cdist(f, f), g

    shown = words(inspection(Many()).figure())
    assert sum(text.startswith("not pruned: another reason") for text in shown) == 1


def test_a_few_groups_get_room_and_the_legends_lie_together():
    figure = inspection(Residual()).figure()
    assert figure.axes[0].get_position().width * figure.get_figwidth() == pytest.approx(3 * 0.8)
    renderer = FigureCanvasAgg(figure).get_renderer()
    above, below = (legend.get_window_extent(renderer) for legend in figure.legends)
    assert abs(above.y0 - below.y1) < 0.15 * figure.dpi
    assert below.y0 > figure.bbox.y0


def test_the_picture_of_a_tiny_network_is_not_half_empty():
    figure = inspection(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).figure()
    box = figure.axes[0].get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    left, right = box.x0 - figure.bbox.x0, figure.bbox.x1 - box.x1
    assert figure.get_figwidth() <= 5
    assert max(left, right) < 0.4 * figure.bbox.width
