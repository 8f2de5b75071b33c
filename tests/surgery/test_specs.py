"""Layers described in plain data are built again as they were."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.surgery import HistoryError, LayerSpec, spec_of
from lightning_prune.surgery.options import KINDS

#: At least one layer of every kind, with options that are not the defaults.
LAYERS: tuple[nn.Module, ...] = (
    nn.Identity(),
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular"),
    nn.Conv2d(3, 5, (3, 1), stride=(1, 2), padding=(1, 0), bias=False),
    nn.Conv3d(2, 4, 3, padding="same"),
    nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
    nn.ConvTranspose2d(3, 5, 2, bias=False, dilation=2),
    nn.ConvTranspose3d(2, 4, 3, padding=1),
    nn.BatchNorm1d(3, eps=1e-3, momentum=None),
    nn.BatchNorm2d(3, affine=False),
    nn.BatchNorm3d(3, track_running_stats=False),
    nn.LayerNorm((3, 4), eps=1e-3, bias=False),
    nn.GroupNorm(2, 4, affine=False),
    *(nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Mish(), nn.SELU(), nn.Hardswish(), nn.Hardsigmoid()),
    *(nn.Sigmoid(), nn.Tanh(), nn.Softsign(), nn.GELU("tanh"), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.PReLU(3)),
    *(nn.Softmax(1), nn.LogSoftmax(-1)),
    *(nn.Dropout(0.2), nn.Dropout1d(0.3), nn.Dropout2d(0.4, inplace=True), nn.Dropout3d()),
    nn.Flatten(0, 2),
    *(nn.AdaptiveAvgPool1d(3), nn.AdaptiveAvgPool2d((None, 2)), nn.AdaptiveAvgPool3d(1)),
    *(nn.AdaptiveMaxPool1d(2), nn.AdaptiveMaxPool2d(1), nn.AdaptiveMaxPool3d((1, 2, 3))),
    *(nn.MaxPool1d(2), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), nn.MaxPool3d((2, 1, 1), dilation=2)),
    *(
        nn.AvgPool1d(2, stride=1),
        nn.AvgPool2d(3, padding=1, divisor_override=4),
        nn.AvgPool3d(2, count_include_pad=False),
    ),
)


def through_a_file(spec: LayerSpec) -> LayerSpec:
    file = io.BytesIO()
    torch.save(spec.to_plain(), file)
    file.seek(0)
    return LayerSpec.from_plain(torch.load(file, weights_only=True))


def test_every_kind_is_tried() -> None:
    assert {type(layer).__name__ for layer in LAYERS} == KINDS.keys()


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_is_built_again(layer: nn.Module) -> None:
    spec = spec_of(layer)
    again = through_a_file(spec)
    assert again == spec
    built = again.build(dtype=torch.float64)
    assert type(built) is type(layer)
    assert repr(built) == repr(layer)
    assert spec_of(built) == spec
    assert spec.shapes == {n: tuple(t.shape) for n, t in layer.state_dict().items()}
    assert all(t.dtype == torch.float64 for t in built.parameters())


def test_a_sequence_of_them() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    spec = through_a_file(spec_of(layers))
    assert repr(spec.build()) == repr(layers)
    assert spec.shapes == {n: tuple(t.shape) for n, t in layers.state_dict().items()}


def test_with_other_widths() -> None:
    conv = nn.Conv2d(8, 5, 3, padding=1, bias=False)
    assert repr(spec_of(conv, in_channels=3).build()) == repr(nn.Conv2d(3, 5, 3, padding=1, bias=False))
    assert spec_of(conv).options["in_channels"] == 8


class Head(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Wider(nn.Linear):
    pass


@pytest.mark.parametrize("module", [Head(nn.Linear(2, 2)), Wider(2, 2), nn.LSTM(2, 2), nn.ModuleList()], ids=repr)
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="known kind"):
        spec_of(module)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("Linear", {"in_features": 0, "out_features": 3}, "Linear: expected 'in_features' .* at least 1, got 0"),
        ("Linear", {"in_features": 3}, "cannot be built"),
        (
            "Linear",
            {"in_features": 3.5, "out_features": 2},
            "whole number of at least 1, got 3.5",
        ),
        ("Linear", {"in_features": "3", "out_features": 2}, "whole number of at least 1, got '3'"),
        ("Linear", {"in_features": True, "out_features": 2}, "whole number of at least 1, got True"),
        ("Linear", {"in_features": None, "out_features": 2}, "whole number of at least 1, got None"),
        ("Linear", {"in_features": torch.tensor(3), "out_features": 2}, "whole number of at least 1, got tensor"),
        ("Linear", None, "options of a Linear by name, got NoneType"),
        ("Linear", {3: 4}, "expected options of a Linear .*, got 3"),
        (
            "BatchNorm2d",
            {"num_features": 3, "eps": "x"},
            "BatchNorm2d: expected 'eps' .* got 'x'",
        ),
        ("BatchNorm2d", {"num_features": 3, "eps": -1e-5}, "'eps' to be a finite number of at least 0, got -1e-05"),
        (
            "BatchNorm2d",
            {"num_features": 3, "momentum": 1.5},
            r"'momentum' to be None or .* \[0, 1\], got 1.5",
        ),
        (
            "BatchNorm2d",
            {"num_features": -3, "affine": False},
            "'num_features' .* got -3",
        ),
        ("LayerNorm", {"normalized_shape": []}, "'normalized_shape' to be a whole number of at least 1, or several"),
        ("GroupNorm", {"num_groups": 2, "num_channels": 0, "affine": False}, "'num_channels' .* got 0"),
        ("Dropout", {"p": float("nan")}, r"Dropout: expected 'p' to be a number in \[0, 1\], got nan"),
        ("Dropout", {"p": -0.1}, r"'p' to be a number in \[0, 1\], got -0.1"),
        ("Dropout", {"p": None}, r"'p' to be a number in \[0, 1\], got None"),
        ("GELU", {"approximate": "x"}, "GELU: expected 'approximate' to be \"none\" or \"tanh\", got 'x'"),
        ("ELU", {"alpha": None}, "'alpha' to be a finite number, got None"),
        ("MaxPool2d", {"kernel_size": "x"}, "MaxPool2d: expected 'kernel_size' .* at least 1, .* got 'x'"),
        ("MaxPool2d", {"kernel_size": 0}, "'kernel_size' .* at least 1, .* got 0"),
        ("MaxPool2d", {"kernel_size": None}, "'kernel_size' .* at least 1, .* got None"),
        ("MaxPool2d", {"kernel_size": (2, 2, 2)}, r"'kernel_size' .* one per dimension, got \(2, 2, 2\)"),
        ("MaxPool2d", {"kernel_size": 2, "padding": -1}, "'padding' .* at least 0, .* got -1"),
        ("MaxPool2d", {"kernel_size": 2, "padding": 2}, "'padding' .* half of the kernel, got 2 with 'kernel_size' 2"),
        ("AvgPool1d", {"kernel_size": 2, "stride": 0}, "'stride' .* at least 1, .* got 0"),
        ("AvgPool2d", {"kernel_size": 2, "divisor_override": 0}, "'divisor_override' .* at least 1, got 0"),
        ("AdaptiveAvgPool2d", {"output_size": -1}, "AdaptiveAvgPool2d: expected 'output_size' .* got -1"),
        ("AdaptiveAvgPool2d", {"output_size": (1, 1, 1)}, "'output_size' .* per dimension, got"),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": -3}, "'kernel_size' .* got -3"),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": (3,)}, "'kernel_size' .* per dimension"),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "x"}, "'padding' .* got 'x'"),
        (
            "Conv2d",
            {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding_mode": "x"},
            "'padding_mode' .* 'x'",
        ),
        (
            "ConvTranspose1d",
            {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "output_padding": 1, "stride": 1},
            "'output_padding' to be smaller than the stride or the dilation, got 1 with 'stride' 1",
        ),
        ("Flatten", {"start_dim": 3, "end_dim": 1}, "'start_dim' to be no later than the end, got 3 with 'end_dim' 1"),
        ("Softmax", {"dim": 0.5}, "'dim' to be None or a whole number, got 0.5"),
        ("ReLU", {"inplace": 3}, "ReLU: expected 'inplace' to be True or False, got 3"),
        ("LeakyReLU", {"negative_slope": [1, 2]}, "'negative_slope' to be a finite number"),
        ("Linear", {"in_features": 3, "out_features": 2, "device": "cuda"}, "expected options of a Linear"),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}, "cannot be built"),
        ("Sequential", {"layers": 3}, "no options"),
        ("Embedding", {"num_embeddings": 3}, "known kind"),
        ("functional", {}, "known kind"),
    ],
)
def test_what_cannot_be_built(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LayerSpec(kind, options)


@pytest.mark.parametrize("layers", ["ab", 3, (nn.ReLU(),)])
def test_a_sequence_of_something_else_is_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match="layers of a Sequential"):
        LayerSpec("Sequential", layers=layers)


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        ([], "a layer to be a dict"),
        ({"options": {}}, "no 'kind'"),
        ({"kind": "Linear"}, "no 'options'"),
        ({"kind": "Sequential", "layers": [3]}, "a layer to be a dict"),
        ({"kind": "Sequential", "layers": [{"kind": "system", "options": {}}]}, "known kind"),
        ({"kind": "Linear", "options": {3: 4}}, "an option of a Linear to be a str"),
    ],
)
def test_damaged_data(plain: Any, text: str) -> None:
    with pytest.raises(HistoryError, match=text):
        LayerSpec.from_plain(plain)
