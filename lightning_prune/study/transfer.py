"""Export and import of a study's results as a few small files, to keep in a repository or continue elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_prune.study.configurations import Cell, cells, preparations
from lightning_prune.study.definition import Study
from lightning_prune.study.runner import identity, rows
from lightning_prune.study.store import ARCHITECTURE, Result, Store
from lightning_prune.study.table import read_table, write_table

__all__ = ["export_study", "import_study"]

_TABLE, _ARCHITECTURES = "table.csv", "architectures"


def export_study(study: Study, folder: Path, target: Path) -> None:
    """Write the table of all finished runs, and the architecture of every pruned variant.

    Args:
        study: The definition.
        folder: Where its runs are.
        target: Folder for ``table.csv`` and ``architectures/``.
    """
    (target / _ARCHITECTURES).mkdir(parents=True, exist_ok=True)
    write_table(rows(study, folder), study.axes, target / _TABLE)
    store = Store(folder)
    for cut in preparations(study)[1]:
        if store.result(cut) is not None:
            shutil.copyfile(store.finished(cut) / ARCHITECTURE, target / _ARCHITECTURES / f"{cut.key}.pt")


def import_study(study: Study, source: Path, folder: Path) -> int:
    """Create finished cells from the files of :func:`export_study`, so that a study continues from there.

    Weights are not exported: the run at the prior, from whose weights others start, is run again.

    Args:
        study: The definition that the files were written for.
        source: Folder with ``table.csv`` and ``architectures/``.
        folder: The study's folder; what is finished there stays.

    Returns:
        How many runs were taken over.

    Raises:
        ValueError: If the table is of another version or another study, or the folder holds another study.
    """
    table = {row.key: row for row in read_table(source / _TABLE, study.axes)}
    store = Store(folder)
    store.claim(identity(study))
    found = [row.point(study.axes) for row in table.values()]
    reach = tuple(
        (min([low, *(point[axis] for point in found)]), max([high, *(point[axis] for point in found)]))
        for axis, (low, high) in enumerate(study.extent)
    )
    known = {cell.key: cell for *_, cell in cells(study, reach)}
    strange = [row for key, row in table.items() if key not in known]
    if strange:
        raise ValueError(
            f"expected the table of this study in {source}, got a run that it does not have: {strange[0].variant} at "
            f"{strange[0].values}, seed {strange[0].seed}. Give the study.yaml that the table was written for."
        )
    for cut in preparations(study)[1]:
        file = source / _ARCHITECTURES / f"{cut.key}.pt"
        if file.is_file():
            _finish(store, cut, Result({}, [], 0, 0, 0.0), file)
    taken = [(known[key], row) for key, row in table.items() if known[key].keep is None]
    for cell, row in taken:
        metrics = {study.metric: row.top1} | ({} if row.top5 is None else {study.top5: row.top5})
        _finish(store, cell, Result(metrics, [], row.params, row.macs, row.seconds, row.diverged))
    return len(taken)


def _finish(store: Store, cell: Cell, result: Result, architecture: Path | None = None) -> None:
    if store.result(cell) is not None:
        return
    with store.lock(cell):
        place = store.running(cell)
        place.mkdir(parents=True, exist_ok=True)
        if architecture is not None:
            shutil.copyfile(architecture, place / ARCHITECTURE)
        store.finish(cell, result, {"imported": True})
