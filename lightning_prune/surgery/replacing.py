"""Exchanging modules of a live network for others, and what an optimizer steps instead of what is gone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.scoring.contexts import seeded_rng
from lightning_prune.structure.layers import canonical, is_within, tensors
from lightning_prune.surgery.change import Change, CutError, whole, writable
from lightning_prune.surgery.depth import layer, put
from lightning_prune.surgery.masks import without_masks
from lightning_prune.surgery.optimizers import refuse, unwrap
from lightning_prune.surgery.specs import LayerSpec

__all__ = ["exchange", "require_modules"]

Named = list[tuple[str, nn.Parameter]]
#: Number of an optimizer, and of one of its groups.
Home = tuple[int, int]


def exchange(
    change: Change,
    models: Sequence[nn.Module],
    specs: Mapping[str, LayerSpec],
    optimizers: Iterable[Optimizer] = (),
    seed: int = 0,
) -> None:
    """Put other modules in the place of named ones, as part of a ``change``, which is undone whole if it fails.

    The new modules have the device, the floating-point type and the mode of those they replace, and are alike in all
    networks. In the optimizers a new parameter takes the place of the old one of the same name. One without takes its
    group from the parameters of the replaced module, else from the nearest parameter before it, of its kind (weights
    with two or more dimensions; biases and scales) where there is one, and stands in the group in the order of
    ``model.parameters()``: where ``configure_optimizers`` puts it when it runs on the changed network.

    Args:
        change: Writes down the way back.
        models: The network, and copies of it.
        specs: What takes the place of each module, by name.
        optimizers: Every optimizer that steps one of the network's parameters.
        seed: Of the random numbers that the new weights are drawn from; those of the training are not touched.

    Raises:
        CutError: If a network has no such module.
        OptimizerRefusedError: If an optimizer cannot follow.
    """
    optimizers = [unwrap(optimizer) for optimizer in optimizers]
    refuse(optimizers)
    require_modules(models, specs)
    before = _parameters(models[0], tied=True)
    with writable(), whole(change):
        with seeded_rng(seed):
            new = {name: _build(spec, models[0], name) for name, spec in specs.items()}
        for number, model in enumerate(models):
            for name, module in new.items():
                put(change, model, name, copy.deepcopy(module) if number else module)
            change.edit_attributes(model, lambda model=model: without_masks(model, specs))  # type: ignore[misc]
        _step_instead(change, optimizers, before, _parameters(models[0]), specs)


def require_modules(models: Iterable[nn.Module], names: Collection[str]) -> None:
    """Refuse to replace what is no module of all these networks.

    Raises:
        CutError: If a network has no such module, one of them is part of another one, or the network uses a layer of it
            elsewhere too.
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
    """Two places by name, one of them replaced, where the network has the same layer with tensors."""
    known: dict[int, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if tensors(module):
            place = canonical(prefix)
            # Within one module that goes whole, a layer may stand several times.
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
    """Parameters by name in the order of ``model.parameters()``; ``tied`` ones on request under each of their names."""
    return [(canonical(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=not tied)]


def _step_instead(
    change: Change, optimizers: Sequence[Optimizer], before: Named, after: Named, replaced: Collection[str]
) -> None:
    present = {id(parameter) for _, parameter in after}
    gone = {id(parameter) for _, parameter in before} - present
    homes = _homes(optimizers, before, after, replaced)
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            here = [(name, p) for name, p in after if homes.get(id(p)) == (number, index)]
            params = _arranged(group["params"], gone, here, dict(before), after)
            if [id(p) for p in params] != [id(p) for p in group["params"]]:
                change.replace_entries(group, {**group, "params": params, **_names(group, params, after)})
        state = {key: value for key, value in optimizer.state.items() if id(key) not in gone}
        if len(state) < len(optimizer.state):
            change.replace_entries(optimizer.state, state)


def _homes(optimizers: Sequence[Optimizer], before: Named, after: Named, replaced: Collection[str]) -> dict[int, Home]:
    """Where each new parameter belongs, by identity; those that no optimizer would step are left out."""
    known = {
        id(parameter): (number, index)
        for number, optimizer in enumerate(optimizers)
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    old, homes = {id(parameter) for _, parameter in before}, dict[int, Home]()
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
    """Others of the kind of a parameter, then the rest: weights and biases often have groups of their own."""
    return sorted(others, key=lambda other: (other.ndim > 1) != (parameter.ndim > 1))


def _arranged(
    params: Sequence[nn.Parameter],
    gone: Collection[int],
    new: Named,
    before: Mapping[str, nn.Parameter],
    after: Named,
) -> list[nn.Parameter]:
    """The parameters of a group: new ones in the place of their namesakes, the others by the order of the network."""
    heirs = {id(before[name]): parameter for name, parameter in new if name in before and id(before[name]) in gone}
    arranged = [heirs.get(id(p), p) for p in params if id(p) not in gone or id(p) in heirs]
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
    """The names of a group's parameters, where it was given named ones."""
    known = group.get("param_names")
    if not isinstance(known, list) or not isinstance(group["params"], list):
        return {}
    names = {id(p): name for name, p in after} | {id(p): name for p, name in zip(group["params"], known, strict=True)}
    return {"param_names": [names[id(p)] for p in params]}
