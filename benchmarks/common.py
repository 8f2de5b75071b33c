"""Shared code of benchmarks: quiet fits, machine and versions, stored rows, and confidence intervals.

A benchmark computes everything that its command asks for. With ``--resume`` it keeps stored rows with the same settings
and computes the rest; each row records where it was computed (`here`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_prune.reporting import versions
from lightning_prune.study.statistics import mean_interval

__all__ = [
    *("EVIDENCE", "add_resume", "command", "computed", "fill", "here", "interval", "machine", "publish", "quiet"),
    *("quiet_fit", "rows_in", "shown", "signed", "stored", "summary"),
]

#: Where every benchmark leaves its output.
EVIDENCE = Path(__file__).resolve().parent.parent / "docs" / "evidence"


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


@cache
def here() -> dict[str, Any]:
    """Machine, versions and commit, for the rows that are computed here.

    The commit ends with ``-dirty`` where files other than the evidence differ from it.
    """

    def git(*words: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/evidence")
    return {**machine(), "commit": f"{commit}-dirty" if changed else commit or None}


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the option to continue a stopped benchmark."""
    parser.add_argument("--resume", action="store_true", help="keep stored rows and compute the rest")


def stored(file: Path, settings: Mapping[str, Any], *, resume: bool, rows: str = "rows") -> list[dict[str, Any]]:
    """The stored rows that a resumed benchmark continues from; none if it is not resumed.

    Raises:
        ValueError: If the rows are of other settings.
    """
    if not resume or not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        raise ValueError(
            f"--resume: expected rows of {settings} in {file.name}, got those of {found.get('settings')}. Give those "
            "settings, or leave `--resume` out to compute everything."
        )
    return list(found[rows])


def command(module: str) -> str:
    """The command that was run, with FOLDER and PYTHON for places of this machine, and without ``--resume``."""
    arguments = [word for word in sys.argv[1:] if word != "--resume"]
    for at, word in enumerate(arguments[:-1]):
        if word in ("--root", "--work", "--python"):
            arguments[at + 1] = "PYTHON" if word == "--python" else "FOLDER"
    return shlex.join(["python", "-m", module, *arguments])


def quiet(threads: int = 1) -> None:
    """Neither warnings nor Lightning's log, on so many threads."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trained_once(model: nn.Module, file: Path, train: Callable[[], None]) -> None:
    """Give a network the weights of a file, which is written by training it where it is not there yet."""
    if not file.is_file():
        train()
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))


def quiet_fit(
    module: LightningModule,
    data: Any,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    **settings: Any,
) -> None:
    """Train on one processor, from a loader or data module, and leave nothing: no files, no output, no validation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=list(callbacks),
            **settings,
        )
        trainer.fit(module, data, ckpt_path=resume)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t) of independent values, at least two."""
    return mean_interval(values)


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its interval, which one seed has not: 0."""
    return interval(values) if len(values) > 1 else (values[0], 0.0)


def shown(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean and interval as text; of one seed, the number."""
    mean, half = summary(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def signed(values: Sequence[float], digits: int = 2) -> str:
    """A mean difference with its 95 % interval, as text."""
    return shown(values, digits, "+")


def computed(
    jobs: Iterable[dict[str, Any]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    file: Path,
    *,
    resume: bool,
    leftovers: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """The row of every job, run and added to the lines of a file; with `resume`, those that are there are taken.

    Args:
        jobs: What names a row.
        run: Computes the rest of it.
        file: Its folder is for what is done so far.
        resume: Go on. Else what an earlier run has left is set aside (``rows.jsonl.before``).
        leftovers: Patterns of other files in that folder that jobs share (a trained network, say).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        for left in (file, *(found for pattern in leftovers for found in file.parent.glob(pattern))):
            if left.is_file():
                left.replace(left.with_name(f"{left.name}.before"))
    done = rows_in(file) if file.is_file() else []
    for job in jobs:
        row = next((row for row in done if job.items() <= row.items()), None)
        if row is None:
            row = {**job, **run(job), "at": here()}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(*job.values(), *(f"{row[key]:.2f}" for key in ("accuracy",) if key in row), flush=True)
        yield row


def rows_in(file: Path, **settings: Any) -> list[dict[str, Any]]:
    """The rows that `computed` has written, those with these settings."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [row for row in rows if settings.items() <= row.items()]


def publish(name: str, facts: Mapping[str, Any], tables: str, figure: Any = None) -> None:
    """Numbers, tables and picture of a benchmark, with the command and the machine, into its folder of evidence."""
    home = EVIDENCE / name
    home.mkdir(parents=True, exist_ok=True)
    facts = {"command": command(f"benchmarks.{name}"), "machine": here(), **facts}
    (home / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    ran = f"`{facts['command']}` on {facts['machine']['processor']}; {facts['machine']['versions']}"
    fill(home / "README.md", f"{tables}\n\n{ran}")
    if figure is not None:
        figure.savefig(home / "figure.png")
    print(tables)


def fill(page: Path, tables: str) -> None:
    """Put tables into a page, between its two marks, so that what is said around them stays."""
    begin, end = "<!-- tables: written by the command above -->", "<!-- end of tables -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {page.parent.name}\n\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
