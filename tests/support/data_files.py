"""Small files in the layouts that torchvision reads."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def write_mnist(root: Path, name: str = "MNIST", train: int = 30, test: int = 20) -> None:
    """Random pictures in the idx format: magic number, sizes (big-endian), bytes."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
        classes = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + classes.tobytes())


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, classes: int = 10, train: int = 20, test: int = 10
) -> None:
    """Random pictures as CIFAR's pickles; torchvision checks their sums, which are told to it."""
    import torchvision

    dataset = getattr(torchvision.datasets, f"CIFAR{classes}")
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count: int) -> dict[str, Any]:
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels" if classes == 10 else "fine_labels": [i % classes for i in range(count)]}

    names = {part: [name for name, _ in getattr(dataset, f"{part}_list")] for part in ("train", "test")}
    each = {"train": train // len(names["train"]), "test": test}
    for part, files in names.items():
        monkeypatch.setattr(dataset, f"{part}_list", [write(name, batch(each[part])) for name in files])
    meta = dict(dataset.meta)
    written = write(meta["filename"], {meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(dataset, "meta", {**meta, "md5": written[1]})


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[int, int, int] = (6, 3, 2)) -> None:
    """Faces of one colour each, their number, with lists in the form of the original."""
    import torchvision

    dataset, folder = torchvision.datasets.CelebA, root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number + 1:06d}.jpg" for number in range(sum(parts))]
    for number, name in enumerate(names):
        Image.new("RGB", (178, 218), (20 * number, 0, 0)).save(folder / "img_align_celeba" / name)
    numbers = {"attr": 40, "bbox": 4, "landmarks": 10}  # columns of the lists that have a head of two lines
    part = [number for number, count in enumerate(parts) for _ in range(count)]
    written = []
    for id_, _, file in dataset.file_list:
        columns = next((count for key, count in numbers.items() if file.startswith(f"list_{key}")), 0)
        lines = [f"{len(names)}", " ".join(f"c{i}" for i in range(columns))] if columns else []
        lines += [f"{name} {' '.join(['-1'] * columns) or part[n]}" for n, name in enumerate(names)]
        if file.endswith(".txt"):
            (folder / file).write_text("\n".join(lines) + "\n")
            written.append((id_, hashlib.md5((folder / file).read_bytes()).hexdigest(), file))
    monkeypatch.setattr(dataset, "file_list", written)


def write_cityscapes(root: Path, train: int = 20, val: int = 2) -> None:
    """Pictures of one colour each, their number, in two cities; a car (26) on road (7), on the right nothing (1)."""
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            name = f"{'ab'[number % 2]}_{number:06d}_000019"
            image, label = (
                root / kind / part / "ab"[number % 2] / f"{name}_{end}.png"
                for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
            )
            for file in (image, label):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 32), (10 * number, 0, 0)).save(image)
            ids = np.full((32, 64), 7, dtype=np.uint8)
            ids[:, 32:], ids[:4, :4] = 1, 26
            Image.fromarray(ids).save(label)


def write_flowers(root: Path, names: Sequence[str] = ("daisy", "dandelion", "rose", "sunflower", "tulip")) -> None:
    """A folder of images for each kind: noise around a colour."""
    random = np.random.default_rng(0)
    for kind, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(16):
            pixels = random.normal(128, 20, (40, 40, 3)) + 60 * np.array([kind % 2, kind // 2 % 2, kind // 4])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
