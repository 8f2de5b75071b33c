"""Tables of numbers."""

from dataclasses import dataclass

from lightning_prune.reporting import Cut, Report
from lightning_prune.reporting.numeric import numeric_tables, of_dataclasses
from lightning_prune.structure import Size


def test_tables_hold_numbers(make_report):
    report = make_report()
    report.final = Size(640, 3200, report.widths, bytes=4096, latency={1: 0.25})
    tables = numeric_tables(report)
    summary = {row[0]: row[1:] for row in tables["summary"].rows}
    assert summary["params"] == (1000, 640, 0.64)
    assert summary["latency_ms/batch_1"] == (0.5, 0.25, 0.5)
    assert summary["latency_ms/batch_64"] == (4.0, None, None)
    assert summary["val_acc"] == (0.7, 0.5, None)
    assert "memory_bytes" not in summary
    assert tables["cuts"].columns[3:7] == ("params", "macs", "seconds", "val_acc before")
    assert tables["cuts"].rows[0] == (1, 2, 20, 800, 4000, 0.01, 0.7, 0.5, 0.6)
    assert tables["widths"].rows == [("net.0", 20, 16, 0.8), ("net.1", 30, 24, 0.8)]
    assert tables["sizes"].columns == ("params", "macs", "params left", "val_acc")
    assert tables["sizes"].rows == [(1000, 5000, 1.0, 0.7), (800, 4000, 0.8, 0.6), (640, 3200, 0.64, 0.5)]
    assert numeric_tables(Report()) == {}


def test_masks_count_weights():
    report = Report(Size(100, 1000, {"a": 60}, zeros=0), what="weights")
    report.cuts = [Cut.of(Size(70, 1000, zeros=30), 0, 1, 10, {"a": 60}, {"a": 30}, 0.1)]
    tables = numeric_tables(report)
    assert [row[0] for row in tables["summary"].rows] == ["nonzero_weights", "zero_weights", "macs"]
    assert "nonzero_weights" in tables["cuts"].columns


def test_rows_of_dataclasses():
    @dataclass
    class Row:
        name: str
        value: float | None

    assert of_dataclasses([Row("a", 1.0), Row("b", None)]) == (("name", "value"), [("a", 1.0), ("b", None)])
    assert of_dataclasses([]) == ((), [])
