"""Small files in the layouts that torchvision reads."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
