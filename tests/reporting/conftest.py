"""Reports of imagined runs."""

from collections.abc import Callable, Collection

import pytest

from lightning_prune.reporting import Cut, Report
from lightning_prune.structure import Size

STEPS_PER_EPOCH = 10


def build_report(layers: int = 2, epochs: int = 6, cut_epochs: Collection[int] = (2, 4)) -> Report:
    """A run of ``epochs`` epochs of ten steps; a cut takes a tenth of every layer and 0.3 of the accuracy."""
    widths = {f"net.{i}": 20 + 10 * i for i in range(layers)}
    report = Report(Size(1000, 5000, widths, bytes=8192, latency={1: 0.5, 64: 4.0}), seed=7, versions={"torch": "2.15"})
    accuracy = 0.5
    for epoch in range(epochs):
        if epoch in cut_epochs:
            before = report.widths
            after = {name: int(0.9 * width) for name, width in before.items()}
            left = 0.8 ** (len(report.cuts) + 1)
            report.cuts.append(
                Cut(len(report.cuts), epoch, 10 * epoch, before, after, Size(int(1000 * left), int(5000 * left)), 0.01)
            )
            accuracy -= 0.3
        accuracy = round(accuracy + 0.1, 3)
        step = STEPS_PER_EPOCH * (epoch + 1)
        report.log(epoch, step, {"val_loss": 1 - accuracy, "val_acc": accuracy})
        report.log(epoch, step, {"train_acc": accuracy + 0.01, "train_acc_step": 0.0, "lr": 0.1})
    return report


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    return build_report
