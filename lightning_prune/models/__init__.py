"""The seed's networks as ordinary LightningModules: nothing in them knows of pruning."""

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.cnn import CNNClassifier
from lightning_prune.models.mlp import MLPClassifier
from lightning_prune.models.resnet import ResNetCIFAR
from lightning_prune.models.vae import VAE

__all__ = ["VAE", "CNNClassifier", "Classifier", "MLPClassifier", "ResNetCIFAR"]
