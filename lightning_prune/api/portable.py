"""Files of weights and pruning history that load into a newly built network, without Lightning and without pickle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.api.lightning_module import keep_history
from lightning_prune.extras import require
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import HistoryError, load_weights, save_into, save_masks_into
from lightning_prune.surgery.compiled import reset_compiled
from lightning_prune.surgery.history import KEY
from lightning_prune.surgery.json_text import from_json, pairs_once, to_json
from lightning_prune.surgery.plain import damaged
from lightning_prune.surgery.tensors import canonical

__all__ = ["load", "require_real", "save", "tensors_of", "tensors_to_store", "whole_file"]

Module = TypeVar("Module", bound=nn.Module)

#: Bytes of a header that safetensors reads, and of our text in it.
_LARGEST_HEADER, _LARGEST_TEXT = 100_000_000, 90_000_000


def save(model: nn.Module, file: str | Path) -> None:
    """Save a network's weights, pruning history and masks in a safetensors file.

    The file holds the ``state_dict`` (parameters and persistent buffers), and as JSON in its metadata what `load` needs
    to narrow a newly built network. Other programs can read the weights as of any safetensors file. An existing file is
    replaced at once, so it is never half written.

    Args:
        model: A pruned network, or a dense one: a LightningModule or any module. Of one that was pruned as a part of
            another, such as a LightningModule's backbone, give the other, which has the history.
        file: The file to write, such as ``"small.safetensors"``.

    Raises:
        ValueError: If the ``state_dict`` holds anything but dense tensors, or the masks are too large for a file.
        ModuleNotFoundError: If `safetensors <https://pypi.org/project/safetensors>`_ is not installed (extra
            ``portable``).

    Example:
        >>> import lightning_prune, tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = lightning_prune.prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lightning_prune.save(net, f"{folder}/small.safetensors")
        ...     lightning_prune.load(again, f"{folder}/small.safetensors")
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    require_network(model)
    network = written(model)
    weights, tied = tensors_to_store(network)
    parts: dict[str, Any] = {}
    save_into(parts, network)
    save_masks_into(parts, network)
    text = to_json(parts, tied)
    if len(text) > _LARGEST_TEXT:
        raise ValueError(
            f"save: expected history and masks of at most {_LARGEST_TEXT:,} bytes, got {len(text):,}, for which "
            "safetensors has no room. `strip` the network of its masks first, or save a checkpoint."
        )
    safetensors = require("safetensors.torch", extra="portable")
    with whole_file(Path(file)) as part:
        safetensors.save_file(weights, str(part), metadata={"format": "pt", KEY: text})


def load(model: Module, file: str | Path) -> Module:
    """Load what `save` wrote into a newly built network, in place: its widths, weights, history and masks.

    Nothing in the file is executed. Weights are converted to the network's dtype and device, as by ``load_state_dict``.
    A pruned network is accepted, too: it gets the widths of the file.

    Args:
        model: The network as it was built before it was pruned: of torchvision, timm, Hugging Face or your own, or a
            LightningModule.
        file: The file.

    Returns:
        The network, in the mode it was in: call ``.eval()`` before you predict with it.

    Raises:
        HistoryError: If the file is damaged, of a newer version or of another network; the network is unchanged.
        ModuleNotFoundError: If `safetensors <https://pypi.org/project/safetensors>`_ is not installed (extra
            ``portable``).
    """
    require_network(model)
    network = written(model)
    require_real(network, "load")
    checkpoint = _read(Path(file))
    reset_compiled(network)
    load_weights(checkpoint, network)
    keep_history(network)
    return model


def require_real(network: nn.Module, function: str) -> None:
    """Check that a network has weights, to load others into."""
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError(
            f"{function}: expected a {type(network).__name__} with weights, got one on the meta device. Build it on "
            'the CPU, or call `.to_empty(device="cpu")` and set the buffers that no file has.'
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` once it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def tensors_to_store(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the ``state_dict`` by canonical name, each once, and the names that the others are tied to."""
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    known: dict[object, str] = {}
    storages: set[int] = set()
    for full_name, content in model.state_dict().items():
        name = canonical(full_name)
        _require_storable(name, content)
        storage = content.untyped_storage()
        address = storage.data_ptr()
        key = (address, content.storage_offset(), content.shape, content.stride(), content.dtype, content.device)
        if content.numel() and key in known:
            tied[name] = known[key]
            continue
        known[key] = name
        # A file of safetensors has no views.
        is_whole = content.is_contiguous() and storage.nbytes() == content.nbytes and address not in storages
        weights[name] = content if is_whole else content.clone(memory_format=torch.contiguous_format)
        storages.add(address)
    return weights, tied


def _require_storable(name: str, content: object) -> None:
    problem = ""
    if type(content) not in (Tensor, nn.Parameter):
        problem = f"a {type(content).__name__}"
    elif isinstance(content, Tensor) and (content.layout is not torch.strided or content.is_quantized):
        problem = f"a tensor of the layout {content.layout}, {content.dtype}"
    elif isinstance(content, Tensor) and content.is_meta:
        problem = "a tensor on the meta device"
    elif isinstance(content, Tensor) and content.dtype in (torch.complex32, torch.complex128):
        problem = f"a tensor of {content.dtype}"
    if problem:
        raise ValueError(
            f"save: expected dense tensors in the `state_dict`, which a file of safetensors can hold, got {problem} "
            f"for {name!r}. Save a checkpoint by `torch.save(model.state_dict(), path)` instead."
        )


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, tied ones included."""
    weights: dict[str, Tensor] = _read(file)["state_dict"]
    return weights


def _read(file: Path) -> dict[str, Any]:
    """A file as a checkpoint: its weights by name, tied ones included, history and masks.

    Raises:
        HistoryError: If it is damaged or of a newer version.
    """
    text, weights = _contents(file)
    checkpoint, tied = ({}, {}) if text is None else from_json(text)
    for name, stored in tied.items():
        if name in weights or stored not in weights:
            raise damaged(f"it ties {name!r}, which must have no weights of its own, to {stored!r}, which must have")
    return {**checkpoint, "state_dict": {**weights, **{name: weights[stored] for name, stored in tied.items()}}}


def _contents(file: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Our text in the metadata, if any, and the tensors by name."""
    safetensors = require("safetensors", extra="portable")
    try:
        _require_names_once(file)
        with safetensors.safe_open(str(file), framework="pt", device="cpu") as opened:
            text = (opened.metadata() or {}).get(KEY)
            return text, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except HistoryError:
        raise
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        if zipfile.is_zipfile(file):
            raise HistoryError(
                f"expected a safetensors file, got '{file}', which `torch.save` wrote. Nothing has changed. Load a "
                "checkpoint of the Trainer by `load_from_checkpoint`, and a `state_dict` by `load_by_shapes`."
            ) from error
        raise HistoryError(
            f"expected a whole safetensors file, got '{file}' of {file.stat().st_size:,} bytes, which is another kind "
            "of file, or was torn while it was written or copied. Nothing has changed. Take another copy. "
            f"({type(error).__name__}: {error})"
        ) from error


def _require_names_once(file: Path) -> None:
    """Raise an error if a name is twice in the header, of which readers may take either."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, _LARGEST_HEADER))
    json.loads(header, object_pairs_hook=pairs_once)
