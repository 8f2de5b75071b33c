"""``--help`` of the training commands: the most important options; ``--help-all`` lists all of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _HelpAction
from collections.abc import Sequence
from textwrap import indent, wrap
from typing import Any

from typing_extensions import override

__all__ = ["FIRST", "ShortHelp"]

#: Options that ``--help`` lists, by purpose.
FIRST = {
    "What is run": {
        "--config": "a recipe (see `lightning-prune recipes`) or a file; later ones override earlier ones",
        "--model": "class of the network: ours (MLPClassifier) or yours (my_package.MyModule); --model.ARGUMENT",
        "--data": "class of the data: Digits, MNIST, ImageFolder, ... or yours; --data.ARGUMENT",
        "--optimizer": "SGD, AdamW, ... instead of the network's own; --optimizer.lr",
        "--lr_scheduler": "CosineAnnealingLR, ...; --lr_scheduler.T_max",
        "--seed_everything": "seed of all random numbers (default: 0)",
    },
    "What is pruned": {
        "--trainer.callbacks": "callbacks; += adds one (+=ContributionPruning), and its arguments follow: "
        "--trainer.callbacks.pruning_ratio 0.5, .schedule Cubic, .criterion Taylor, .layers, .ignore",
    },
    "How it trains": {
        "--trainer.max_epochs": "epochs",
        "--trainer.max_steps": "steps at most",
        "--trainer.accelerator": "auto, cpu, gpu",
        "--trainer.devices": "how many of them",
        "--trainer.strategy": "ddp, ... for several",
        "--trainer.precision": "32, bf16-mixed, 16-mixed, ...",
        "--trainer.accumulate_grad_batches": "number of batches per optimizer step",
        "--trainer.fast_dev_run": "true: run one batch of everything and write nothing",
    },
    "What it leaves": {
        "--name": "name of the folder (default: that of the configuration)",
        "--trainer.default_root_dir": "parent of the runs' folders (default: runs)",
        "--trainer.logger": "loggers instead of metrics.csv and W&B; false for none",
        "--checkpoint.monitor": "metric for the best checkpoint (default: the logged accuracy or loss)",
        "--ckpt_path": "checkpoint to continue from; last: the newest of this name",
    },
    "What is written": {
        "--file": "the file to write; for export, its suffix is the format (.onnx, .pt2, .pte, .xml)",
        "--samples": "training samples that give the ranges of the integers (default: 512)",
        "--runtime": "what runs the network on the device: torch or onnxruntime",
    },
}

_WIDTH, _COLUMN = 110, 38


class ShortHelp(_HelpAction):
    """Prints the options in `FIRST` if the parser has them, otherwise the full help."""

    @override
    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        options = {option for action in parser._actions for option in action.option_strings}
        if "--trainer.callbacks" in options:
            print(_short(parser, options))
        else:
            parser.print_help()
        parser.exit()


def _short(parser: ArgumentParser, options: set[str]) -> str:
    command = parser.prog.split()[-1]
    lines = [f"usage: lightning-prune {command} --config RECIPE [--OPTION VALUE ...]", "", parser.description or ""]
    for title, known in FIRST.items():
        shown = {option: text for option, text in known.items() if option in options}
        lines += ["", f"{title}:"] if shown else []
        for option, text in shown.items():
            first, *rest = wrap(text, _WIDTH - _COLUMN)
            lines += [f"  {option:<{_COLUMN - 2}}{first}", *(indent(line, " " * _COLUMN) for line in rest)]
    lines += [
        "",
        f"--help-all lists all {len(options)} options, --model.help CLASS and --data.help CLASS those of a class, and",
        "--trainer.callbacks.help CLASS those of a callback. --print_config prints the configuration and exits;",
        "--debug shows the traceback of an error.",
    ]
    return "\n".join(lines)
