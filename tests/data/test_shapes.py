"""The drawn segmentation set."""

import pytest
import torch

from lightning_prune.data import Shapes


def loaded(**settings):
    data = Shapes(40, 24, **settings)
    data.setup("fit")
    return data


def test_every_pixel_has_a_class():
    images, labels = next(iter(loaded(batch_size=40).train_dataloader()))
    assert images.shape == (29, 3, 24, 24)
    assert labels.shape == (29, 24, 24)
    assert labels.unique().tolist() == [0, 1, 2, 3]
    assert 0.4 < (labels == 0).float().mean() < 0.9


def test_shapes_have_one_colour_each():
    """Inside a shape pixels differ by the noise; colours say nothing about the class."""
    images, labels = next(iter(loaded(batch_size=40).train_dataloader()))
    colours = {kind: [] for kind in (1, 2, 3)}
    for image, label in zip(images, labels, strict=True):
        for kind in label.unique().tolist():
            if kind:
                colours[kind].append(image[:, label == kind].median(1).values)
    for found in colours.values():
        assert torch.stack(found).std(0).min() > 0.5


def test_the_images_depend_on_number_and_size_alone():
    first, second = loaded(), loaded(seed=3)
    for one, other in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_refuses_what_is_too_small():
    for arguments in ((9, 32), (100, 15)):
        with pytest.raises(ValueError, match=r"`count` of at least 10 and a `size` of at least 16, got"):
            Shapes(*arguments)
