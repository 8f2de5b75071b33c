"""The commands of one network (fit, inspect, export, ...): LightningCLI with our classes and a folder per run."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
import zipfile
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, cast

import rich
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

# Imported so that their classes can be given by short names in YAML and on the command line.
import lightning_prune.api
import lightning_prune.callbacks
import lightning_prune.data
import lightning_prune.models
import lightning_prune.planning
import lightning_prune.scoring.criteria
from lightning_prune.api.device_latency import Runtime
from lightning_prune.callbacks.display.wandb_run import log_checkpoints
from lightning_prune.callbacks.lightning.checkpoints import load_into
from lightning_prune.callbacks.quantisation_aware import rounding_in
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.cli import runs
from lightning_prune.cli.bar import SizeProgressBar
from lightning_prune.cli.checkpoints import BestCheckpoint, with_checkpoints
from lightning_prune.cli.help import ShortHelp
from lightning_prune.cli.messages import near, of_parser
from lightning_prune.cli.parser import Parser
from lightning_prune.data import ImageData
from lightning_prune.surgery import history_of

__all__ = ["PruningCLI", "PruningTrainer", "RunConfig", "example_of", "run"]

_DESCRIPTION = (
    "Prune networks while Lightning trains them. `lightning-prune recipes` lists, shows and copies the bundled "
    "experiments; `--config` takes their names as well as files. `lightning-prune compare` compares finished runs, "
    "`lightning-prune export` writes a trained network to a file for another runtime, `quantise` in 8-bit integers, "
    "`lightning-prune controls` runs a pruning fit beside what the same training gives without it, and "
    "`lightning-prune study` runs a grid of hyperparameters. Each command has a `--help`; `--debug` shows the "
    "traceback of an error."
)

# Commands of `PruningTrainer` that write no folder of a run.
_WITHOUT_FOLDER = ("inspect", "export", "quantise", "latency_script")


class PruningTrainer(Trainer):
    """Lightning's Trainer with the additional methods `inspect`, `export`, `quantise`, `latency_script` and `score`."""

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print what can be pruned, what cannot, and why.

        Args:
            model: The network.
            datamodule: Source of the example if the model has no ``example_input_array``.
            ckpt_path: Inspect the network in this checkpoint, with its widths.
            weights_only: As in ``test``.
        """
        if ckpt_path is not None:
            load_into(model, ckpt_path, weights_only)
        rich.print(lightning_prune.inspect(model, example_of(model, datamodule)))

    def export(
        self,
        model: LightningModule,
        file: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the network in a checkpoint to a file for another runtime, and verify it there.

        Args:
            model: The dense network.
            file: The file to write: .onnx, .pt2 (torch.export), .pte (ExecuTorch) or .xml (OpenVINO).
            datamodule: The file is verified on its first training batch; without data, on the ``example_input_array``.
            ckpt_path: The checkpoint.
            weights_only: As in ``test``.

        Raises:
            ValueError: If no checkpoint is given.
        """
        dense = copy.deepcopy(model)
        load_into(model, _required("export", ckpt_path), weights_only)
        samples = None if datamodule is None else _first_batch(datamodule)
        beside = None if history_of(model) is None else dense
        rich.print(lightning_prune.export(model, file, samples, dense=beside))

    def quantise(
        self,
        model: LightningModule,
        file: str,
        samples: int = 512,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the classifier in a checkpoint in 8-bit integers to an ONNX file, and compare it with the float one.

        Args:
            model: The dense network.
            file: The file to write, .onnx.
            samples: Number of training samples that give the ranges of the integers: the first that the training loader
                yields. A checkpoint of training with `QuantisationAware` holds the ranges, and needs none.
            datamodule: Training data, and test data (without, validation data) to compare on, all of it or
                ``limit_test_batches`` (``limit_val_batches``). Without one, the data of the model.
            ckpt_path: The checkpoint.
            weights_only: As in ``test``.

        Raises:
            ValueError: If no checkpoint, no data or no sample is given.
        """
        if samples < 1:
            raise ValueError(f"quantise: expected `samples` of at least 1, got {samples}.")
        checkpoint = load_into(model, _required("quantise", ckpt_path), weights_only)
        data = model if datamodule is None else datamodule
        held_out = next((name for name in ("test", "val") if is_overridden(f"{name}_dataloader", data)), None)
        if not is_overridden("train_dataloader", data) or held_out is None:
            raise ValueError(
                "quantise: expected data for training, and for the test or validation, got none. Give --data: one of "
                "this package (Digits) or your own (my_package.MyData)."
            )
        rounding = rounding_in(checkpoint)
        test = _test_batches(data, held_out, self.limit_test_batches if held_out == "test" else self.limit_val_batches)
        done = lightning_prune.quantise(model, file, rounding or _training_inputs(data, samples), test)
        rich.print(done)

    def latency_script(
        self,
        model: LightningModule,
        file: str = "time_layers.py",
        runtime: Runtime = "torch",
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write a Python script that measures a latency table of the network on another device.

        Args:
            model: The network.
            file: The script to write.
            runtime: What runs the network there: torch or onnxruntime.
            datamodule: Source of the example if the model has no ``example_input_array``.
            ckpt_path: Take the network in this checkpoint, with its widths.
            weights_only: As in ``test``.
        """
        if ckpt_path is not None:
            load_into(model, ckpt_path, weights_only)
        lightning_prune.latency_script(model, example_of(model, datamodule), file, runtime=runtime)
        needed = "numpy and torch" if runtime == "torch" else "numpy and onnxruntime"
        print(
            f"Latency script: {file}. Run it on the device, which needs {needed}: python {Path(file).name} --threads 4 "
            "--out table.json. Then give the table to a pruning callback as `latency_table`."
        )

    def score(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Score the layers with the `XGBPruning` of the configuration and write the table, without pruning.

        A later ``fit`` with the same network, samples and options reuses the scores.

        Args:
            model: The network.
            datamodule: Its training data.
            ckpt_path: Score the network in this checkpoint.
            weights_only: As in ``fit``.

        Raises:
            ValueError: If the configuration has no such callback, or several.
        """
        found = [one for one in self.callbacks if isinstance(one, lightning_prune.XGBPruning)]  # type: ignore[attr-defined]
        if len(found) != 1:
            raise ValueError(
                f"score: expected one `XGBPruning` in `trainer.callbacks`, got {len(found)}. Its arguments determine "
                "how layers are scored."
            )
        (pruning,) = found
        pruning.only_score, self.num_sanity_val_steps = True, 0
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run's folder and logs it as hyperparameters."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        runs.set_aside(folder / runs.CONFIG)
        self.parser.save(self.config, folder / runs.CONFIG, skip_none=False, multifile=False)
        settings = _settings(self.config.as_dict())
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # it would write the same file again
                logger.log_hyperparams(settings)
        curves = _wandb_logger(trainer.loggers)
        if curves is not None:
            (folder / runs.WANDB).write_text(str(curves.version), encoding="utf-8")


class PruningCLI(LightningCLI):
    """LightningCLI with a separate folder for each run.

    ``fit`` creates ``<root>/<name>/<number>``; with a checkpoint of an earlier run it continues in that run's folder
    and in its W&B run. The other subcommands, given such a checkpoint, create a folder inside that run. The root is
    ``--trainer.default_root_dir``, by default ``runs``. Without ``--trainer.logger``, curves are written to
    ``metrics.csv`` and, if W&B is installed, to an offline W&B run in the same folder; ``WANDB_MODE=online`` uploads
    them.
    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._made: Path | None = None
        command = next((word for word in kwargs["args"] if word in self.subcommands()), None)
        if command is not None:
            # Only the parser that is needed, because building each one takes a fifth of a second.
            self.subcommands = lambda: {command: type(self).subcommands()[command]}  # type: ignore[method-assign]
        try:
            with _own_wandb_run():
                super().__init__(*args, **kwargs)
        except BaseException:
            if self._made is not None:
                rank_zero_only(runs.discard_empty)(self._made)
            raise

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in (*_WITHOUT_FOLDER, "score")}}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # No abbreviations: `--trainer.max_epoch` is reported as unknown instead of being completed.
        parser = super().init_parser(**kwargs, exit_on_error=False, allow_abbrev=False, add_help=False)
        parser.add_argument("-h", "--help", action=ShortHelp, help="Show the most important options and exit.")
        parser.add_argument("--help-all", action="help", help="Show all options and exit.")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the run's folder (default: the configuration's)."
        )
        # The metric for the best checkpoints, unless `trainer.callbacks` contains a `ModelCheckpoint`.
        parser.add_class_arguments(BestCheckpoint, "checkpoint")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Avoids Lightning's warning that `args` overrides `sys.argv`: these are those arguments, with names resolved.
        words = cast("list[str]", args)
        try:
            self.config = parser.parse_args(words)
        except ArgumentError as error:
            command = next(iter(self._subcommand_parsers))
            raise ValueError(of_parser(error.message, command, self._options(command, words, error.message))) from error
        checkpoint = self.config[self.config.subcommand].ckpt_path
        named = ("last",) if self.config.subcommand in _WITHOUT_FOLDER else ("last", "best", "hpc", "registry")
        if checkpoint is not None and checkpoint not in named:
            _check_checkpoint(checkpoint)

    def _options(self, command: str, words: Sequence[str], refused: str) -> list[str]:
        """Options of a command, and of the classes named in the rest of the command line."""
        actions = self._subcommand_parsers[command]._actions
        found = [option for action in actions for option in action.option_strings if not option.endswith(".help")]
        with suppress(ArgumentError, SystemExit):
            kept = [word for word in words if word not in refused.split()]
            found += [f"--{key}" for key in _argument_keys(self.parser.parse_args(kept)[command].as_dict())]
        return [option for option in found if option.startswith("--")]

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.name is None:
            files = [Path(str(file)).stem for file in config.config or []]
            config.name = "_".join(files) or config.model.class_path.rpartition(".")[2]
        if self.subcommand in _WITHOUT_FOLDER and config.ckpt_path == "last":
            parent = self._parent()
            found = runs.last_checkpoint(parent)
            if found is None:
                raise FileNotFoundError(
                    f"--ckpt_path: expected a run of this name that has a last.ckpt, found none in {parent}. Give "
                    "--name, or the file."
                )
            config.ckpt_path = str(found)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        whole = self.config[self.subcommand]
        config = whole.trainer
        leaves_nothing = self.subcommand in _WITHOUT_FOLDER or config.fast_dev_run
        folder = None if leaves_nothing else self._folder()
        if folder:
            kwargs["default_root_dir"] = str(folder)
        if config.logger in (None, True):
            kwargs["logger"] = _loggers(folder, _tags(whole)) if folder and self.subcommand != "score" else False
        if self.subcommand not in _WITHOUT_FOLDER:
            built = self._get(self.config_init, "trainer"), self._get(self.config_init, "checkpoint")
            kwargs["callbacks"] = with_checkpoints(*built)
        if config.enable_progress_bar is not False and "callbacks" in kwargs:
            has_own = any(isinstance(one, ProgressBar) for one in kwargs["callbacks"])
            kwargs["callbacks"] += [] if has_own else [SizeProgressBar()]
        trainer = super().instantiate_trainer(**kwargs)
        if folder:
            _continue_wandb(trainer.loggers, folder)
        return trainer

    @override
    def after_instantiate_classes(self) -> None:
        for part in (self.model, self.datamodule):
            if part is not None:  # the function that created it is not a hyperparameter
                vars(part).get("_hparams_initial", {}).pop("_instantiator", None)
        if isinstance(self.datamodule, ImageData):
            # These data sets are tensors in memory and need no workers.
            warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        if self.subcommand != "fit":
            # The other subcommands write no checkpoints, so their folder does not matter.
            warnings.filterwarnings("ignore", message="The dirpath has changed from")

    def before_fit(self) -> None:
        """Check names of layers before data is loaded, and keep the curves of an earlier start."""
        if self.config.fit.ckpt_path is None and not is_overridden("configure_model", self.model):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                _check_layers(self.model, callback)
        # CSVLogger deletes an existing file.
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger):
                rank_zero_only(runs.set_aside)(Path(logger.log_dir) / "metrics.csv")

    def after_fit(self) -> None:
        """Upload the last and the best checkpoint to W&B if the default loggers are used."""
        curves = _wandb_logger(self.trainer.loggers)
        if self.config.fit.trainer.logger not in (None, True) or curves is None or not self.trainer.is_global_zero:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        pruning = next((one for one in callbacks if isinstance(one, ScheduledPruning)), None)
        if pruning is not None:
            log_checkpoints(curves, self.trainer, pruning.report)

    def predict(self, **kwargs: Any) -> None:
        """Write the predictions to the run's folder, and print the file's name."""
        found = self.trainer.predict(**kwargs)
        if found is None or self._made is None:
            return
        batches: list[Any] = found
        if batches and all(isinstance(batch, torch.Tensor) and batch.ndim for batch in batches):
            kept: Any = torch.cat(batches)
            what = f"a tensor of {' × '.join(map(str, kept.shape))}"
        else:
            kept, what = batches, f"a list of {len(batches)} batches"
        several = self.trainer.world_size > 1
        file = self._made / (f"predictions-{self.trainer.global_rank}.pt" if several else "predictions.pt")
        torch.save(kept, file)
        print(f"Predictions: {file}, {what} in the order of the data. Read it with torch.load.")

    def _folder(self) -> Path:
        config = self.config[self.subcommand]
        parent = self._parent()
        checkpoint = runs.last_checkpoint(parent) if config.ckpt_path == "last" else config.ckpt_path
        earlier = runs.of_checkpoint(Path(checkpoint)) if checkpoint else None
        if earlier is not None and self.subcommand == "fit":
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            return earlier
        parent = earlier / str(self.subcommand) if earlier else parent
        # Other ranks use rank zero's folder, which exists already if rank zero started them.
        self._made = rank_zero_only(runs.new)(parent)
        return self._made or runs.latest(parent) or parent

    def _parent(self) -> Path:
        """The folder of all runs of this name."""
        config = self.config[self.subcommand]
        return Path(config.trainer.default_root_dir or "runs", config.name)


def example_of(model: LightningModule, datamodule: LightningDataModule | None) -> Any:
    """The first training batch, if the model has no ``example_input_array`` and there is data."""
    if model.example_input_array is not None or datamodule is None:
        return None
    return _first_batch(datamodule)


def _first_batch(datamodule: LightningDataModule) -> Any:
    datamodule.prepare_data()
    datamodule.setup("fit")
    return next(iter(datamodule.train_dataloader()))


def _required(command: str, ckpt_path: str | None) -> str:
    if ckpt_path is None:
        raise ValueError(
            f"{command}: expected a checkpoint, got none. Give --ckpt_path FILE, or last for the newest of the run."
        )
    return ckpt_path


def _training_inputs(data: LightningModule | LightningDataModule, samples: int) -> Iterator[Any]:
    """Inputs of the first training samples, batch by batch."""
    data.prepare_data()
    data.setup("fit")
    left = samples
    for batch in data.train_dataloader():
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield inputs[:left] if isinstance(inputs, torch.Tensor) else inputs
        left -= len(inputs)
        if left <= 0:
            return


def _test_batches(data: LightningModule | LightningDataModule, name: str, limit: int | float) -> Iterator[Any]:
    """The test or validation data, or as many of its batches (int) or the share of them (float) that the limit says."""
    data.prepare_data()
    data.setup("test" if name == "test" else "validate")
    loader = getattr(data, f"{name}_dataloader")()
    if isinstance(limit, float):
        yield from loader if limit == 1 else islice(loader, int(limit * len(loader)))
    else:
        yield from islice(loader, limit)


def run(words: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Parse a command line and run it.

    Args:
        words: The arguments after ``lightning-prune``.
        callbacks: Additional callbacks for the Trainer, not part of the configuration.
    """
    with warnings.catch_warnings(), _without_advertisements():
        # `before_fit` has prevented what this warns about.
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        # Intended when an optimizer is given.
        warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden by `PruningCLI")
        # Lightning 2.6's own use of PyTorch.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
        PruningCLI(
            args=list(words),
            trainer_class=PruningTrainer,
            parser_class=Parser,
            trainer_defaults={"callbacks": list(callbacks)} if callbacks else None,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_kwargs={"description": _DESCRIPTION, "prog": "lightning-prune"},
        )


@contextmanager
def _own_wandb_run() -> Iterator[None]:
    """Finish a W&B run that was started inside, so that the next command in this process starts a new one."""
    before = _wandb_run()
    try:
        yield
    finally:
        ours = _wandb_run()
        if ours is not None and ours is not before:
            ours.finish()


def _wandb_run() -> Any:
    wandb = sys.modules.get("wandb")
    return wandb.run if wandb else None


def _wandb_logger(loggers: Sequence[Logger]) -> WandbLogger | None:
    return next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)


def _continue_wandb(loggers: Sequence[Logger], folder: Path) -> None:
    """Resume the W&B run of a run that is resumed in its folder, unless the user gives another id."""
    logger, file = _wandb_logger(loggers), folder / runs.WANDB
    if logger is not None and logger.version is None and file.is_file():
        # The W&B run starts on first access; until then, the id is set in the logger's arguments.
        logger._id = logger._wandb_init["id"] = file.read_text(encoding="utf-8")


@contextmanager
def _without_advertisements() -> Iterator[None]:
    """Drop Lightning's "Tip: try installing" lines, which advertise other products among a run's messages."""
    source = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def useful(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("💡")

    source.addFilter(useful)
    try:
        yield
    finally:
        source.removeFilter(useful)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, without file names, empty values and the Trainer's defaults."""

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: told(item) for key, item in value.items() if item is not None}
        return [told(item) for item in value] if isinstance(value, list) else value

    usual = {name: argument.default for name, argument in signature(Trainer).parameters.items()}
    trainer = {key: value for key, value in config["trainer"].items() if value != usual.get(key)}
    settings = {**config, "trainer": trainer, "config": None}
    return {key: told(value) for key, value in settings.items() if value is not None and told(value) != {}}


def _tags(config: Any) -> list[str]:
    """Class names of a run's network, data and callbacks."""
    callbacks = config.trainer.callbacks or []
    parts = [config.get("model"), config.get("data"), *(callbacks if isinstance(callbacks, list) else [callbacks])]
    return [part.class_path.rpartition(".")[2] for part in parts if part is not None and "class_path" in part]


def _loggers(folder: Path, tags: list[str]) -> list[Logger]:
    # A logger's log folder is save_dir/name/version, and Lightning puts checkpoints there.
    loggers: list[Logger] = [CSVLogger(folder.parent, name="", version=folder.name)]
    if find_spec("wandb"):
        project = os.environ.get("WANDB_PROJECT", "lightning-prune")
        # Runs of a sweep's agent are online unless the user says otherwise.
        mode = os.environ.get("WANDB_MODE", None if "WANDB_SWEEP_ID" in os.environ else "offline")
        name = f"{folder.parent.name}/{folder.name}"
        # Quiet: prints where the run is, without a summary, which the report has.
        names: dict[str, Any] = {"name": name, "group": folder.parent.name, "tags": tags, "settings": {"quiet": True}}
        # Absolute: W&B writes from a separate process, which may have another working folder.
        loggers.append(WandbLogger(save_dir=folder.absolute(), project=project, mode=mode, **names))
    return loggers


def _check_checkpoint(path: str) -> None:
    """Refuse a file that is not a checkpoint; folders and remote files are left to Lightning."""
    file = Path(path)
    if "://" in path or file.is_dir():
        return
    if not file.is_file():
        raise FileNotFoundError(f"--ckpt_path: expected a checkpoint, or last, got {path}, which does not exist.")
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"--ckpt_path: expected a complete checkpoint, got {path} ({file.stat().st_size:,} bytes), which is "
            "another kind of file, or was cut off while it was written or copied. Use another checkpoint."
        )


def _check_layers(model: LightningModule, callback: Callback) -> None:
    """Refuse names in `layers` and `ignore` that match nothing in the network; tracing checks more."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for argument in ("layers", "ignore"):
        given = getattr(callback, argument, None)
        for pattern in [given] if isinstance(given, str) else given or []:
            if "#" not in pattern and not any(
                fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for name in names
            ):
                layers = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
                layers = list(dict.fromkeys(name for name in layers if name))
                raise ValueError(
                    f"--trainer.callbacks.{argument}: expected names of layers, got {pattern!r}, which matches none."
                    f"{near(pattern, names)} Layers: {', '.join(layers[:12])}{', ...' if layers[12:] else ''}."
                )


def _argument_keys(value: Any, key: str = "") -> Iterator[str]:
    """Every entry of a configuration, named as on the command line."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _argument_keys(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for item in value:
            yield from _argument_keys(item, key)
    else:
        yield key
