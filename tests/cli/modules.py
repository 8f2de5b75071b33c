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
