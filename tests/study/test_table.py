"""The tidy table: written, read back, and refused where it is another."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.study.axes import Axis
from lightning_prune.study.table import Row, read_table, write_table

AXES = (Axis("optimizer.weight_decay", 1e-3), Axis("optimizer.lr", 0.1))
ROWS = [
    Row("unpruned", "", None, (1e-3, 0.1), 0, 0.91, None, 10, 20, 1.5, False, "a" * 16),
    Row("60% uniform", "scratch", 0.6, (1e-3, 0.158489), 1, 0.1, 0.5, 6, 12, 1.25, True, "b" * 16),
]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    write_table(ROWS, AXES, file)
    assert read_table(file, AXES) == ROWS
    head, first, _ = file.read_text().splitlines()
    assert head.startswith("variant,pipeline,remaining,optimizer.weight_decay,optimizer.lr,seed,top1,top5,params,macs")
    assert first == f"unpruned,,,0.001,0.1,0,0.91,,10,20,1.5,False,{'a' * 16},1"
    assert ROWS[1].point(AXES) == (0, 1)


def test_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    write_table(ROWS, AXES, file)
    file.write_text(file.read_text().replace(f"{'b' * 16},1", f"{'b' * 16},7"))
    with pytest.raises(ValueError, match=r"a table of version 1 .* got version 7"):
        read_table(file, AXES)


def test_another_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    write_table(ROWS, AXES, file)
    with pytest.raises(ValueError, match="expected a study's table with the columns"):
        read_table(file, (AXES[1], AXES[0]))


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"which does not exist\. `lightning-prune study export` writes one"):
        read_table(tmp_path / "table.csv", AXES)
