"""A module that a user might have written, to be put into a file of its own."""

MODULE = '''
import torch
from lightning.pytorch import LightningModule
from torch import nn


class Mine(LightningModule):
    """A user's own module: one optimizer, no metric objects, nothing of ours."""

    def __init__(self, hidden: int = 20):
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(64, hidden)
        self.second = nn.Linear(hidden, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)
'''


REGRESSOR = '''
import torch
from lightning.pytorch import LightningModule
from torch import nn


class Regressor(LightningModule):
    """Reads a digit as a number: a convolution, a hidden layer, one output."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x):
        return self.head(self.features(x)).squeeze(1)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1].float())

    def validation_step(self, batch, batch_idx):
        self.log("val_mse", nn.functional.mse_loss(self(batch[0]), batch[1].float()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)
'''
