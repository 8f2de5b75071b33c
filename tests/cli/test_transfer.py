"""The recipes of transfer learning, on small images, with networks that need no download."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune
from lightning_prune.cli import main, recipes, verbs
from lightning_prune.models import ImageClassifier, ResNetCIFAR
from tests.support.data_files import write_flowers, write_mnist

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def _ready(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)


def unfrozen(run: str) -> list[float]:
    with Path(run, "metrics.csv").open() as file:
        return [float(row["unfreezing/layers"]) for row in csv.DictReader(file) if row.get("unfreezing/layers")]


def weights_of(depth: int) -> str:
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{n}": t for n, t in ResNetCIFAR(depth).state_dict().items()}}, "cifar.th")
    return "cifar.th"


@pytest.mark.filterwarnings("ignore:the classifier in .* does not fit")
@pytest.mark.parametrize("network", sorted(name for name in recipes.recipes() if name.startswith("flowers_")))
def test_networks_with_gradual_unfreezing(network: str, in_tmp: Path) -> None:
    write_flowers(in_tmp / "flowers")
    words = ["--model.network=torchvision.resnet18", "--model.size=32", "--model.pretrained=null", "--data.size=32"]
    if network == "flowers_resnet20":
        words = ["--model.depth=8", "--data.size=16", f"--model.pretrained={weights_of(8)}"]
    words += ["--trainer.max_epochs=3", "--trainer.callbacks.e_u=0.05", *QUIET]
    main(["fit", f"--config={network}", "--config=unfreeze", "--data.root=flowers", *words])
    layers = 7 if network == "flowers_resnet20" else 20
    assert unfrozen(f"runs/{network}_unfreeze/001")[-1] == layers


@pytest.mark.filterwarnings("ignore:the classifier in .* does not fit")
@pytest.mark.parametrize("data", ["mnist", "fashionmnist"])
def test_a_network_of_photographs_on_grey_images(data: str, in_tmp: Path) -> None:
    write_mnist(in_tmp, "MNIST" if data == "mnist" else "FashionMNIST")
    words = ["--model.depth=8", f"--model.pretrained={weights_of(8)}", "--trainer.max_epochs=2", *QUIET]
    main(["fit", f"--config={data}_resnet20", "--config=unfreeze", f"--data.root={in_tmp}", *words])
    model = lightning_prune.load_from_checkpoint(
        ResNetCIFAR, f"runs/{data}_resnet20_unfreeze/001/checkpoints/last.ckpt"
    )
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:Ridge f(its weights to fewer rows|olds only the mean)")  # a few images
def test_pruned_and_unfrozen(in_tmp: Path) -> None:
    """Two kinds of flowers; the cut comes before the first batch, and a resumed run goes on."""
    write_flowers(in_tmp / "flowers")
    words = ["--config=flowers_resnet50", "--config=xgb", "--data.root=flowers"]
    words += ["--model.network=torchvision.resnet18", "--model.size=32", "--model.pretrained=null"]
    words += ["--model.classes=2", "--data.classes=[rose,tulip]", "--data.size=32", "--data.batch_size=8", *QUIET]
    words += ["--trainer.callbacks.e_u=0.05"]
    main(["fit", *words, "--trainer.max_epochs=2"])
    run = "runs/flowers_resnet50_xgb/001"
    report: dict[str, Any] = json.loads(Path(run, "report.json").read_text())
    assert [cut["step"] for cut in report["cuts"]] == [0]
    dense = ImageClassifier("torchvision.resnet18", 2, 32)
    pruned = lightning_prune.load_from_checkpoint(ImageClassifier, f"{run}/checkpoints/last.ckpt")
    count, whole = (sum(p.numel() for p in model.parameters()) for model in (pruned, dense))
    assert count < whole
    assert unfrozen(run)[-1] == 13  # at the last of six batches: (5/3 − e_f) / e_u
    main(["fit", *words, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert unfrozen(run)[-1] == 20
    again = lightning_prune.load_from_checkpoint(ImageClassifier, f"{run}/checkpoints/last.ckpt")
    assert sum(p.numel() for p in again.parameters()) == count
