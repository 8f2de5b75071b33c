"""Image data sets as LightningDataModules, most of them kept in memory as normalised tensors."""

from lightning_prune.data.celeba import CelebA
from lightning_prune.data.cityscapes import Cityscapes
from lightning_prune.data.digits import Digits
from lightning_prune.data.folder import ImageFolder
from lightning_prune.data.shapes import Shapes
from lightning_prune.data.tensors import ImageData, ImageTensors
from lightning_prune.data.torchvision import CIFAR10, CIFAR100, MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "CelebA",
    "Cityscapes",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "ImageTensors",
    "Shapes",
]
