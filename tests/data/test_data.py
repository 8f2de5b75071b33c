"""Splits, order, augmentation, and files in the layouts that torchvision reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    CelebA,
    Cityscapes,
    Digits,
    FashionMNIST,
    ImageData,
    ImageFolder,
    ImageTensors,
)
from lightning_prune.data.tensors import crop_and_mirror
from lightning_prune.models import MLPClassifier
from tests.support.data_files import write_celeba, write_cifar, write_cityscapes, write_mnist


class Numbered(ImageData):
    """Images whose only pixel is their number; labels are the number again."""

    def __init__(self, count: int = 40, **settings: Any) -> None:
        super().__init__(**settings)
        self.count = count

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        numbers = torch.arange(self.count)
        train = ImageTensors(numbers.float().view(-1, 1, 1, 1), numbers)
        return train, ImageTensors(1000 + train.images[:10], 1000 + train.labels[:10])


def ready(data: ImageData) -> ImageData:
    data.prepare_data()
    data.setup("fit")
    return data


def labels(loader: Any, epoch: int | None = None) -> list[int]:
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return torch.cat([batch[1] for batch in loader]).tolist()


def test_parts_share_nothing_and_lose_nothing() -> None:
    data = ready(Numbered(val_share=0.25))
    train, val = labels(data.train_dataloader()), labels(data.val_dataloader())
    assert (len(train), len(val)) == (30, 10)
    assert sorted(train + val) == list(range(40))
    assert labels(data.test_dataloader()) == list(range(1000, 1010)) == labels(data.predict_dataloader())


def test_images_stay_with_their_labels() -> None:
    for images, numbers in ready(Numbered(batch_size=7)).train_dataloader():
        assert images.shape == (len(numbers), 1, 1, 1)
        assert torch.equal(images.flatten(), numbers.float())


def test_everything_follows_from_the_seed() -> None:
    one, same, other = (ready(Numbered(seed=seed)) for seed in (1, 1, 2))
    assert labels(one.train_dataloader(), 3) == labels(same.train_dataloader(), 3)
    assert labels(one.train_dataloader(), 3) != labels(one.train_dataloader(), 4)
    assert labels(one.val_dataloader()) == labels(same.val_dataloader()) != labels(other.val_dataloader())
    assert labels(one.val_dataloader()) == labels(one.val_dataloader())


def test_train_limit_keeps_the_validation_images() -> None:
    whole, part = ready(Numbered()), ready(Numbered(train_limit=5))
    assert labels(whole.val_dataloader()) == labels(part.val_dataloader())
    assert len(labels(part.train_dataloader())) == 5
    assert len(labels(ready(Numbered(train_limit=10_000)).train_dataloader())) == 36


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_train_limit_draws_from_all_images(share: float) -> None:
    """The first ones of a folder are of its first classes only."""
    few = labels(ready(Numbered(train_limit=12, val_share=share)).train_dataloader())
    assert len(few) == 12
    assert max(few) > 25


def test_without_held_out_images_the_test_images_are_validated_on() -> None:
    data = ready(Numbered(val_share=0))
    assert len(data._splits["train"]) == len(data.load()[0])
    assert torch.equal(data._splits["val"].labels, data._splits["test"].labels)


def test_seeds_can_share_a_split() -> None:
    one, other = (ready(Numbered(val_share=0.25, seed=seed, split_seed=5)) for seed in (0, 1))
    assert torch.equal(one._splits["val"].labels, other._splits["val"].labels)
    orders = [torch.cat([labels for _, labels in data.train_dataloader()]) for data in (one, other)]
    assert not torch.equal(*orders)
    assert torch.equal(*(order.sort().values for order in orders))
    with pytest.raises(ValueError, match="`split_seed` of at least 0"):
        Numbered(split_seed=-1)


@pytest.mark.parametrize(
    "setting", [{"val_share": -0.1}, {"val_share": 1.0}, {"batch_size": 0}, {"train_limit": 0}, {"seed": -1}]
)
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Numbered: expected `{next(iter(setting))}`"):
        Numbered(**setting)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="got none for validation"):
        ready(Numbered(count=3, val_share=0.1))


def naive_crop_and_mirror(images: Tensor, generator: torch.Generator, padding: int, fill: float) -> Tensor:
    shifts = torch.randint(0, 2 * padding + 1, (2, len(images), 1), generator=generator)
    mirrors = torch.rand(len(images), 1, generator=generator) < 0.5
    out = []
    for i, image in enumerate(images):
        y, x = int(shifts[0, i]), int(shifts[1, i])
        crop = F.pad(image, (padding,) * 4, value=fill)[:, y : y + image.shape[1], x : x + image.shape[2]]
        out.append(crop.flip(2) if mirrors[i] else crop)
    return torch.stack(out)


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 99)
)
def test_crop_and_mirror(count: int, channels: int, height: int, width: int, padding: int, seed: int) -> None:
    images = torch.arange(1.0, count * channels * height * width + 1).view(count, channels, height, width)
    first, second = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    changed = crop_and_mirror(images, first, padding, fill=-2.0)
    assert torch.equal(changed, naive_crop_and_mirror(images, second, padding, -2.0))


def test_each_channel_has_its_own_padding() -> None:
    """Seen through the normalisation that torchvision applies after the crop, padding is black, not the mean colour."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    pixels = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    first, second = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    normalised = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    changed = crop_and_mirror(normalised, first, 3, fill=-mean / std)
    cropped_before = naive_crop_and_mirror(pixels, second, 3, 0.0)
    torch.testing.assert_close(changed, (cropped_before - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))


def test_augmentation_is_for_training_only_and_follows_the_seed() -> None:
    class Pictures(Numbered):
        def load(self) -> tuple[ImageTensors, ImageTensors]:
            images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            both = ImageTensors(images, torch.arange(40))
            return both, both

    plain, one, same = (ready(Pictures(augment=augment, batch_size=9)) for augment in (False, True, True))
    pairs = list(zip(plain.train_dataloader(), one.train_dataloader(), same.train_dataloader(), strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b, _ in pairs)
    assert not any(torch.equal(a[0], b[0]) for a, b, _ in pairs)
    assert all(torch.equal(b[0], c[0]) for _, b, c in pairs)
    for a, b in zip(plain.val_dataloader(), one.val_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])


def test_digits() -> None:
    data = ready(Digits())
    parts = [torch.cat([b[0] for b in loader]) for loader in (data.train_dataloader(), data.test_dataloader())]
    assert len(parts[1]) == 359
    for images in parts:
        assert images.shape[1:] == (1, 8, 8)
        assert (images.min(), images.max()) == (-1, 1)
    assert labels(ready(Digits(seed=5)).test_dataloader()) == labels(data.test_dataloader())


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_mnist_files(kind: type[MNIST] | type[FashionMNIST], tmp_path: Path) -> None:
    write_mnist(tmp_path, kind.__name__)
    data = ready(kind(root=str(tmp_path), batch_size=8, val_share=0.2))
    images, classes = next(iter(data.test_dataloader()))
    assert images.shape == (8, 1, 28, 28)
    assert images.dtype == torch.float32
    assert classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    raw = (tmp_path / kind.__name__ / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(20, 28, 28)[:8].copy())
    assert torch.allclose((images[:, 0] * kind.std[0] + kind.mean[0]) * 255, pixels.float(), atol=1e-3)
    assert (len(labels(data.train_dataloader())), len(labels(data.val_dataloader()))) == (24, 6)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_files(kind: type[CIFAR10] | type[CIFAR100], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, int(kind.__name__[5:]))
    data = ready(kind(root=str(tmp_path), batch_size=8))
    images, classes = next(iter(data.test_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert classes.tolist() == list(range(8))
    name = "test_batch" if kind is CIFAR10 else "test"
    content = pickle.loads(next(tmp_path.rglob(name)).read_bytes())
    pixels = torch.from_numpy(content["data"][:8]).view(8, 3, 32, 32).float()
    mean, std = (torch.tensor(fact).view(1, 3, 1, 1) for fact in (kind.mean, kind.std))
    assert torch.allclose((images * std + mean) * 255, pixels, atol=1e-3)
    augmented, _ = next(iter(ready(kind(root=str(tmp_path), augment=True)).train_dataloader()))
    padding = ((augmented * std + mean).abs() < 1e-4).all(1)
    assert padding.any(2).any(1).float().mean() > 0.9, "a crop of the image with black pixels around it"


def test_root_comes_from_the_argument_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "argument", train=30)
    write_mnist(tmp_path / "environment", train=50)
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path / "environment"))
    assert len(labels(ready(MNIST()).train_dataloader())) == 45
    assert len(labels(ready(MNIST(root=str(tmp_path / "argument"))).train_dataloader())) == 27


def test_without_a_root_the_cache_is_downloaded_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.delenv("LIGHTNING_PRUNE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    downloads = []

    def download(self: Any) -> None:
        downloads.append(self.root)
        write_mnist(Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(labels(ready(MNIST()).test_dataloader())) == 20
    assert downloads == [str(tmp_path / "lightning_prune")]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MNIST: expected its files under .*LIGHTNING_PRUNE_DATA"):
        ready(MNIST(root=str(tmp_path)))


def test_image_folder(tmp_path: Path) -> None:
    for position, name in enumerate(("daisy", "rose")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (24 + i, 20), (255 * position, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = ready(ImageFolder(str(tmp_path), size=16, batch_size=4, val_share=0.25))
    seen = 0
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for images, classes in loader:
            assert images.shape[1:] == (3, 16, 16)
            red = images[:, 0, 8, 8] * 0.229 + 0.485
            assert torch.allclose(red, classes.float(), atol=1e-5)
            seen += len(classes)
    assert seen == 20
    with pytest.raises(ValueError, match=r"expected `root`, a folder .*, got none. Give `--data.root FOLDER`"):
        ImageFolder()
    with pytest.raises(FileNotFoundError, match="expected a folder with one sub-folder of images per class"):
        ready(ImageFolder(str(tmp_path / "nowhere")))


def write_images(folder: Path, names: str, count: int = 6) -> None:
    """Images of one brightness a class: 0, 1/2 or 1."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            level = {"a": 0, "b": 128, "c": 255}[name]
            Image.new("RGB", (20 + i, 16), (level, level, level)).save(folder / name / f"{i}.png")


def test_folder_that_is_split_already(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "abc", 8)
    write_images(tmp_path / "val", "abc", 3)
    data = ready(ImageFolder(str(tmp_path), size=8, batch_size=4, val_share=0.25, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert [len(labels(loader)) for loader in (data.train_dataloader(), data.test_dataloader())] == [18, 9]
    for images, classes in data.test_dataloader():
        assert torch.allclose(images[:, 0, 0, 0], torch.tensor([0, 128 / 255, 1])[classes])


def test_some_classes_of_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "abc")
    data = ready(ImageFolder(str(tmp_path), size=8, classes=["c", "a"], mean=(0.0,) * 3, std=(1.0,) * 3))
    images, classes = next(iter(data.train_dataloader()))
    assert set(classes.tolist()) == {0, 1}
    assert torch.equal(images[:, 0, 0, 0], classes.float())
    with pytest.raises(ValueError, match=r"expected `classes` among \['a', 'b', 'c'\].* got roses, tulips"):
        ready(ImageFolder(str(tmp_path), classes=["roses", "tulips"]))
    with pytest.raises(ValueError, match="expected at least two `classes`"):
        ImageFolder(str(tmp_path), classes=["a"])
    with pytest.raises(ValueError, match="expected `std` above 0"):
        ImageFolder(str(tmp_path), std=(1.0, 0.0, 1.0))


def test_decoded_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size and by the files: another size, another class or another file is decoded again."""
    write_images(tmp_path / "images", "abc")

    def content(**settings: Any) -> Any:
        data = ready(ImageFolder(str(tmp_path / "images"), cache=str(tmp_path / "cache"), **{"size": 8, **settings}))
        return next(iter(data.test_dataloader()))[0]

    first = content()
    with monkeypatch.context() as patched:
        patched.setattr(ImageFolder, "_decoded", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(content(), first)
        assert torch.equal(content(std=(0.5,) * 3, mean=(0.485, 0.456, 0.406))[:, 0] * 0.5, first[:, 0] * 0.229)
    assert content(size=4).shape[-1] == 4
    content(classes=["a", "b"])
    assert len(list((tmp_path / "cache").iterdir())) == 3
    Image.new("RGB", (20, 16)).save(tmp_path / "images" / "a" / "more.png")
    content()
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_grey_images_for_networks_of_photographs(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    plain, shaped = (ready(MNIST(str(tmp_path), **options)) for options in ({}, {"size": 32, "rgb": True}))
    images, (grey, _) = next(iter(shaped.test_dataloader()))[0], next(iter(plain.test_dataloader()))
    assert images.shape == (20, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.allclose(images[:, :1].mean((2, 3)), grey.mean((2, 3)), atol=0.02)
    with pytest.raises(ValueError, match="expected `size` of at least 1 pixel"):
        MNIST(str(tmp_path), size=0)


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_celeba(tmp_path, monkeypatch)
    data = CelebA(str(tmp_path), size=16, batch_size=4, workers=0)
    data.setup("fit")

    def colours(loader: Any) -> list[int]:
        images = torch.cat([images for images, _ in loader])
        assert images.shape[1:] == (3, 16, 16)
        assert images.max() <= 1
        return (images[:, 0, 8, 8] * 255 / 20).round().int().tolist()

    assert sorted(colours(data.train_dataloader())) == [0, 1, 2, 3, 4, 5]
    assert colours(data.val_dataloader()) == [6, 7, 8]
    assert colours(data.test_dataloader()) == [9, 10] == colours(data.predict_dataloader())
    first, again, later = (data.train_dataloader() for _ in range(3))
    later.sampler.set_epoch(1)
    assert colours(first) == colours(again) != colours(later)
    few = CelebA(str(tmp_path), size=16, train_limit=2, workers=0)
    few.setup("fit")
    assert sorted(colours(few.train_dataloader())) == [0, 1]


def test_celeba_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"list_attr_celeba.txt.*img_align_celeba.*under .*celeba.*mmlab.*`root`"
    ):
        CelebA(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="CelebA: expected `size` of at least 1, got 0"):
        CelebA(str(tmp_path), size=0)


def test_cityscapes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, train=6, val=3)
    data = Cityscapes(str(tmp_path), 16, 32, batch_size=2, workers=0)
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 16, 32)
    assert labels.shape == (2, 16, 32)
    assert labels[0, 0].tolist() == [13] * 2 + [0] * 14 + [255] * 16  # the 19 classes of the benchmark

    def numbers(loader: Any) -> list[int]:
        red = torch.cat([images[:, 0, 8, 8] for images, _ in loader])
        return ((red * 0.229 + 0.485) * 255 / 10).round().int().tolist()

    assert numbers(data.val_dataloader()) == [0, 2, 1] == numbers(data.test_dataloader())  # by the names of cities
    assert numbers(data.predict_dataloader()) == [0, 2, 1]
    first, again, later = (data.train_dataloader() for _ in range(3))
    later.sampler.set_epoch(1)
    assert numbers(first) == numbers(again) != numbers(later)
    assert sorted(numbers(later)) == [0, 1, 2, 3, 4, 5]
    few = Cityscapes(str(tmp_path), 16, 32, train_limit=2, workers=0)
    few.setup("fit")
    assert sorted(numbers(few.train_dataloader())) == [0, 2]


def test_cityscapes_says_how_to_get_it(tmp_path: Path) -> None:
    lacks = r"leftImg8bit/train and gtFine/train.*under .*gtFine_trainvaltest.zip.*cityscapes-dataset.com.*`root`"
    with pytest.raises(FileNotFoundError, match=lacks):
        Cityscapes(str(tmp_path)).setup("fit")
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=lacks):
        Cityscapes(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="Cityscapes: expected `height` of at least 1, got 0"):
        Cityscapes(str(tmp_path), height=0)


class Seen(MLPClassifier.__base__):  # type: ignore[name-defined,misc]
    """Notes the labels of every training batch by epoch."""

    def __init__(self) -> None:
        super().__init__((1,), 2000)
        self.layer = torch.nn.Linear(1, 2000)
        self.epochs: dict[int, list[int]] = {}

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1) / 2000)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return super().training_step(batch, batch_idx)


def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Seen, Trainer]:
        trainer = Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        model = Seen()
        trainer.fit(model, Numbered(batch_size=8), ckpt_path=checkpoint)
        return model, trainer

    through, _ = fit(4)
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert resumed.epochs == {epoch: through.epochs[epoch] for epoch in (2, 3)}
    assert len({tuple(order) for order in through.epochs.values()}) == 4
