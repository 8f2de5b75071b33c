"""Matching the shapes of a network to a checkpoint before its weights are loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import listed
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.graph import Axes
from lightning_prune.structure.layers import is_within, refresh
from lightning_prune.structure.size_attributes import size_attributes
from lightning_prune.surgery.change import Change, CutError, undo_on_error
from lightning_prune.surgery.depth import restore
from lightning_prune.surgery.edits import Drop, Keep, Replace, apply, same_effect
from lightning_prune.surgery.history import KEY, Dense, History, HistoryError, Shape, attach, history_of
from lightning_prune.surgery.masks import attach_masks, attach_read, read_masks
from lightning_prune.surgery.names import missing_or_unexpected
from lightning_prune.surgery.plain import damaged
from lightning_prune.surgery.shrink import shrink
from lightning_prune.surgery.tensors import blank, canonical, named

__all__ = [
    "dense_copy",
    "load_from",
    "load_narrow",
    "load_weights",
    "match_checkpoint_shapes",
    "replay",
    "with_history",
]


_NO_HISTORY = (
    "it is of a pruned network without its history, or of a part of one: save the whole module that was pruned, which "
    "has the history, or use `load_by_shapes`"
)


def load_from(checkpoint: Mapping[str, Any], model: nn.Module, *copies: nn.Module, strict: bool = False) -> None:
    """Set the widths and masks of ``model`` to those of ``checkpoint``, before its ``state_dict`` is loaded.

    Args:
        checkpoint: The checkpoint, see `save_into` and `save_masks_into`.
        model: The network, as in :func:`match_checkpoint_shapes`.
        copies: Networks of the same structure, which are changed too.
        strict: As in :func:`match_checkpoint_shapes`.

    Raises:
        HistoryError: If history or masks are damaged or of another architecture; the network is unchanged.
    """
    change = Change()
    with undo_on_error(change):
        _load_from(change, checkpoint, (model, *copies), strict=strict)


def load_weights(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Set the widths, masks and weights of ``model`` to those of ``checkpoint``.

    Args:
        checkpoint: The checkpoint, whose weights have canonical names.
        model: A dense network, or a pruned one with its history.

    Raises:
        HistoryError: If the checkpoint is damaged or of another network; the network is unchanged.
    """
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    change = Change()
    with undo_on_error(change):
        _load_from(change, checkpoint, (model,), strict=True)
        problems = list(_other_weights(model, weights))
        if problems and KEY not in checkpoint:
            raise _another_network(problems, _NO_HISTORY)
        _load_weights(change, model, weights)


def load_narrow(model: nn.Module, axes: Axes, weights: Mapping[str, Tensor]) -> None:
    """Cut a dense network, and load weights of these widths.

    Args:
        model: The network. It gets no history.
        axes: Positions to keep, by name of parameter or buffer and dimension.
        weights: The weights, by canonical name.

    Raises:
        HistoryError: If they are of another network; the network is unchanged.
    """
    change = Change()
    with undo_on_error(change):
        try:
            shrink(change, model, axes)
        except CutError as error:
            raise HistoryError(str(error)) from error
        if problems := list(_uneven(model)):
            raise _another_network(problems)
        _load_weights(change, model, weights)


def _uneven(model: nn.Module) -> Iterator[str]:
    """Messages about layers whose channels do not fill their groups."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            groups, channels = module.groups, [module.in_channels, module.out_channels]
        elif isinstance(module, nn.GroupNorm):
            groups, channels = module.num_groups, [module.num_channels]
        else:
            continue
        if any(number % groups for number in channels):
            shown = " and ".join(map(str, channels))
            yield f"{canonical(name)} has {groups} groups, which {shown} channels do not fill"


def _load_weights(change: Change, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a network of the right widths, as part of a ``change``."""
    # Names by canonical name; those of compiled modules differ.
    own = model.state_dict()
    names = {canonical(name): name for name in own}
    problems = list(_other_weights(model, weights))
    if problems:
        raise _another_network(problems)
    for tensor in {id(tensor): tensor for tensor in named(model).values()}.values():
        change.overwrite(tensor, tensor)  # logged, as loading may fail halfway
    try:
        with torch.inference_mode(False):
            found = OrderedDict((names.get(name, name), weight) for name, weight in weights.items())
            found._metadata = own._metadata  # type: ignore[attr-defined]  # without versions, MNASNet refuses
            model.load_state_dict(found)
    except RuntimeError as error:
        raise _another_network([" ".join(str(error).split())]) from error


def _load_from(change: Change, checkpoint: Mapping[str, Any], networks: Sequence[nn.Module], *, strict: bool) -> None:
    """Set the widths and masks of networks as part of a ``change``."""
    try:
        history = History.from_plain(checkpoint[KEY]) if KEY in checkpoint else None
        masks = read_masks(checkpoint)
        for network in networks:
            _match_shapes(change, network, checkpoint["state_dict"], history, strict=strict)
            change.edit_attributes(network, partial(attach_read, network, masks))
    except RecursionError as error:
        raise damaged("its layers are nested too deeply") from error


def _other_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Messages about weights of other names or shapes than those of a network of the right widths."""
    here = {canonical(name): content for name, content in model.state_dict().items()}
    for name, weight in weights.items():
        if isinstance(here.get(name), Tensor) and here[name].shape != weight.shape:
            yield f"{name} is {list(weight.shape)}, here it is {list(here[name].shape)}"
    yield from missing_or_unexpected(model, {}, (), weights)


def _another_network(
    problems: Sequence[str], otherwise: str = "the file or its pruning history was damaged: take another checkpoint"
) -> HistoryError:
    return HistoryError(
        f"This is a checkpoint of another architecture: {listed(problems, 3)}. Nothing has changed. "
        f"Build the network with the arguments it had when the checkpoint was written. If it has them, {otherwise}."
    )


def match_checkpoint_shapes(
    model: nn.Module, state_dict: Mapping[str, Any], history: History | None, *, strict: bool = False
) -> None:
    """Change the shapes of a network to those of a checkpoint, before ``load_state_dict``.

    Only tensors that the checkpoint's or the network's history names change their shape. If the network was cut
    differently before, they are set to zero. Optimizers keep their parameters; their state and masks must be loaded
    too. If anything is raised, the network is unchanged.

    Args:
        model: A dense network, or a pruned one with its history. It gets the checkpoint's history.
        state_dict: The checkpoint's weights, named as in ``model.state_dict()``.
        history: The checkpoint's history; None for a dense network.
        strict: Whether missing and unexpected tensors are errors, which also detects missing edits.

    Raises:
        HistoryError: If the checkpoint is of another architecture; the message names the first tensors that differ.
    """
    change = Change()
    with undo_on_error(change):
        _match_shapes(change, model, state_dict, history, strict=strict)


def with_history(structure: Structure, traced: TracedModel) -> Structure:
    """The structure of a network that was cut, with the groups that its present shapes alone do not show.

    Of attention with one head left, nothing tells that its 16 features are one unit, and with two, a trial that takes
    one of them runs other operators. So the network is traced as wide as it was before its cuts, and what is found is
    cut alike.

    Args:
        structure: As traced on the network as it is now.
        traced: The network and how it is run.
    """
    history = history_of(traced.model)
    if history is None or structure.widths.keys() == history.groups_now:
        return structure
    wide, change = dense_copy(traced, "real", blank=True), Change()
    for edit in history.until_replaced:
        apply(change, edit, wide)
    traced = replace(traced, model=wide, memo=None)
    found = with_flow(trace(traced), traced)
    for edit in history.since_replaced:
        if isinstance(edit, Keep):
            found = found.take(edit.kept)
        elif isinstance(edit, Drop):  # features leave with all of their heads
            heads = {name for name in edit.groups if name in found.widths and not found.group(name).within}
            found = found.take(dict.fromkeys(heads, ()))
    return found if found.widths.keys() == history.groups_now else structure


def dense_copy(traced: TracedModel, kind: Literal["real", "meta"] = "meta", *, blank: bool = False) -> nn.Module:
    """A copy of the network with the shapes it had before its first edit; tensors that were edited are zero.

    Args:
        traced: The network.
        kind: See `TracedModel.copy`.
        blank: See `FakeCopy`.
    """
    wide, history = traced.copy(kind, blank=blank).module, history_of(traced.model)
    attach(wide, None)
    if history is not None:
        _widen(Change(), wide, history)
    return wide


def replay(model: nn.Module, history: History) -> None:
    """Apply all edits of ``history`` to a dense network, keeping the remaining weights.

    Raises:
        HistoryError: If the network was pruned before, or is of another architecture.
    """
    if history_of(model) is not None:
        raise HistoryError("Expected a dense network to replay a history on, got one that has been pruned before.")
    match_checkpoint_shapes(model, {}, history)


def _match_shapes(
    change: Change, model: nn.Module, state_dict: Mapping[str, Any], history: History | None, *, strict: bool
) -> None:
    mine = history_of(model)
    if mine is None and history is None:
        return
    problems = list(_differences(model, mine, history, state_dict))
    if strict and not problems:
        gone = {} if mine is None else mine.dense.layers
        problems = list(missing_or_unexpected(model, gone, () if history is None else history.steps, state_dict))
    if problems:
        raise _another_network(problems)
    if mine is not None and history is not None and _same(mine, history):
        history = replace(history, dense=mine.dense)
    else:
        if mine is not None:
            _widen(change, model, mine)
        if history is not None:
            history = replace(history, dense=_replay(change, model, history))
    change.edit_attributes(model, partial(attach, model, history))


def _replay(change: Change, model: nn.Module, history: History) -> Dense:
    """Apply all edits to a dense network; returns what is needed to widen it again."""
    done = History({}, history.size)
    for step in history.steps:
        done = done.add(step, model)
        apply(change, step, model)
    return done.dense


def _widen(change: Change, model: nn.Module, history: History) -> None:
    dense = history.dense
    change.edit_attributes(model, lambda: attach_masks(model, {}))
    with torch.inference_mode(False), torch.no_grad():
        restore(change, model, dense.layers)
        present, sizes = named(model), size_attributes(model, history.shapes)
        for name, shape in history.shapes.items():
            if name not in dense.buffers and name not in sizes:
                change.assign(present[name], blank(present[name], shape), None)
        for name, buffer in dense.buffers.items():
            content = blank(present[name], buffer.shape)
            change.assign(present[name], content.copy_(buffer), None)
    for prefix, module in model.named_modules():
        if canonical(prefix) in dense.attributes:
            known = dense.attributes[canonical(prefix)]  # a wrapper of `torch.compile` has none of them
            change.set_attributes(module, {name: value for name, value in known.items() if name in vars(module)})
            if isinstance(module, nn.MultiheadAttention):
                change.edit_attributes(module, partial(refresh, module, {}))  # its class


def _before(model: nn.Module, mine: History | None) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by name, and names of modules, of the dense network."""
    present = named(model)
    modules = {canonical(prefix) for prefix, _ in model.named_modules(remove_duplicate=False)}
    for prefix, bare in mine.dense.layers.items() if mine is not None else ():
        present = {name: tensor for name, tensor in present.items() if not is_within(name, [prefix])}
        present.update((f"{prefix}.{local}", tensor) for local, tensor in named(bare).items())
        modules = {name for name in modules if not is_within(name, [prefix])} | {prefix}
        modules |= {canonical(f"{prefix}.{local}") for local, _ in bare.named_modules(remove_duplicate=False) if local}
    return present, modules


def _differences(
    model: nn.Module, mine: History | None, history: History | None, state_dict: Mapping[str, Any]
) -> Iterator[str]:
    """Messages about differences between a checkpoint and the dense network."""
    present, modules = _before(model, mine)
    named_by_both = {**({} if mine is None else mine.shapes), **({} if history is None else history.shapes)}
    for name, place in size_attributes(model, named_by_both.keys() - present.keys()).items():
        present[name] = torch.empty(place.value, device="meta")
    # By `id`, as a tied tensor has several names, of which a history may have only one.
    dense = {id(tensor): tuple(tensor.shape) for tensor in present.values() if not is_lazy(tensor)}
    if mine is not None:
        dense.update((id(present[name]), shape) for name, shape in mine.shapes.items())
    keys: dict[str, object] = {name: id(tensor) for name, tensor in present.items()}
    expected: dict[object, Shape] = dict(dense.items())
    if history is not None:
        problems = list(_shape_differences(history, {name: dense.get(id(tensor)) for name, tensor in present.items()}))
        yield from problems or _follow(history, modules, keys, expected)
        if problems:
            return
    for full_name, weight in state_dict.items():
        wanted = expected.get(keys.get(canonical(full_name)))
        if wanted is not None and isinstance(weight, Tensor) and not is_lazy(weight) and tuple(weight.shape) != wanted:
            yield f"{canonical(full_name)} is {list(weight.shape)}, here it should be {list(wanted)}"


def _shape_differences(history: History, dense: Mapping[str, Shape | None]) -> Iterator[str]:
    for name, shape in history.shapes.items():
        here = dense.get(name)
        if here != shape:
            yield f"{name} was {list(shape)} before it was cut, here it is {list(here) if here else 'missing'}"


def _follow(history: History, modules: set[str], keys: dict[str, object], shapes: dict[object, Shape]) -> Iterator[str]:
    """Apply all edits to names of modules, keys of tensors by name and shapes by key; yields problems."""
    for step in history.steps:
        if isinstance(step, Keep):
            for name, axes in step.axes.items():
                if (shape := shapes.get(keys.get(name))) is not None:
                    shapes[keys[name]] = tuple(len(axes.get(dim, range(length))) for dim, length in enumerate(shape))
            continue
        what = "taken out" if isinstance(step, Drop) else "replaced"
        yield from (f"{name} was {what}, here it is missing" for name in step.modules if name not in modules)
        if isinstance(step, Drop):
            _follow_drop(step, keys, shapes)
        else:
            _follow_replace(step, modules, keys, shapes)


def _follow_drop(step: Drop, keys: dict[str, object], shapes: dict[object, Shape]) -> None:
    for name in [name for name in keys if name.rpartition(".")[0] in step.modules]:
        owner, _, own = name.rpartition(".")
        key = keys.pop(name)
        if step.modules[owner] == "constant" and own == "bias":
            keys[name] = key
        elif step.modules[owner] == "constant" and own == "weight" and key in shapes:
            keys[name], shapes[name, id(step)] = (name, id(step)), (*shapes[key][:1], 0)


def _follow_replace(step: Replace, modules: set[str], keys: dict[str, object], shapes: dict[object, Shape]) -> None:
    for name in [name for name in keys if is_within(name, step.modules)]:
        del keys[name]
    for prefix, spec in step.modules.items():
        modules -= {name for name in modules if is_within(name, [prefix])}
        modules |= {prefix, *(f"{prefix}.{name}" for name, _ in spec.build("meta").named_modules() if name)}
        for name, shape in spec.shapes.items():
            full = f"{prefix}.{name}"
            keys[full], shapes[full, id(step)] = (full, id(step)), shape


def _same(mine: History, history: History) -> bool:
    steps, others = mine.steps, history.steps
    return len(steps) == len(others) and all(map(same_effect, steps, others))
