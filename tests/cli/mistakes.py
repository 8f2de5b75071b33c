"""Plausible mistakes on the command line and what is said of them; ``python -m tests.cli.mistakes`` writes the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.cli.modules import MODULE

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"

_HEAD = """# Error messages of the command line

A mistake on the command line ends with exit code 2 and one line on stderr: what was expected, what was given, and what
to do. `--debug` shows the traceback instead. Errors in your code or in this package always show their traceback.

Each row is tested; `python -m tests.cli.mistakes` writes this page. `mine.py` is a module in the current folder.

| command | message, after `lightning-prune: ` |
|---|---|
"""

FILES = {
    "mine.py": MODULE,
    "broken.py": "class Mine(:\n",
    "needing.py": "import not_there\n",
    "tab.yaml": "model:\n\tclass_path: MLPClassifier\n",
    "star.yaml": "model: MLPClassifier\ntrainer:\n  callbacks:\n    - class_path: StructuredPruning\n"
    "      init_args: {pruning_ratio: 0.5, layers: [*.3]}\n",
    "text.yaml": "MLPClassifier",
    "empty.yaml": "",
    "entry.yaml": "model: MLPClassifier\ntrainers:\n  max_epochs: 2\n",
    "callback.yaml": "model: MLPClassifier\ntrainer:\n  callback: ContributionPruning\n",
    "arguments.yaml": (
        "model: MLPClassifier\ntrainer:\n  callbacks:\n    - class_path: ContributionPruning\n"
        "      init_arg: {pruning_ratio: 0.5}\n"
    ),
    "torn.ckpt": "the first half",
}


@dataclass(frozen=True)
class Mistake:
    """What was typed, and the line that answers it."""

    words: str
    answer: str

    @property
    def shown(self) -> str:
        """The command as a reader would type it."""
        return f"lightning-prune {self.words.replace('DIGITS', '--config digits_mlp_contribution')}".strip()


_COMMANDS = (
    "fit, validate, test, predict, inspect, score, export, quantise, latency_script, compare, controls, study, recipes"
)
_NETWORK = (
    "fit: expected a network, got none. Give a recipe that has one with --config (see `lightning-prune recipes`), "
    "or --model: one of this package (MLPClassifier) or your own (my_package.MyModule)."
)

MISTAKES = [
    # commands
    Mistake("", f"expected a command, got none. Commands: {_COMMANDS}. See --help."),
    Mistake("fitt", f"expected a command, got 'fitt'. Did you mean fit? Commands: {_COMMANDS}."),
    Mistake("recipes shwo xgb", "recipes: expected list, show, copy, got 'shwo'. Did you mean show?"),
    Mistake("recipes show", "recipes show: expected name, got none. See `lightning-prune recipes show --help`."),
    Mistake(
        "recipes show mnist",
        "expected a file or the name of a recipe, got 'mnist'. Did you mean mnist_mlp_contribution or mnist_resnet20?",
    ),
    Mistake(
        "compare nowhere",
        "compare: expected the folder of a finished run (with report.json, result.json or metrics.csv), or "
        "of several, got nowhere, which does not exist.",
    ),
    Mistake(
        "study run nowhere",
        "expected a file or the name of a study, got 'nowhere'. There are: cifar10_mobilenetv2, "
        "cifar10_resnet56, digits, fashionmnist, imagenet_resnet50.",
    ),
    # recipes and files
    Mistake("fit", _NETWORK),
    Mistake("fit --config filters", _NETWORK),
    Mistake(
        "fit --config digits_mlp",
        "expected a file or the name of a recipe, got 'digits_mlp'. Did you mean digits_mlp_contribution?",
    ),
    Mistake("fit --config", "--config: expected a value, got none."),
    Mistake(
        "fit digits_mlp_contribution",
        "fit: expected an option, got 'digits_mlp_contribution'. A recipe or a file comes after --config.",
    ),
    Mistake(
        "fit --config tab.yaml",
        "tab.yaml, line 2: expected valid YAML: found character '\\t' that cannot start any token.",
    ),
    Mistake(
        "fit --config star.yaml",
        "star.yaml, line 5: expected valid YAML: expected alphabetic or numeric character, but found '.'. Put names "
        'with * in quotes: "*.fc1".',
    ),
    Mistake(
        "fit --config text.yaml", "text.yaml: expected entries such as `model:` and `trainer:`, got 'MLPClassifier'."
    ),
    Mistake("fit --config empty.yaml", "empty.yaml: expected entries such as `model:` and `trainer:`, got nothing."),
    Mistake(
        "fit --config entry.yaml",
        "expected an entry that `fit` has, got `trainers.max_epochs`. Did you mean trainer.max_epochs?",
    ),
    Mistake(
        "fit --config callback.yaml",
        "expected an entry that `fit` has, got `trainer.callback`. Did you mean trainer.callbacks?",
    ),
    Mistake(
        "fit --config arguments.yaml",
        "trainer.callbacks: expected `class_path` and `init_args` in an entry, got `init_arg`.",
    ),
    # options
    Mistake(
        "fit --confg digits_mlp_contribution",
        "expected an option of `fit`, got --confg. Did you mean --config? `lightning-prune fit --help` lists them.",
    ),
    Mistake(
        "fit DIGITS --trainer.max_epoch 9",
        "expected an option of `fit`, got --trainer.max_epoch. Did you mean --trainer.max_epochs? "
        "`lightning-prune fit --help` lists them.",
    ),
    Mistake(
        "fit DIGITS --max_epochs 9",
        "expected an option of `fit`, got --max_epochs. Did you mean --trainer.max_epochs? `lightning-prune "
        "fit --help` lists them.",
    ),
    Mistake(
        "fit DIGITS --lr 0.1",
        "expected an option of `fit`, got --lr. Did you mean --model.lr? `lightning-prune fit --help` lists them.",
    ),
    Mistake("fit DIGITS --trainer.max_epochs", "--trainer.max_epochs: expected a value, got none."),
    Mistake("fit DIGITS --trainer.max_epochs two", "--trainer.max_epochs: expected a whole number or null, got 'two'."),
    Mistake(
        "fit DIGITS --trainer.precision 17",
        "--trainer.precision: expected 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 or null, got '17'.",
    ),
    Mistake(
        "fit DIGITS --trainer.accelerator gpuu",
        "--trainer.accelerator: expected auto, cpu, gpu or another of Lightning's names, got 'gpuu'.",
    ),
    Mistake(
        "fit DIGITS --trainer.devices 0",
        "--trainer.devices: expected a number of processes of at least 1, or auto, got '0'.",
    ),
    Mistake(
        "fit DIGITS --trainer.strategy dpp",
        "--trainer.strategy: expected auto, ddp, ddp_spawn or another of Lightning's names, got 'dpp'.",
    ),
    Mistake(
        "fit DIGITS --trainer.logger Wandb",
        "--trainer.logger: expected a Logger, got 'Wandb', which is unknown. Did you mean WandbLogger?",
    ),
    Mistake(
        "fit DIGITS --seed_everything often",
        "--seed_everything: expected true or false or a whole number, got 'often'.",
    ),
    Mistake(
        "fit DIGITS --optimizer SDG",
        "--optimizer: expected an Optimizer, got 'SDG', which is unknown. Did you mean SGD?",
    ),
    Mistake(
        "fit DIGITS --optimizer SGD --lr_scheduler CosineAnnealingLR",
        "CosineAnnealingLR: expected --lr_scheduler.T_max, got none.",
    ),
    # networks and data
    Mistake(
        "fit --model MLPClasifier",
        "--model: expected a LightningModule, got 'MLPClasifier', which is unknown. Did you mean MLPClassifier?",
    ),
    Mistake(
        "fit --model mine.Missing",
        "--model: expected a class of mine, got 'Missing', which it does not have. It has Mine.",
    ),
    Mistake(
        "fit --model mine.py",
        "--model: expected a class, got the file mine.py. Give a class in its module: mine.MyClass.",
    ),
    Mistake(
        "fit --model nowhere.Mine",
        "--model: expected the import path of a class, got nowhere.Mine, but there is no module 'nowhere', "
        "installed or in the current folder.",
    ),
    Mistake(
        "fit --model needing.Mine",
        "--model: needing.Mine cannot be imported, because there is no module 'not_there'. Install it.",
    ),
    Mistake(
        "fit --model broken.Mine",
        "--model: expected a class that can be imported, got broken.Mine: invalid syntax (broken.py, line 1).",
    ),
    Mistake(
        "fit --model torch.nn.Linear", "--model: expected a LightningModule, got torch.nn.Linear, which is not one."
    ),
    Mistake(
        "fit --model mine.Mine --trainer.max_epochs 9",
        "fit: expected data, got none. Give --data: one of this package (Digits) or your own (my_package.MyData), or "
        "define `train_dataloader` in the module.",
    ),
    Mistake(
        "inspect --model mine.Mine",
        "Mine: expected an example of what `forward` takes, found none. Set `example_input_array` in the "
        "module, or pass an `example`.",
    ),
    Mistake(
        "fit DIGITS --model.learning_rate 0.1",
        "expected an argument of MLPClassifier, got --model.learning_rate. Its arguments are sizes, optimizer, lr, "
        "momentum, weight_decay, pretrained.",
    ),
    Mistake("fit DIGITS --model.sizes 784", "--model.sizes: expected a list, got '784'."),
    Mistake(
        "fit DIGITS --trainer.precision bf16-true",
        "Lightning's summary of the model does not convert its example to the precision of the run (mat1 and mat2 must "
        "have the same dtype, but got Float and BFloat16). Give --trainer.enable_model_summary=false.",
    ),
    Mistake(
        "fit DIGITS --model.sizes [784,50,10]",
        "expected a network that accepts this data, got one for another shape (mat1 and mat2 shapes cannot be "
        "multiplied (64x64 and 784x50)). Check --model and --data.",
    ),
    Mistake(
        "fit DIGITS --data Digit",
        "--data: expected a LightningDataModule, got 'Digit', which is unknown. Did you mean Digits?",
    ),
    Mistake(
        "fit DIGITS --data.batchsize 8",
        "expected an argument of Digits, got --data.batchsize. Did you mean --data.batch_size?",
    ),
    Mistake("fit DIGITS --data.batch_size 0", "Digits: expected `batch_size` of at least 1, got 0."),
    Mistake(
        "fit --config mnist_mlp_contribution --data.root nowhere",
        "MNIST: expected its files under nowhere in torchvision's layout, found no complete set. Give their folder "
        "as `root` or in the environment variable LIGHTNING_PRUNE_DATA, or omit both to download them.",
    ),
    Mistake(
        "fit --config flowers_resnet20 --config xgb",
        "ImageFolder: expected `root`, a folder with one sub-folder of images per class, got none. Give "
        "`--data.root FOLDER`.",
    ),
    # pruning
    Mistake(
        "fit DIGITS --trainer.callbacks ContributionPrunning",
        "--trainer.callbacks: expected a Callback, got 'ContributionPrunning', which is unknown. Did you mean"
        " ContributionPruning?",
    ),
    Mistake(
        "fit --model MLPClassifier --trainer.callbacks.pruning_ratio 0.5",
        "--trainer.callbacks: expected a callback that has the option `pruning_ratio`, got none. "
        "Add one: --trainer.callbacks+=ContributionPruning --trainer.callbacks.pruning_ratio=...",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.pruning_ration 0.5",
        "expected an argument of ContributionPruning, got --trainer.callbacks.pruning_ration. Did you mean "
        "--trainer.callbacks.pruning_ratio?",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.pruning_ratio half",
        "--trainer.callbacks.pruning_ratio: expected a number, a mapping or null, got 'half'.",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.pruning_ratio 50",
        "expected `pruning_ratio` (the share of units to remove) in [0, 1), got 50.0 (did you mean 0.5?)",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.budget 0.5",
        "expected exactly one of `pruning_ratio` (the share of units to remove) and `budget` (what remains), "
        "got both: pruning_ratio=0.5, budget=0.5. Set one of them to None (null in YAML).",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.schedule Geometrc",
        "--trainer.callbacks.schedule: expected a Schedule, got 'Geometrc', which is unknown. Did you mean Geometric?",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.schedule.strat 5",
        "expected an argument of Geometric, got --trainer.callbacks.schedule.strat. Did you mean "
        "--trainer.callbacks.schedule.start?",
    ),
    Mistake(
        "fit DIGITS --trainer.callbacks.layers layer.1",
        "--trainer.callbacks.layers: expected names of layers, got 'layer.1', which matches none. Did you "
        "mean layers.1? Layers: layers.1, layers.3, layers.5.",
    ),
    Mistake(
        "fit DIGITS --trainer.max_epochs 10",
        "Geometric(rate=0.1, start=25, end=None, every=5, unit='auto') never fires: its first cut is due "
        "after epoch 25, but the run has 10 epoch(s) and the last cut can fall after 9. Let it start earlier,"
        " or train longer.",
    ),
    Mistake(
        "fit DIGITS --checkpoint.monitor val_distance",
        "checkpoint.mode: expected min or max, got none, and the name 'val_distance' does not show which is"
        " better. Give --checkpoint.mode.",
    ),
    Mistake(
        "score DIGITS",
        "score: expected one `XGBPruning` in `trainer.callbacks`, got 0. Its arguments determine how layers are"
        " scored.",
    ),
    # checkpoints
    Mistake(
        "fit DIGITS --ckpt_path nowhere.ckpt",
        "--ckpt_path: expected a checkpoint, or last, got nowhere.ckpt, which does not exist.",
    ),
    Mistake(
        "fit DIGITS --ckpt_path torn.ckpt",
        "--ckpt_path: expected a complete checkpoint, got torn.ckpt (14 bytes), which is another kind of file, "
        "or was cut off while it was written or copied. Use another checkpoint.",
    ),
    Mistake(
        "fit DIGITS --ckpt_path best",
        "--ckpt_path: expected a file or last, got best, which is not known before a run. Give the file.",
    ),
]


def _cell(text: str) -> str:
    """A text as Markdown takes it in a table: what is no code must not be read as any markup."""
    return re.sub(r"([|*_<>\[\]])(?=(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", text)


def page() -> str:
    """The page with all of them."""
    return _HEAD + "".join(f"| `{one.shown}` | {_cell(one.answer)} |\n" for one in MISTAKES)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
