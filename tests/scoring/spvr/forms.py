"""Small networks of the paper's forms: VGG, ResNet with a projection, SegNet."""

import torch
from torch import nn

from lightning_prune.structure import TracedModel, trace


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg():
    return nn.Sequential(
        *(*block(3, 6), *block(6, 9), nn.MaxPool2d(2), *block(9, 7), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(7 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4)),
    )


class ResNet(nn.Module):
    """Two stages of one block each, the second with a projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*block(3, 5))
        self.first, self.second = nn.Sequential(*block(5, 6)), nn.Sequential(*block(5, 7))
        self.last = nn.ModuleList(nn.Sequential(*block(i, o)[:2]) for i, o in ((6, 5), (7, 8)))
        self.project, self.head = nn.Sequential(*block(5, 8)[:2]), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.last[0](self.first(x))).relu()
        x = (self.project(x) + self.last[1](self.second(x))).relu()
        return self.head(x.mean((2, 3)))


class SegNet(nn.Module):
    """Encoder and decoder; unpooling puts numbers back where they were the largest."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Sequential(*block(3, 6)), nn.Sequential(*block(6, 7))
        self.up, self.head = nn.Sequential(*block(7, 6)), nn.Conv2d(6, 3, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        x, indices = self.pool(self.down(x))
        return {"out": self.head(self.unpool(self.up(self.middle(x)), indices))}


FORMS = {
    "vgg": (vgg, {"0": ["3"], "3": ["7"], "7": ["12"], "12": ["15"]}),
    "resnet": (
        ResNet,
        {
            "stem.0": ["first.0", "second.0", "project.0"],
            "first.0": ["last.0.0"],
            "second.0": ["last.1.0"],
            "project.0": ["head"],
        },
    ),
    # The decoder gives the unpooling what the encoder gives the pooling: one group.
    "segnet": (SegNet, {"down.0": ["middle.0", "head"], "middle.0": ["up.0"]}),
}


def example(name, n=12, seed=0):
    torch.manual_seed(seed)
    model = FORMS[name][0]().double()
    inputs = [torch.randn(n // 2, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():  # statistics and scales of their own, outputs that differ
        for _ in range(3):
            model(torch.cat(inputs) + 0.1 * torch.randn(1, 3, 1, 1, dtype=torch.float64))
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train(), inputs, trace(TracedModel.of(model, inputs[0]))
