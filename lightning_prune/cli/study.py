"""``lightning-prune study``: run a study of hyperparameters, look at it, and take its table elsewhere."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli import recipes
from lightning_prune.cli.verbs import run as train
from lightning_prune.study.analysis import analyse
from lightning_prune.study.definition import Study, load
from lightning_prune.study.launchers import Launcher, Local, Ray, Slurm
from lightning_prune.study.progress import Progress
from lightning_prune.study.report import page
from lightning_prune.study.runner import check, retry_failed, rows, run_study
from lightning_prune.study.table import read_table, write_table
from lightning_prune.study.transfer import export_study, import_study

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """``lightning-prune study run | report | export FILE``."""
    parser = ArgumentParser("lightning-prune study", description="The hyperparameter performance space of a network.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("run", help="run what is not finished yet")
    export = verbs.add_parser("export", help="write the table of all finished runs, and the architectures")
    take = verbs.add_parser("import", help="take over what `export` wrote, to go on with it")
    report = verbs.add_parser("report", help="write tables, pictures and a page of what is finished")
    for verb in (start, export, take, report):
        verb.add_argument("file", help="a study.yaml, or the name of a study that comes with the package")
        verb.add_argument("--folder", type=Path, help="where its runs are (default: runs/<name of the file>)")
    start.add_argument(
        "--launcher", choices=("local", "ray", "slurm"), default="local", help="who runs (default: local)"
    )
    start.add_argument("--workers", type=int, default=1, help="processes of the local launcher, one thread each")
    start.add_argument("--address", help="of a Ray cluster; by default one is started here")
    start.add_argument("--gpus", type=float, default=0, help="GPUs of a run on Ray")
    start.add_argument("--retry", action="store_true", help="run again what has failed")
    report.add_argument(
        "--accept", type=float, default=0.5, help="risk that you accept, in percentage points (default: 0.5)"
    )
    report.add_argument("--table", type=Path, help="read this table instead of the folder's runs")
    report.add_argument("--out", type=Path, help="where to write (default: report in the folder)")
    export.add_argument("--out", type=Path, help="folder to write to (default: export in the folder)")
    take.add_argument("source", type=Path, help="folder that `export` wrote")
    given = parser.parse_args(words)
    file = Path(given.file) if Path(given.file).is_file() else recipes.study(given.file)
    study, folder = load(file, recipes.path), given.folder or Path("runs") / file.stem
    if given.verb == "run":
        _run(study, folder, given)
    elif given.verb == "report":
        found = rows(study, folder) if given.table is None else read_table(given.table, study.axes)
        written = page(study, analyse(found, study.axes), file.stem, given.accept)
        for each in written.write(given.out or folder / "report", "report"):
            print(each)
    elif given.verb == "import":
        print(f"{import_study(study, given.source, folder)} runs taken over")
    else:
        export_study(study, folder, given.out or folder / "export")


def _run(study: Study, folder: Path, given: Namespace) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        check(study, train)
    if given.retry:
        print(f"{retry_failed(study, folder)} failed runs are run again")
    failed = run_study(study, folder, train, _launcher(folder, given), Progress())
    write_table(rows(study, folder), study.axes, folder / "table.csv")
    for failure in failed:
        sys.stderr.write(f"failed: {failure.cell.label}: {failure.error.strip().splitlines()[-1]}\n")


def _launcher(folder: Path, given: Namespace) -> Launcher:
    if given.launcher == "ray":
        return Ray(given.address, gpus=given.gpus)
    return Slurm(folder / "slurm") if given.launcher == "slurm" else Local(given.workers)
