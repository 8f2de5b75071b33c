"""The papers' networks as ordinary LightningModules, without any pruning code."""

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.cnn import CNNClassifier
from lightning_prune.models.four_conv import FourConvClassifier
from lightning_prune.models.image import ImageClassifier
from lightning_prune.models.mlp import MLPClassifier
from lightning_prune.models.mobilenet import MobileNetV2CIFAR
from lightning_prune.models.pretrained import load_pretrained
from lightning_prune.models.resnet import ResNetCIFAR
from lightning_prune.models.segnet import SegNet
from lightning_prune.models.vae import VAE
from lightning_prune.models.vgg import VGG16CIFAR

__all__ = [
    "VAE",
    "VGG16CIFAR",
    "CNNClassifier",
    "Classifier",
    "FourConvClassifier",
    "ImageClassifier",
    "MLPClassifier",
    "MobileNetV2CIFAR",
    "ResNetCIFAR",
    "SegNet",
    "load_pretrained",
]
