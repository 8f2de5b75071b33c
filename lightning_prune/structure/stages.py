"""Stages of residual networks: a stream that several layers add to, and the groups inside its branches."""

from __future__ import annotations

from lightning_prune.structure.graph import Group, Structure

__all__ = ["stages_of"]


def stages_of(structure: Structure) -> dict[str, tuple[str, ...]]:
    """Find the groups inside the branches of every residual stream.

    A stream is a group that several layers produce and a sum couples. A group belongs to its stage if it can be removed
    without disconnecting outputs from inputs, and if the layers that read it produce the stream or other groups of the
    stage.

    Args:
        structure: Structure with its flow (`with_flow`).

    Returns:
        Names of the inner groups by name of the stream, in the order of execution, for streams that have any.

    Raises:
        ValueError: If the structure has no flow.
    """
    if structure.flow is None:
        raise ValueError("expected a structure with its flow, got none: see `with_flow`")
    by_layer = {layer: group for group in structure.groups for layer in group.producers}
    found: dict[str, tuple[str, ...]] = {}
    for group in structure.groups:
        stream = _stream(group, by_layer)
        if stream is not None and not isinstance(structure.flow.without({group.name}), str):
            found[stream] = (*found.get(stream, ()), group.name)
    return {name: found[name] for name in structure.widths if name in found}


def _stream(group: Group, by_layer: dict[str, Group]) -> str | None:
    """The stream in which the branch of a group ends."""
    seen = {group.name}
    while len(group.producers) == 1:
        ends = {by_layer[layer].name if layer in by_layer else None for layer in group.consumers}
        if len(ends) != 1 or (end := ends.pop()) is None or end in seen:
            return None
        seen.add(end)
        group = next(other for other in by_layer.values() if other.name == end)
    return group.name if len(seen) > 1 else None
