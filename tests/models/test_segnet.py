"""SegNet: its form, its metrics, and that it learns to segment."""

import itertools

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.data import Shapes
from lightning_prune.models import SegNet
from lightning_prune.structure import TracedModel, trace
from tests.support.cutting import half, masked, shrunk


def small(**settings):
    torch.manual_seed(0)
    return SegNet(4, ((8, 2), (16, 1)), (3, 16, 16), **settings)


def test_has_the_convolutions_of_vgg16_and_their_mirror_image():
    model = SegNet()
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    encoder = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert widths == [*encoder, 512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 19]
    pairs = itertools.pairwise([3, *widths[:-1]])
    assert sum(p.numel() for p in model.parameters()) == sum(9 * i * o + 2 * o for i, o in pairs) + 9 * 64 * 19 + 19


def test_gives_scores_of_every_pixel():
    assert small()(torch.zeros(3, 3, 16, 16)).shape == (3, 4, 16, 16)
    with pytest.raises(ValueError, match=r"divisible by 4 \(2 poolings\), got 18×16"):
        SegNet(4, ((8, 2), (16, 1)), (3, 18, 16))


def test_unpooling_puts_numbers_back_where_they_were_largest():
    model, seen = small().eval(), []
    model.unpool.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model.pool.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model(torch.randn(1, 3, 16, 16))
    ((maps,), (_, indices)), ((x, given), out) = seen[0], seen[3]  # the first stage's
    assert torch.equal(given, indices)
    assert torch.equal(out.flatten(2).gather(2, indices.flatten(2)), x.flatten(2))
    assert torch.equal(maps.flatten(2).gather(2, indices.flatten(2)), model.pool(maps)[0].flatten(2))


def test_both_sides_of_a_stage_are_cut_alike():
    model = small().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.1)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    coupled = {layer for group in structure.groups if len(group.producers) > 1 for layer in group.producers}
    assert coupled == {"encoder.0.3", "decoder.0.0"}
    axes = structure.axes(half(structure))
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


def test_pixels_without_a_class_do_not_count():
    model = small().eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 4, (2, 16, 16))
    model.log = lambda *_, **__: None
    known = model.training_step((x[:1], labels[:1]), 0)
    labels[1] = 255
    torch.testing.assert_close(model.training_step((x, labels), 0), known)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizer_by_name(optimizer):
    assert type(small(optimizer=optimizer).configure_optimizers()).__name__.lower() == optimizer


def test_learns():
    model, data = small(optimizer="adam", lr=0.01), Shapes(200, 16, batch_size=16)
    trainer = Trainer(
        max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    (tested,) = trainer.test(model, data, verbose=False)
    assert tested["test_iou"] > 0.3  # the ground everywhere: 0.16
    assert tested["test_acc"] > 0.72  # the ground everywhere: 0.65
    assert trainer.predict(model, data)[0].shape[1:] == (16, 16)
