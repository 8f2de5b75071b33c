"""The contribution paper's variational autoencoder, as an ordinary LightningModule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.extras import require

__all__ = ["VAE", "Encoding"]

# Images in a figure of reconstructions, and the pixels between them.
_SHOWN, _GAP = 8, 2

# Minimum width of the figure in pixels.
_PICTURE = 800


class Encoding(NamedTuple):
    """Mean and log variance of the latent Gaussian, each ``(batch, latent)``."""

    mean: Tensor
    log_variance: Tensor


@final
class VAE(LightningModule):
    r"""Convolutional variational autoencoder (Kingma & Welling, 2014; β after Higgins et al., 2017).

    Two convolution blocks halve the image twice, dense layers lead to the latent Gaussian, and the decoder mirrors
    both. The loss is :math:`\mathrm{BCE} + \beta\,\mathrm{KLD}`, summed over pixels or latents and averaged over the
    batch, as in the contribution paper's section 4.2; the two terms are logged separately.

    At each validation during training, ``reconstructions/params=<size>.png`` next to the logs shows validation images
    and their reconstructions: one file for every size of the network, and all of them in W&B.

    The latent width cannot be pruned, because the divergence sums over it.

    Args:
        input_shape: Channels, height and width of an image with pixels in [0, 1]; height and width divisible by 4.
        channels: Channels of the two blocks.
        hidden: Widths of the dense layers between the blocks and the latents (two or three in the paper).
        latent: Width of the latent Gaussian.
        beta: Weight of the divergence, above 0.
        lr: Learning rate of Adam.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        channels: tuple[int, int] = (32, 64),
        hidden: Sequence[int] = (512, 256),
        latent: int = 32,
        beta: float = 1.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        depth, height, width = input_shape
        if height % 4 or width % 4:
            raise ValueError(
                f"VAE: expected a height and width divisible by 4 (two strides of 2), got {height}×{width}. Pad or "
                "resize the images."
            )
        if not beta > 0:
            raise ValueError(f"VAE: expected `beta` above 0, got {beta}.")
        self.save_hyperparameters()
        self.beta, self.lr = beta, lr
        self.example_input_array = torch.zeros(2, *input_shape)
        first, second = channels
        flat = second * height * width // 16
        self.encoder = nn.Sequential(
            nn.Conv2d(depth, first, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            *_dense((flat, *hidden)),
        )
        self.mean = nn.Linear(hidden[-1], latent)
        self.log_variance = nn.Linear(hidden[-1], latent)
        self.decoder = nn.Sequential(
            *_dense((latent, *reversed(hidden), flat)),
            nn.Unflatten(1, (-1, height // 4, width // 4)),
            nn.ConvTranspose2d(second, first, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(first, depth, 4, stride=2, padding=1),
        )

    def encode(self, images: Tensor) -> Encoding:
        """The latent Gaussian of each image."""
        features = self.encoder(images)
        return Encoding(self.mean(features), self.log_variance(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the reconstruction from the latent mean, of the shape of ``images``."""
        logits: Tensor = self.decoder(self.encode(images).mean)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of one batch, with a sample of the latents."""
        return self._loss("train", batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``, ``val_bce`` and ``val_kld``, from the latent means, and reconstructions in training."""
        self._loss("val", batch)
        if batch_idx == 0 and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._show(batch[0])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Logs ``test_loss``, ``test_bce`` and ``test_kld``, from the latent means."""
        self._loss("test", batch)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Reconstructions with pixels in [0, 1]."""
        pixels: Tensor = self(batch[0]).sigmoid()
        return pixels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    @torch.no_grad()
    def picture(self, images: Tensor, path: str | Path) -> Path:
        """Save a figure of images with their reconstructions below.

        Args:
            images: ``(batch, channels, height, width)`` with 1 or 3 channels; the first eight are shown.
            path: The file.

        Returns:
            The file.
        """
        Image = require("matplotlib.image", extra="plot")  # noqa: N806
        shown = images[:_SHOWN].to(self.device)
        mode, _ = self.training, self.eval()
        rows = torch.stack([shown, self(shown).sigmoid()])  # (2, n, channels, height, width)
        self.train(mode)
        framed = F.pad(rows, (0, _GAP, 0, _GAP), value=1.0)
        page = framed.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (2·height, n·width, channels)
        page = page.expand(*page.shape[:2], 3).clamp(0, 1).cpu()
        times = math.ceil(_PICTURE / page.shape[1])  # whole pixels, so that nothing is blurred
        Image.imsave(path, page.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy())
        return Path(path)

    def _show(self, images: Tensor) -> None:
        """Save one figure per size of the network next to the logs, and all of them in W&B."""
        folder = self.trainer.log_dir  # asked of all processes
        if folder is None or not self.trainer.is_global_zero:
            return
        size = sum(parameter.numel() for parameter in self.parameters())
        home = Path(folder) / "reconstructions"
        home.mkdir(parents=True, exist_ok=True)
        path = self.picture(images, home / f"params={size}.png")
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("reconstructions", [str(path)], caption=[f"{size:,} parameters"])

    def _loss(self, stage: Literal["train", "val", "test"], batch: Sequence[Tensor]) -> Tensor:
        images = batch[0]
        mean, log_variance = self.encode(images)
        latents = mean
        if self.training:
            latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        bce = F.binary_cross_entropy_with_logits(self.decoder(latents), images, reduction="sum") / len(images)
        kld = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum() / len(images)
        loss = bce + self.beta * kld
        numbers = {f"{stage}_loss": loss, f"{stage}_bce": bce, f"{stage}_kld": kld}
        self.log_dict(numbers, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers of these widths, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers
