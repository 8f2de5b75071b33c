"""Folders of pruned transformers models, from which they are loaded as narrow as they were saved."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.api.hugging_face_config import ConfigError, built, fit_config, quiet_transformers
from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.lightning_module import is_lightning_module
from lightning_prune.api.portable import require_real
from lightning_prune.api.samples import largest_difference
from lightning_prune.extras import require
from lightning_prune.scoring.contexts import preserved_state, seeded_rng
from lightning_prune.structure import StructureError, trace
from lightning_prune.structure.layers import updates_widths
from lightning_prune.structure.traced_model import describe, first_line, require_network, written
from lightning_prune.structure.tracing import Call, output_tensors
from lightning_prune.surgery import History, HistoryError, Keep, attach, history_of, replay, save_masks_into
from lightning_prune.surgery.history import KEY
from lightning_prune.surgery.json_text import from_json, to_json
from lightning_prune.surgery.masks import attach_read, masks_of, read_masks
from lightning_prune.surgery.tensors import canonical, named, non_persistent

__all__ = ["SavedModel", "from_pretrained", "save_pretrained"]

Model = TypeVar("Model", bound=nn.Module)

#: The file with the history and masks, and the entry of `config.json` by which transformers refuses the folder.
_HISTORY, _WEIGHTS_ENTRY = "lightning_prune.json", "transformers_weights"
#: How far outputs may be from each other, as a share of the largest one: rounding, of 32 bits or more and of fewer.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 0.05
_REFUSAL = "none, as this network is pruned: load it by lightning_prune.from_pretrained"
#: Arguments of transformers' `from_pretrained` that say where files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class SavedModel:
    """How `save_pretrained` has saved a model.

    Attributes:
        way: ``"config"``: the configuration builds it, and transformers' own ``from_pretrained`` loads it;
            ``"history"``: `lightning_prune.from_pretrained` loads it.
        changes: Integers of the configuration that differ from the dense network's.
        reason: Why the configuration cannot build it.
    """

    way: Literal["config", "history"]
    changes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        if self.way == "history":
            return f"saved with its history, to be loaded by `lightning_prune.from_pretrained`: {self.reason}"
        changes = ", ".join(f"{name}={value}" for name, value in self.changes.items())
        return f"saved with its configuration ({changes or 'as it was'}), to be loaded by transformers"


def save_pretrained(
    model: nn.Module, folder: str | Path, example: Any, *, max_shard_size: int | str = "50GB"
) -> SavedModel:
    """Save a pruned transformers model in a folder, from which it is loaded as narrow as it is.

    If integers of its configuration (``hidden_size``, ``num_attention_heads``, ...) can say all widths, they are saved
    there: transformers' own ``from_pretrained`` loads the folder, without this package and without a history. That is
    the case if layers that repeat each other have the same widths. Else the folder holds what the model's
    ``save_pretrained`` writes, and the history in ``lightning_prune.json``: `from_pretrained` of this package loads it,
    and that of transformers raises an error.

    Before this function returns, the folder is loaded, and its weights are compared bit by bit, and its outputs for the
    example up to rounding. That takes the memory of a second network.

    Args:
        model: The transformers model, not a LightningModule around it. A dense one is saved, too.
        folder: The folder. Weights that it holds are replaced; other files stay.
        example: Input of ``forward``: a tensor, a tuple of arguments or a dict of keyword arguments.
        max_shard_size: Largest size of a file of weights, in bytes or such as ``"5GB"``.

    Returns:
        Which of the two ways it took, and why.

    Raises:
        TypeError: If it is not a transformers model.
        ValueError: If a part of it is on the meta device.
        StructureError: If it fails on the example.
        HistoryError: If it is narrower than its configuration and has no history, or transformers does not load what
            it saves. The folder is unchanged.
    """
    network = _transformers_model(model)
    call = traced_model_for(network, example).calls[0]
    expected = _outputs(network, call)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        part = Path(place)
        try:
            saved = _save_by_config(network, part / "config", call, expected, max_shard_size)
        except ConfigError as error:
            history = history_of(network) or _history_of_widths(network, example, str(error))
            saved = _save_with_history(network, history, part / "history", call, expected, max_shard_size)
            saved = replace(saved, reason=str(error))
        _put(part / saved.way, folder)
    return saved


def from_pretrained(kind: type[Model], source: str | Path, **options: Any) -> Model:
    """Load a transformers model that `save_pretrained` has saved, in either way, as narrow as it was.

    Args:
        kind: The class of the model, such as ``transformers.BertModel``.
        source: The folder, or a repository on the Hugging Face Hub.
        options: Arguments of transformers' ``from_pretrained``, such as ``dtype``, ``subfolder`` or ``revision``.

    Returns:
        The model in eval mode. With its history, amounts of further pruning refer to the dense network; a folder saved
        by the configuration has none.

    Raises:
        TypeError: If ``kind`` is no class of a transformers model, or of another one than was saved.
        ConfigError: If the configuration builds no network.
        HistoryError: If the history is damaged, of a newer version or of another network than the configuration's, or
            weights are missing or of other shapes.
    """
    transformers = require("transformers", extra="transformers")
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        got = getattr(kind, "__name__", repr(kind))
        raise TypeError(
            f"from_pretrained: expected the class of the model, such as BertModel, got {got}. An Auto class is none."
        )
    loads: Any = kind
    where = {name: options[name] for name in _WHERE if name in options}
    file = transformers.utils.cached_file(str(source), _HISTORY, _raise_exceptions_for_missing_entries=False, **where)
    if file is None:
        try:
            model: Model = loads.from_pretrained(source, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise HistoryError(
                f"expected weights that fit the configuration in '{source}', got others. If the pruned model's own "
                "`save_pretrained` wrote them, use lightning_prune.save_pretrained, or load them with `load_by_shapes`."
            ) from error
        return model
    checkpoint, _ = from_json(Path(file).read_text(encoding="utf-8"))
    history = History.from_plain(checkpoint[KEY]) if KEY in checkpoint else None
    config = options.pop("config", None) or loads.config_class.from_pretrained(source, **where)
    if config.architectures != [kind.__name__]:
        shown = " or ".join(config.architectures or ["another class"])
        raise TypeError(f"from_pretrained: expected {shown}, the class saved in '{source}', got {kind.__name__}.")
    vars(config).pop(_WEIGHTS_ENTRY, None)
    unsaved = _unsaved(built(loads, config), history)
    narrow = _narrow_class(loads, history, unsaved)
    loaded, report = narrow.from_pretrained(source, config=config, output_loading_info=True, **options)
    if lost := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise HistoryError(f"expected the weights of all of {kind.__name__} in '{source}', {lost[0]} is missing.")
    loaded.__class__ = kind
    _set_persistent(loaded, unsaved, persistent=False)
    if history is not None and (unsaved or any(not isinstance(edit, Keep) for edit in history.edits)):
        with seeded_rng():
            dense = loads(config)  # with the contents that widening needs, of which the meta device has none
        replay(dense, history)
        attach(loaded, history_of(dense))
    attach_read(loaded, read_masks(checkpoint))
    return loaded  # type: ignore[no-any-return]


def _narrow_class(kind: Any, history: History | None, unsaved: Collection[str]) -> Any:
    """A class whose networks are narrow once they are built, into which transformers loads narrow weights."""

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        # transformers ties tensors after it has loaded them, and a history knows one name of each.
        for target, source in self.all_tied_weights_keys.items():
            owner, _, own = target.rpartition(".")
            setattr(self.get_submodule(owner), own, self.get_parameter(source))
        if history is not None:
            replay(self, history)
        _set_persistent(self, unsaved, persistent=True)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _unsaved(model: nn.Module, history: History | None) -> set[str]:
    """Buffers that were cut and that are not part of the `state_dict`."""
    return set() if history is None else non_persistent(model) & history.shapes.keys()


def _set_persistent(model: nn.Module, names: Collection[str], *, persistent: bool) -> None:
    for name in names:
        owner, _, own = name.rpartition(".")
        left_out = model.get_submodule(owner)._non_persistent_buffers_set
        left_out.discard(own) if persistent else left_out.add(own)


def _transformers_model(model: nn.Module) -> Any:
    """The network as it is written.

    Raises:
        TypeError: If it is not a transformers model.
    """
    require_network(model)
    kind = require("transformers", extra="transformers").PreTrainedModel
    network = written(model)
    if isinstance(network, kind):
        require_real(network, "save_pretrained")
        return network
    inside = next((f"`module.{name}`" for name, part in network.named_modules() if isinstance(part, kind)), None)
    what = "a LightningModule" if is_lightning_module(network) else f"a {type(network).__name__}"
    advice = "Use `save`" if inside is None else f"Give the transformers model in it, {inside}"
    raise TypeError(f"save_pretrained: expected a transformers model, got {what}. {advice}.")


def _save_by_config(network: Any, folder: Path, call: Call, expected: list[Tensor], shards: int | str) -> SavedModel:
    """Save a network that is built by its configuration.

    Raises:
        ConfigError: If no configuration builds it.
    """
    if masks_of(network):
        raise ConfigError("it has masks")
    fitted = fit_config(network)
    narrow = fitted.network
    narrow.load_state_dict(network.state_dict(), assign=True)
    narrow.tie_weights()
    if narrow.can_generate():
        narrow.generation_config = network.generation_config
    narrow.save_pretrained(folder, max_shard_size=shards)
    loads = type(network).from_pretrained
    if problem := _problem(loads(folder, **_attention(network)), network, call, expected):
        raise ConfigError(f"{type(fitted.config).__name__} gives the shapes, but {problem}")
    return SavedModel("config", fitted.changes)


def _history_of_widths(network: Any, example: Any, reason: str) -> History | None:
    """The history of a network that was pruned as a part of another one, which has the history; none if it is dense.

    Which units were kept is not known; the first ones are taken for them.

    Raises:
        HistoryError: If the widths that are left do not tell all.
    """
    with seeded_rng():
        dense = type(network)(copy.deepcopy(network.config)).to(network.device)
    wide, narrow = _lengths(dense), _lengths(network)
    if wide == narrow:
        return None
    axes = {
        name: {
            dim: np.arange(now)
            for dim, (now, before) in enumerate(zip(narrow[name], lengths, strict=False))
            if now < before
        }
        for name, lengths in wide.items()
        if narrow.get(name, lengths) != lengths
    }
    structure = trace(traced_model_for(dense, example))
    kept = {
        group.name: tuple(range(len(axes[member.tensor][member.dim]) // member.index.shape[1]))
        for group in structure.groups
        for member in group.members
        if member.dim in axes.get(member.tensor, {}) and member.index.size == wide[member.tensor][member.dim]
    }
    history = History.begin(structure).add(Keep(axes, kept, 0, 0, 0), dense)
    replay(dense, history)
    if _lengths(dense) == narrow:
        return history
    raise HistoryError(
        f"save_pretrained: expected a {type(network).__name__} with its pruning history, or one whose widths tell what "
        f"was removed, got neither. Its configuration does not build it: {reason}. If it is a part of the network that "
        "was pruned, `save` that one."
    )


def _save_with_history(
    network: Any, history: History | None, folder: Path, call: Call, expected: list[Tensor], shards: int | str
) -> SavedModel:
    """Save a network with its history and masks.

    Raises:
        HistoryError: If transformers does not load it as it is.
    """
    parts = {} if history is None else {KEY: history.to_plain()}
    save_masks_into(parts, network)
    state = {**network.state_dict(), **{name: named(network)[name] for name in _unsaved(network, history)}}
    network.save_pretrained(folder, state_dict=state, max_shard_size=shards)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, _WEIGHTS_ENTRY: _REFUSAL}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / _HISTORY).write_text(to_json(parts, {}), encoding="utf-8")
    try:
        problem = _problem(from_pretrained(type(network), folder, **_attention(network)), network, call, expected)
    except RuntimeError as error:  # shapes that the history does not tell
        problem = first_line(error)
    if problem:
        raise HistoryError(f"save_pretrained: expected the folder to give the same network, but {problem}. Use `save`.")
    return SavedModel("history")


def _lengths(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors, and as such the integers in attributes that do not follow from them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named(network).items()}
    sizes = {
        canonical(f"{prefix}.{own}"): (value,)
        for prefix, module in network.named_modules()
        if prefix and not updates_widths(module)
        for own, value in vars(module).items()
        if type(value) is int
    }
    return {**sizes, **shapes}


def _attention(network: Any) -> dict[str, Any]:
    """The attention that a network runs, which is not part of its configuration and rounds in its own way."""
    return {"attn_implementation": network.config._attn_implementation}


def _problem(loaded: nn.Module, network: nn.Module, call: Call, expected: list[Tensor]) -> str:
    """How a network that was loaded differs from the one that was saved, if it does."""
    found, wanted = loaded.state_dict(), network.state_dict()
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name), wanted.get(name)
        if one is None or other is None or one.dtype != other.dtype or not torch.equal(one.cpu(), other.cpu()):
            return f"{canonical(name)} is not loaded as it was"
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    outputs = _outputs(loaded.to(device), call)
    if len(outputs) != len(expected) or not all(map(_is_close, outputs, expected)):
        return "the network that is loaded returns something else"
    return ""


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE if expected.dtype.itemsize >= 4 else _HALF_TOLERANCE
    return largest_difference([found], [expected]) <= tolerance


def _outputs(network: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that the network returns for the example, in eval mode.

    Raises:
        StructureError: If it fails.
    """
    try:
        with preserved_state(network), torch.no_grad():
            return [out.detach().clone() for out in output_tensors(network(*call.args, **call.kwargs))]
    except Exception as error:
        raise StructureError(
            f"{type(network).__name__} fails on the example, {describe(call)} ({type(error).__name__}: "
            f"{first_line(error)}). Give an example that `forward` takes."
        ) from error


def _put(part: Path, folder: Path) -> None:
    """Move files into a folder, where they take the place of the weights and history that are there."""
    folder.mkdir(exist_ok=True)
    files = sorted(part.iterdir(), key=lambda file: file.name == "config.json")
    for pattern in ("model*.safetensors", "model.safetensors.index.json", _HISTORY):
        for old in folder.glob(pattern):
            old.unlink()
    for file in files:
        file.replace(folder / file.name)
