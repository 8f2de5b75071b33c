"""The autoencoder: its loss, its picture, and that only its latents and outputs keep their width."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import matplotlib.image
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import StructuredPruning, inspect
from lightning_prune.models import VAE
from lightning_prune.planning import OneShot

SMALL = {"input_shape": (1, 8, 8), "channels": (4, 6), "hidden": (16, 12), "latent": 3}


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.zeros(16)), batch_size=8)


def test_the_loss_is_the_formula() -> None:
    """BCE summed over pixels, KLD of a Gaussian summed over latents, by plain loops."""
    vae = VAE(**SMALL, beta=2.5).double().eval()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    bce = kld = 0.0
    with torch.no_grad():
        mean, log_variance = vae.encode(images)
        pixels = vae(images).sigmoid()
        for x, p in zip(images.flatten().tolist(), pixels.flatten().tolist(), strict=True):
            bce -= (x * math.log(p) + (1 - x) * math.log(1 - p)) / 2
        for m, v in zip(mean.flatten().tolist(), log_variance.flatten().tolist(), strict=True):
            kld += (m * m + math.exp(v) - v - 1) / 2 / 2
        vae.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        loss = vae._loss("val", [images])
    assert loss.item() == pytest.approx(bce + 2.5 * kld)


def test_a_fit_prunes_all_but_the_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(**SMALL)
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[StructuredPruning(pruning_ratio=0.5, schedule=OneShot(at=1))],
        logger=L.pytorch.loggers.CSVLogger(tmp_path),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(vae, loader(), loader())
    assert (vae.mean.out_features, vae.log_variance.out_features, vae.decoder[0].in_features) == (3, 3, 3)
    assert (vae.encoder[0].out_channels, vae.encoder[5].out_features, vae.mean.in_features) == (2, 8, 6)
    small = sum(parameter.numel() for parameter in vae.parameters())
    dense = sum(parameter.numel() for parameter in VAE(**SMALL).parameters())
    pictures = {path.name: matplotlib.image.imread(path) for path in tmp_path.rglob("reconstructions/*")}
    assert set(pictures) == {f"params={dense}.png", f"params={small}.png"}
    before, after = pictures[f"params={dense}.png"], pictures[f"params={small}.png"]
    assert before.shape[:2] == after.shape[:2] == (10 * 2 * 10, 10 * 8 * 10), "a pixel is 10 × 10 to see it"
    assert (before[:100] == after[:100]).all(), "the images above are the same"
    assert not (before[100:] == after[100:]).all()
    assert (before[::10, ::10].repeat(10, 0).repeat(10, 1) == before).all()
    assert {"val_bce", "val_kld", "val_loss"} <= trainer.callback_metrics.keys()


def test_latents_are_frozen_with_the_reason() -> None:
    """Traced with the training step, where the divergence sums over them."""
    from lightning_prune.callbacks.traced_models import traced_model_of
    from lightning_prune.structure import trace

    structure = trace(traced_model_of(VAE(**SMALL), [torch.rand(2, 1, 8, 8), torch.zeros(2)]))
    reasons = {entry.layer: entry.reason for entry in structure.frozen}
    assert "sum" in reasons["mean"]
    assert "decoder.0" in structure.widths
    assert inspect(VAE(**SMALL)).reachable > 0.9


@pytest.mark.parametrize(
    ("arguments", "text"), [({"input_shape": (1, 9, 8)}, "divisible by 4"), ({"beta": 0.0}, "`beta` above 0")]
)
def test_bad_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VAE(**{**SMALL, **arguments})
