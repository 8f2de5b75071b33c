"""Replacing modules of a live network, and their parameters in the optimizers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.scoring.contexts import seeded_rng
from lightning_prune.structure.layers import canonical, is_within, tensors
from lightning_prune.surgery.change import Change, CutError, undo_on_error, writable
from lightning_prune.surgery.depth import layer, put
from lightning_prune.surgery.masks import without_masks
from lightning_prune.surgery.optimizers import refuse, unwrap
from lightning_prune.surgery.specs import LayerSpec

__all__ = ["replace_modules", "require_modules"]

Named = list[tuple[str, nn.Parameter]]
#: Indices of an optimizer and one of its parameter groups.
GroupIndex = tuple[int, int]


def replace_modules(
    change: Change,
    models: Sequence[nn.Module],
    specs: Mapping[str, LayerSpec],
    optimizers: Iterable[Optimizer] = (),
    seed: int = 0,
) -> None:
    """Replace modules, as part of a ``change``, which is undone if it fails.

    New modules have the device, dtype and mode of the old ones and equal weights in all copies. In the optimizers, a
    new parameter replaces the old one of the same name. Others are added to the parameter group of the replaced
    module's parameters, else of the nearest parameter, preferably of the same kind (weights with at least two
    dimensions, or biases and scales), in the order of ``model.parameters()``: where ``configure_optimizers`` would put
    them.

    Args:
        change: Logs the changes.
        models: The network and copies of it.
        specs: Specs of the new modules, by name.
        optimizers: All optimizers of the network's parameters.
        seed: Seed of the new weights; the global random state is not changed.

    Raises:
        CutError: If a network has no such module.
        OptimizerRefusedError: If an optimizer is not supported.
    """
    optimizers = [unwrap(optimizer) for optimizer in optimizers]
    refuse(optimizers)
    require_modules(models, specs)
    before = _parameters(models[0], tied=True)
    with writable(), undo_on_error(change):
        with seeded_rng(seed):
            new = {name: _build(spec, models[0], name) for name, spec in specs.items()}
        for number, model in enumerate(models):
            for name, module in new.items():
                put(change, model, name, copy.deepcopy(module) if number else module)
            change.edit_attributes(model, lambda model=model: without_masks(model, specs))  # type: ignore[misc]
        _update_optimizers(change, optimizers, before, _parameters(models[0]), specs)


def require_modules(models: Iterable[nn.Module], names: Collection[str]) -> None:
    """Check that modules can be replaced.

    Raises:
        CutError: If a network has no such module, one is inside of another one, or a layer is also used elsewhere.
    """
    networks = tuple(models)
    for name in names:
        if not name or is_within(name, set(names) - {name}):
            raise CutError(
                f"Cannot replace {name or 'the network itself'!r}: expected modules inside of the network, none of "
                "them part of another one. Nothing has changed."
            )
        if any(not _has(model, name) for model in networks):
            raise CutError(
                f"Cannot replace {name!r}: the network (or one of its copies) has no such module. Nothing has changed."
            )
    for name, other in _used_elsewhere(networks[0], names):
        raise CutError(
            f"Cannot replace {name!r}: expected layers that stand in one place each, but {other!r} shares one with it. "
            "Give each place a layer of its own. Nothing has changed."
        )


def _has(model: nn.Module, name: str) -> bool:
    return any(canonical(prefix) == name for prefix, _ in model.named_modules(remove_duplicate=False))


def _used_elsewhere(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names of the same layer, of which one is to be replaced."""
    known: dict[int, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if tensors(module):
            place = canonical(prefix)
            # Within a replaced module, a layer may be used several times.
            known.setdefault(id(module), set()).add(next((name for name in names if is_within(place, [name])), place))
    for places in known.values():
        if len(places) > 1 and places & set(names):
            name = min(places & set(names))
            yield name, min(places - {name})


def _build(spec: LayerSpec, model: nn.Module, name: str) -> nn.Module:
    old = layer(model, name)
    assert old is not None
    like = next((t for m in (old, model) for t in m.parameters() if t.is_floating_point()), torch.empty(0))
    return spec.build(like.device, like.dtype).train(old.training)


def _parameters(model: nn.Module, *, tied: bool = False) -> Named:
    """Parameters by name in the order of ``model.parameters()``; with ``tied``, under each of their names."""
    return [(canonical(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=not tied)]


def _update_optimizers(
    change: Change, optimizers: Sequence[Optimizer], before: Named, after: Named, replaced: Collection[str]
) -> None:
    present = {id(parameter) for _, parameter in after}
    gone = {id(parameter) for _, parameter in before} - present
    homes = _param_groups_of(optimizers, before, after, replaced)
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            here = [(name, p) for name, p in after if homes.get(id(p)) == (number, index)]
            params = _new_params(group["params"], gone, here, dict(before), after)
            if [id(p) for p in params] != [id(p) for p in group["params"]]:
                change.replace_entries(group, {**group, "params": params, **_names(group, params, after)})
        state = {key: value for key, value in optimizer.state.items() if id(key) not in gone}
        if len(state) < len(optimizer.state):
            change.replace_entries(optimizer.state, state)


def _param_groups_of(
    optimizers: Sequence[Optimizer], before: Named, after: Named, replaced: Collection[str]
) -> dict[int, GroupIndex]:
    """Parameter group of each new parameter, by `id`; parameters without an optimizer are omitted."""
    known = {
        id(parameter): (number, index)
        for number, optimizer in enumerate(optimizers)
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    old, homes = {id(parameter) for _, parameter in before}, dict[int, GroupIndex]()
    for position, (name, parameter) in enumerate(after):
        if id(parameter) in old:
            continue
        module = next((module for module in replaced if is_within(name, [module])), "")
        same_name = [p for other, p in before if other == name]
        same_module = [p for other, p in before if is_within(other, [module])]
        earlier, later = [p for _, p in after[:position]][::-1], [p for _, p in after[position + 1 :]]
        nearest = (*same_name, *_alike_first(parameter, same_module), *_alike_first(parameter, earlier))
        for other in (*nearest, *_alike_first(parameter, later)):
            home = known.get(id(other), homes.get(id(other)))
            if home is not None:
                homes[id(parameter)] = home
                break
    return homes


def _alike_first(parameter: Tensor, others: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Sort parameters of the same kind first, as weights and biases often have separate groups."""
    return sorted(others, key=lambda other: (other.ndim > 1) != (parameter.ndim > 1))


def _new_params(
    params: Sequence[nn.Parameter],
    gone: Collection[int],
    new: Named,
    before: Mapping[str, nn.Parameter],
    after: Named,
) -> list[nn.Parameter]:
    """New parameters of a group: those of the same name are replaced, others inserted in the network's order."""
    successors = {id(before[name]): parameter for name, parameter in new if name in before and id(before[name]) in gone}
    arranged = [successors.get(id(p), p) for p in params if id(p) not in gone or id(p) in successors]
    order = {id(parameter): place for place, (_, parameter) in enumerate(after)}
    for _, parameter in new:
        if any(parameter is one for one in arranged):
            continue
        place = order[id(parameter)]
        earlier = [i for i, p in enumerate(arranged) if order.get(id(p), place) < place]
        later = [i for i, p in enumerate(arranged) if order.get(id(p), place) > place]
        nearest = max(earlier, key=lambda i: order[id(arranged[i])]) + 1 if earlier else None
        arranged.insert(nearest if nearest is not None else min(later, default=len(arranged)), parameter)
    return arranged


def _names(group: Mapping[str, object], params: Sequence[nn.Parameter], after: Named) -> dict[str, list[str]]:
    """``param_names`` of a group, if it has them."""
    known = group.get("param_names")
    if not isinstance(known, list) or not isinstance(group["params"], list):
        return {}
    names = {id(p): name for name, p in after} | {id(p): name for p, name in zip(group["params"], known, strict=True)}
    return {"param_names": [names[id(p)] for p in params]}
