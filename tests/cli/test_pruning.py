"""Pruning from the command line: the shipped recipes, one's own module, inspect."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image

import lightning_prune
from lightning_prune.cli import main, recipes, verbs
from lightning_prune.data.torchvision import MNIST
from lightning_prune.models import VAE, CNNClassifier, MLPClassifier
from tests.cli.modules import MODULE
from tests.support.data_files import write_celeba, write_cifar, write_cityscapes, write_mnist

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--config=digits_mlp_contribution", "--data.train_limit=60", *QUIET]
SHORT = ["--trainer.max_epochs=5", "--trainer.callbacks.schedule=OneShot"]
FOLDER = ["--model.classes=2", "--data.batch_size=4"]
# `<dataset>_<model>_<method>` is a whole experiment; `<dataset>_<model>` and `<method>` make one together.
WHOLE, NETWORKS, METHODS = ({name for name in recipes.recipes() if name.count("_") == n} for n in (2, 1, 0))
NETWORKS, METHODS = (
    {name for name in NETWORKS if name.startswith("cifar10")},
    METHODS - {"unfreeze", "xgb"},
)


@pytest.fixture(autouse=True)
def _ready(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(in_tmp))
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)  # W&B takes seconds to start; test_verbs has it


def load(kind: type[LightningModule], run: str) -> Any:
    return lightning_prune.load_from_checkpoint(kind, f"{run}/checkpoints/last.ckpt")


def halved(run: str) -> MLPClassifier:
    small: MLPClassifier = load(MLPClassifier, run)
    assert [layer.out_features for layer in small.layers if isinstance(layer, torch.nn.Linear)] == [25, 15, 10]
    return small


def test_the_digits_recipe_halves_the_network(measured: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *DIGITS])
    run = "runs/digits_mlp_contribution/001"
    small = halved(run)
    assert {"report.json", "report.md", "report.png"} <= {path.name for path in Path(run).iterdir()}
    header = Path(run, "metrics.csv").read_text().partition("\n")[0]
    assert "pruning/params" in header
    printed = capsys.readouterr().out.partition("Best checkpoint: ")[2]
    best = lightning_prune.load_from_checkpoint(MLPClassifier, printed.split()[0])
    assert [w.shape for w in best.parameters()] == [w.shape for w in small.parameters()]


def test_the_digits_recipe_shortened_as_in_the_docs() -> None:
    words = ["--trainer.max_epochs=30", "--trainer.callbacks.schedule.start=5", "--trainer.callbacks.schedule.every=3"]
    main(["fit", *DIGITS, *words])
    halved("runs/digits_mlp_contribution/001")


def test_the_spvr_recipe_meets_its_budget(in_tmp: Path) -> None:
    words = ["--trainer.max_epochs=3", "--trainer.callbacks.schedule.at=2", "--trainer.callbacks.samples_per_class=5"]
    main(["fit", "--config=digits_cnn_spvr", *words, *QUIET])
    small = load(CNNClassifier, "runs/digits_cnn_spvr/001")
    left = sum(parameter.numel() for parameter in small.parameters())
    assert 0.05 * 15_562 < left <= 0.1 * 15_562
    assert list(Path("runs/digits_cnn_spvr/rankings").glob("*/*.pt")), "what was ranked is written down"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shapes_segnet_spvr", ["--data.count=60"]),
        (
            "cityscapes_segnet_spvr",
            [
                *("--model.stages=[[16,2],[16,2]]", "--model.input_shape=[3,16,32]", "--data.batch_size=4"),
                *("--data.height=16", "--data.width=32", "--data.workers=0"),
            ],
        ),
        ("fashionmnist_cnn_spvr", []),
        ("cifar10_vgg16_spvr", []),
        pytest.param("cifar10_resnet56_spvr", [], marks=pytest.mark.slow),
        pytest.param("cifar10_resnet34_spvr", [], marks=pytest.mark.slow),
        pytest.param(
            "tinyimagenet_resnet34_spvr", ["--model.classes=2", "--data.batch_size=4"], marks=pytest.mark.slow
        ),
        pytest.param(
            "imagenet_resnet50_spvr",
            ["--model.classes=2", "--data.batch_size=4", "--data.size=64", "--model.pretrained=null"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_recipes_with_the_values_of_spvr_start(
    name: str, words: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On tiny files, through the checks before the first step, a batch of each stage."""
    write_mnist(in_tmp, "FashionMNIST")
    write_cifar(in_tmp, monkeypatch, train=100)
    write_cityscapes(in_tmp)
    for part, kind in itertools.product(("train", "val"), ("a", "b")):
        (in_tmp / "folder" / part / kind).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (64, 64), (20 * number, 0, 0)).save(in_tmp / "folder" / part / kind / f"{number}.png")
    roots = {
        "fashionmnist": in_tmp,
        "cifar10": in_tmp,
        "cityscapes": in_tmp,
        "tinyimagenet": in_tmp / "folder",
        "imagenet": in_tmp / "folder",
    }
    root = roots.get(name.partition("_")[0])
    place = [] if root is None else [f"--data.root={root}"]
    short = ["--trainer.fast_dev_run=true"]
    short += [] if "segnet" in name else ["--trainer.callbacks.samples_per_class=1"]
    main(["fit", f"--config={name}", *place, *words, *short, *QUIET])
    assert "`Trainer.fit` stopped: `max_steps=1` reached." in caplog.text


# As another, but for the data: to be trained by the same callbacks for as long.
TWINS = {
    "mnist_mlp_contribution": "fashionmnist_mlp_contribution",
    "cifar100_cnn_contribution": "cifar10_cnn_contribution",
}


@pytest.mark.parametrize("name", TWINS)
def test_recipes_that_differ_in_their_data_start(
    name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine, other = (yaml.safe_load(recipes.path(each).read_text()) for each in (name, TWINS[name]))
    assert mine["trainer"] == other["trainer"]
    assert mine["model"]["class_path"] == other["model"]["class_path"]
    write_mnist(in_tmp)
    write_cifar(in_tmp, monkeypatch, 100)
    main(["fit", f"--config={name}", f"--data.root={in_tmp}", "--trainer.fast_dev_run=true", *QUIET])
    assert "`Trainer.fit` stopped: `max_steps=1` reached." in caplog.text


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name in WHOLE - {"digits_mlp_contribution", "digits_cnn_xgb", *TWINS} if not name.endswith("_spvr")
    ),
)
def test_the_other_recipes_run(name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny files, with the recipe's own schedule and epochs where a batch holds all of them."""
    write_mnist(in_tmp, "FashionMNIST")
    write_cifar(in_tmp, monkeypatch)
    write_celeba(in_tmp, monkeypatch)
    small = ["--model.channels=[8,8]", "--model.hidden=[40,16]", "--data.workers=0"] if "celeba" in name else []
    main(["fit", f"--config={name}", f"--data.root={in_tmp}", *small, *QUIET])
    if "cnn" in name:
        small = load(CNNClassifier, f"runs/{name}/001")
        assert [small.features[0].out_channels, small.features[4].out_channels] == [16, 32]
        assert [small.classifier[1].out_features, small.classifier[3].out_features] == [151, 76]
    elif "vae" in name:
        small = load(VAE, f"runs/{name}/001")
        found = [small.encoder[0].out_channels, small.encoder[5].out_features, small.mean.out_features]
        assert found == ([6, 28, 128] if "celeba" in name else [22, 358, 32])
        assert len(list(Path(f"runs/{name}/001/reconstructions").iterdir())) == 5, "one picture for each size"
    elif "magnitude" in name:
        sparse = load(MLPClassifier, f"runs/{name}/001")
        weights = torch.cat([weight.flatten() for weight in sparse.parameters() if weight.ndim > 1])
        assert float((weights == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    else:
        small = load(MLPClassifier, f"runs/{name}/001")
        assert [small.layers[1].out_features, small.layers[3].out_features] == [16, 10]


@pytest.mark.parametrize(
    ("network", "method"),
    [("cifar10_fourconv", method) for method in sorted(METHODS)]
    + [(network, "filters") for network in sorted(NETWORKS - {"cifar10_fourconv"})]
    + [("cifar10_vgg16", "slimming")],
)
def test_a_network_and_a_method(network: str, method: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few epochs on a tiny file; the schedules are shares of the run."""
    write_cifar(in_tmp, monkeypatch)
    words = [f"--config={network}", f"--config={method}", f"--data.root={in_tmp}", *QUIET]
    words += ["--trainer.max_epochs=5" if network == "cifar10_fourconv" else "--trainer.max_epochs=2"]
    words += ["--model.batch_norm=true"] if (network, method) == ("cifar10_fourconv", "slimming") else []
    main(["fit", *words])
    run = f"runs/{network}_{method}/001"
    kind = yaml.safe_load(Path(run, "config.yaml").read_text())["model"]["class_path"].rpartition(".")[2]
    pruned, dense = load(getattr(lightning_prune.models, kind), run), getattr(lightning_prune.models, kind)()
    if method in ("magnitude", "hybrid"):
        left, whole = (sum(int(w.count_nonzero()) for w in m.parameters() if w.ndim > 1) for m in (pruned, dense))
        assert left / whole == pytest.approx({"magnitude": 0.2, "hybrid": 0.5}[method], abs=0.02)
    else:
        widths = [
            [layer.out_channels for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
            for model in (pruned, dense)
        ]
        if method == "filters":
            assert widths[0][0] == round(0.66 * widths[1][0])
        else:
            assert sum(widths[0]) / sum(widths[1]) == pytest.approx(0.5, abs=0.02)


def test_the_learning_rate_goes_on_over_a_cut_and_a_resume(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's cosine, of six epochs with a cut after three; stopped after five."""
    write_cifar(in_tmp, monkeypatch)
    words = ["--config=cifar10_resnet", "--config=filters", f"--data.root={in_tmp}", "--model.depth=8", *QUIET]
    words += ["--lr_scheduler.T_max=6", "--trainer.callbacks.schedule.at=3", "--trainer.log_every_n_steps=1"]
    words += ["--trainer.callbacks+=LearningRateMonitor"]
    main(["fit", *words, "--name=whole", "--trainer.max_epochs=6"])
    main(["fit", *words, "--name=stopped", "--trainer.max_epochs=5"])
    main(["fit", *words, "--name=stopped", "--trainer.max_epochs=6", "--ckpt_path=last"])
    whole, stopped = curves("runs/whole/001"), curves("runs/stopped/001")
    assert [rate for rate, _ in whole.values()] == pytest.approx(
        [(1 + math.cos(math.pi * n / 6)) / 20 for n in range(6)]
    )
    assert (min(stopped) > 3, max(stopped)) == (True, 5), "resumed after the cut"
    assert stopped == {epoch: whole[epoch] for epoch in stopped}


def curves(run: str) -> dict[int, tuple[float, float]]:
    """Learning rate and loss of every epoch that the last start logged."""
    with Path(run, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    losses = {int(row["epoch"]): float(row["train_loss"]) for row in rows if row["train_loss"]}
    return {epoch: (rate, losses[epoch]) for rate, epoch in zip(rates, losses, strict=True)}


def test_a_recipe_with_ones_own_module() -> None:
    main(["fit", *DIGITS, *SHORT, "--model=mine.Mine"])
    import mine

    assert load(mine.Mine, "runs/digits_mlp_contribution/001").first.out_features == 10


def test_short_names_and_overrides() -> None:
    words = ["--trainer.callbacks=StructuredPruning", "--trainer.callbacks.criterion=L1"]
    words += ["--trainer.callbacks.pruning_ratio=0.25", "--trainer.callbacks.schedule=OneShot"]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    main(
        [
            "fit",
            "--model=MLPClassifier",
            "--model.sizes=[64,12,10]",
            "--data=Digits",
            "--trainer.max_epochs=3",
            *words,
            *QUIET,
        ]
    )
    assert load(MLPClassifier, "runs/MLPClassifier/001").layers[1].out_features == 9
    saved = yaml.safe_load(Path("runs/MLPClassifier/001/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["criterion"]["class_path"].endswith("L1")


def test_a_schedule_that_waits_and_an_extension_that_prepares() -> None:
    words = ["--trainer.callbacks.schedule=WhenStable", "--trainer.callbacks.schedule.threshold=0.5"]
    words += ["--trainer.callbacks.schedule.window=2", "--trainer.callbacks.schedule.start=1"]
    words += ["--trainer.callbacks.schedule.latest=4", "--trainer.callbacks.schedule.every=1"]
    words += ["--trainer.callbacks.criterion=Contribution", "--trainer.callbacks.criterion.every_n_batches=1"]
    words += ["--trainer.callbacks.extensions+=GrowPenalty", "--trainer.callbacks.extensions.jump=1e-9"]
    words += ["--trainer.callbacks.extensions.over=2"]
    options = ["--data.train_limit=60", "--trainer.max_epochs=7"]
    main(["fit", "--config=digits_mlp_contribution", *words, *options, *QUIET])
    run = Path("runs/digits_mlp_contribution/001")
    report = json.loads((run / "report.json").read_text())
    assert [cut["epoch"] for cut in report["cuts"]] == [5]
    assert "Cut 1 changed the held-out loss by" in report["notes"][-1]
    settings = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert settings["schedule"]["class_path"].endswith("WhenStable")
    assert settings["extensions"][0]["init_args"] == {"jump": 1e-9, "over": 2, "samples": 2000}


def test_extensions_of_both_kinds_by_name() -> None:
    """Also of a preset, whose other arguments stay typed."""
    words = ["--trainer.callbacks=NetworkSlimming", "--trainer.callbacks.pruning_ratio=0.5"]
    words += ["--trainer.callbacks.penalty=GroupLasso", "--trainer.callbacks.criterion=L2"]
    words += ["--trainer.callbacks.schedule=OneShot", "--trainer.callbacks.schedule.at=1"]
    words += ["--trainer.callbacks.layers=layers.1", "--trainer.callbacks.extensions+=Ridge"]
    words += ["--trainer.callbacks.extensions.batches=3", "--trainer.callbacks.extensions+=Rollback"]
    words += ["--trainer.callbacks.extensions.epochs=2", "--trainer.callbacks.extensions+=SaveEachSize"]
    main(["fit", "--config=digits_mlp_contribution", "--data.train_limit=60", *words, "--trainer.max_epochs=3", *QUIET])
    run = Path("runs/digits_mlp_contribution/001")
    assert json.loads((run / "report.json").read_text())["cuts"][0]["after"] == {"layers.1": 25}
    assert len(list((run / "sizes").iterdir())) == 2
    settings = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert settings["layers"] == "layers.1"
    names = [one["class_path"].rpartition(".")[2] for one in settings["extensions"]]
    assert names == ["Ridge", "Rollback", "SaveEachSize"]
    assert settings["extensions"][1]["init_args"]["epochs"] == 2


def test_a_pruned_run_resumes_and_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *DIGITS, *SHORT])
    run = "runs/digits_mlp_contribution/001"
    main(["fit", *DIGITS, *SHORT, "--trainer.max_epochs=7", "--ckpt_path=last"])
    assert [path.name for path in Path("runs/digits_mlp_contribution").iterdir()] == ["001"]
    assert load(MLPClassifier, run).layers[1].out_features == 25
    assert torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["epoch"] == 6
    for verb in ("validate", "test", "predict"):
        main([verb, f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"])
        assert Path(run, verb, "001").is_dir()
    capsys.readouterr()
    main(["inspect", f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"])
    assert "40 units in 2 groups" in capsys.readouterr().out


def test_the_last_checkpoint_is_the_newest() -> None:
    """Also where nothing has become better since the cut: `save_last` of the best one would write none."""
    main(["fit", *DIGITS, *SHORT, "--model.lr=0", "--trainer.max_epochs=6"])
    found = {file.name: torch.load(file, weights_only=True)["epoch"] for file in Path().rglob("*.ckpt")}
    assert found.pop("last.ckpt") == 5
    assert max(found.values()) < 5
    main(["fit", *DIGITS, *SHORT, "--model.lr=0", "--trainer.max_epochs=8", "--ckpt_path=last"])
    assert [torch.load(file, weights_only=True)["epoch"] for file in Path().rglob("last*.ckpt")] == [7]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model=MLPClassifier"], ["layers.1", "layers.3"]),
        (["--model=mine.Mine", "--data=Digits"], ["first"]),
        (["--config=digits_mlp_contribution"], ["layers.1", "layers.3"]),
    ],
)
def test_inspect(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", *words])
    text = capsys.readouterr().out
    for name in expected:
        assert name in text
    assert not Path("runs").exists()


def test_inspect_without_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--model=mine.Mine"])
    assert "example" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--trainer.callbacks.pruning_ratio=1.5"], "pruning_ratio"),
        (["--trainer.callbacks.budget=0.5"], "pruning_ratio"),
        (["--trainer.callbacks=StructuredPruning", "--trainer.callbacks.criterion=taylr"], "Did you mean Taylor?"),
        (
            ["--trainer.callbacks.layers=nonsense"],
            "callbacks.layers: expected names of layers, got 'nonsense'",
        ),
        (["--trainer.callbacks.layers=*#head_dim"], "layers='*#head_dim': expected features of attention heads"),
    ],
)
def test_bad_amounts_and_layers(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["fit", *DIGITS, *SHORT, *words])
    assert error.value.code == 2
    assert text in capsys.readouterr().err
    assert not list(Path("runs").glob("*/*")), "an empty run"


def test_faults_of_code_keep_their_traceback(in_tmp: Path) -> None:
    (in_tmp / "broken.py").write_text(MODULE.replace("return torch", 'raise ValueError("mine") or torch'))
    with pytest.raises(ValueError, match="mine"):
        main(["fit", *DIGITS, *SHORT, "--model=broken.Mine"])
    with pytest.raises(ValueError, match="nonsense"):
        main(["fit", *DIGITS, *SHORT, "--trainer.callbacks.layers=nonsense", "--debug"])


@pytest.mark.parametrize(("name", "cause"), [("odd", "KeyError('never raised')"), ("odder", "error")])
def test_an_error_with_an_odd_cause_is_shown(in_tmp: Path, name: str, cause: str) -> None:
    """A cause that was never raised has no traceback; one that is the error itself has no end."""
    raising = f'error = ValueError("mine")\n        raise error from {cause}'
    (in_tmp / f"{name}.py").write_text(MODULE.replace("return torch", f"{raising}\n        return torch"))
    with pytest.raises(ValueError, match="mine"):
        main(["fit", *DIGITS, *SHORT, f"--model={name}.Mine"])


def test_missing_data_is_named(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=mnist_mlp_contribution", f"--data.root={in_tmp}", *QUIET])
    assert MNIST.__name__ in capsys.readouterr().err
