"""What is logged to W&B besides curves: configuration, summary, tables, pictures and checkpoints."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.extras import require
from lightning_prune.packages import both
from lightning_prune.reporting import Report
from lightning_prune.reporting.numeric import Table, numeric_tables

__all__ = ["log_checkpoints", "log_media", "log_report", "nested", "wandb_run"]

# Entries of a report's configuration that identify the run and are not settings.
_NAMES = frozenset({"run", "wandb", "order"})


def wandb_run(trainer: Trainer, before: str | None) -> str | None:
    """Id of the W&B run that the curves are logged to.

    W&B starts its run before any callback sees the checkpoint, so if it is another run, it can only be reported.

    Args:
        trainer: The run.
        before: Id of the W&B run in the checkpoint that is resumed, if any.

    Returns:
        The id; without a W&B logger the previous one, so that a later resume still has it.
    """
    now = next((logger.version for logger in trainer.loggers if isinstance(logger, both(WandbLogger))), None)
    if now is not None and before is not None and now != before:
        rank_zero_info(
            f"The curves of this checkpoint are in the W&B run '{before}', but this run logs to '{now}'. To continue "
            f"the former, use `WandbLogger(id='{before}')`."
        )
    return before if now is None else str(now)


def log_report(logger: WandbLogger, name: str, report: Report, pictures: Iterable[Path], step: int) -> None:
    """Log the settings as configuration, the results as summary, tables, pictures, and metric against size as a chart.

    Args:
        logger: The logger.
        name: Prefix of settings, tables and pictures.
        report: The report of the run.
        pictures: Its pictures.
        step: The step axis of Lightning's curves.
    """
    run: Any = logger.experiment
    settings = {key: nested(value) for key, value in report.to_plain()["config"].items() if key not in _NAMES}
    run.config.update({name: settings}, allow_val_change=True)
    run.summary.update(report.summary())
    tables = numeric_tables(report)
    points = tables.pop("sizes", None)
    log_media(logger, name, tables, pictures, step)
    if points is not None and report.main_metric is not None:
        wandb: Any = require("wandb", extra="wandb")
        title = f"{report.main_metric} against {points.columns[0]}"
        chart = wandb.plot.scatter(_wandb_table(points), points.columns[0], report.main_metric, title=title)
        logger.log_metrics({f"{name}/metric_against_size": chart}, step=step)


def log_media(logger: WandbLogger, name: str, tables: Mapping[str, Table], pictures: Iterable[Path], step: int) -> None:
    """Log tables under ``<name>/tables/`` and pictures under ``<name>/pictures/``, in one row."""
    wandb: Any = require("wandb", extra="wandb")
    media: dict[str, Any] = {f"{name}/tables/{title}": _wandb_table(table) for title, table in tables.items()}
    media |= {f"{name}/pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
    if media:
        logger.log_metrics(media, step=step)


def _wandb_table(table: Table) -> Any:
    columns, rows = table
    return require("wandb", extra="wandb").Table(columns=list(columns), data=[list(row) for row in rows])


def log_checkpoints(logger: WandbLogger, trainer: Trainer, report: Report) -> None:
    """Log the last and the best checkpoint as versions of one artifact, ``final`` and ``best``, with size and metric.

    Args:
        logger: The logger.
        trainer: The finished run.
        report: The report of the run.
    """
    saved = [
        one for one in trainer.checkpoint_callbacks if isinstance(one, both(ModelCheckpoint)) and one.best_model_path
    ]
    aliases: dict[str, list[str]] = {}
    for one in saved:
        if one.monitor is None or one.last_model_path:
            aliases.setdefault(one.last_model_path or one.best_model_path, []).append("final")
        if one.monitor is not None:
            aliases.setdefault(one.best_model_path, []).append("best")
    wandb: Any = require("wandb", extra="wandb")
    for path, names in aliases.items():
        # Not `weights_only`: this run has just written it, with any objects of the user's module.
        step = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["global_step"]
        artifact = wandb.Artifact(f"pruned-{logger.version}", type="model", metadata=report.at_step(step))
        # By reference: a copy would take the same space again until the run is synchronised.
        artifact.add_file(path, name="model.ckpt", policy="immutable")
        logger.experiment.log_artifact(artifact, aliases=names)


def nested(value: Any) -> Any:
    """A setting stored as its ``repr``, as nested values: ``{"class": "Cubic", "cuts": 5}``."""
    if isinstance(value, Mapping):
        return {key: nested(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nested(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return _evaluated(ast.parse(value, mode="eval").body)
    except (SyntaxError, ValueError):
        return value  # a string, or the `repr` of another object


def _evaluated(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        named = {str(keyword.arg): _evaluated(keyword.value) for keyword in node.keywords}
        return {"class": node.func.id, **named}
    if isinstance(node, ast.Tuple | ast.List):
        return [_evaluated(item) for item in node.elts]
    return ast.literal_eval(node)
