"""What can be pruned in a network, what cannot, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.reporting.couplings import couplings_figure
from lightning_prune.reporting.grid import Grid, Shown, count, plural, share
from lightning_prune.structure.graph import Group, Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Inspection", "reached"]

# Long residual stages couple dozens of layers; the first ones identify the stage.
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Inspection(Shown):
    """The structure of a network, displayed with `print`, in a terminal or in a notebook.

    Attributes:
        structure: Groups and frozen axes of the network.
    """

    structure: Structure

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self.structure.cost.params(self.structure.widths)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass (1 MAC = 2 FLOPs)."""
        return self.structure.cost.macs(self.structure.widths)

    @property
    def units(self) -> int:
        """Number of prunable units."""
        return sum(self.structure.widths.values())

    @property
    def reachable(self) -> float:
        """Share of the parameters on at least one prunable axis, in [0, 1]."""
        return self.structure.reachable["params"]

    @property
    def summary(self) -> str:
        """The totals in one line."""
        units = "1 unit" if self.units == 1 else f"{count(self.units)} units"
        return (
            f"{count(self.params)} parameters, {count(self.macs)} MACs per sample (1 MAC = 2 FLOPs). "
            f"{units} in {plural(len(self.structure.groups), 'group')} can be pruned; "
            f"{reached(self.structure.reachable)} lie on them."
        )

    def grids(self) -> tuple[Grid, ...]:
        """The tables: what can be pruned, what cannot and why, and notes."""
        return (self._groups(), *(grid for grid in (self._frozen(), self._notes()) if grid.rows))

    def figure(self) -> Figure:
        """The figure: one row per layer, one column per group, and frozen axes coloured by reason.

        Needs the extra ``plot``. Save it with ``inspection.figure().savefig("widths.png")``.
        """
        return couplings_figure(self.structure, self.summary)

    def _groups(self) -> Grid:
        widths, cost = self.structure.widths, self.structure.cost
        rows = []
        for group in self.structure.groups:
            held = self.params - cost.params(widths | {group.name: 0})
            producers = [name for name in group.producers if name != group.name]
            rows.append(
                (
                    group.name,
                    f"every head of {_names(group.within)}" if group.within else _names(producers),
                    _names(group.consumers),
                    count(group.width) + (f" × {_channels(group)}" if _channels(group) > 1 else ""),
                    count(held),
                    share(held, self.params),
                )
            )
        columns = ("group", "coupled with", "consumers", "units", "parameters", "of all")
        note = f"{self.summary} A weight between two groups is counted in both." if rows else self.summary
        for group in [group for group in self.structure.groups if _channels(group) > 1][:1]:
            units, channels = count(group.width), _channels(group)
            note += f" {units} × {channels} means {units} units of {channels} channels each, removed together."
        if any(group.within for group in self.structure.groups):
            note += ' Features of heads (#head_dim) are pruned only if they are named: layers="*#head_dim".'
        return Grid("What can be pruned", columns, tuple(rows), words=3, note=note)

    def _frozen(self) -> Grid:
        entries: dict[tuple[str, str], list[int]] = {}
        for axis in self.structure.frozen:
            entries.setdefault((axis.layer, axis.reason), []).append(axis.width)
        rows = ((layer, why, ", ".join(map(str, dict.fromkeys(widths)))) for (layer, why), widths in entries.items())
        return Grid("What cannot be pruned", ("layer", "reason", "width"), tuple(rows), words=2)

    def _notes(self) -> Grid:
        remarks = (*self.structure.notes, *self.structure.remarks)
        return Grid("Notes", ("",), tuple((remark,) for remark in remarks))


def reached(shares: Mapping[str, float]) -> str:
    """Shares of parameters and MACs as text, see `Structure.reachable`."""
    return f"{100 * shares['params']:.1f} % of the parameters and {100 * shares['macs']:.1f} % of the MACs"


def _channels(group: Group) -> int:
    """Channels or features per unit, in the layer that the group is named after."""
    return int(group.members[0].index.shape[1])


def _names(names: Sequence[str]) -> str:
    more = f" +{len(names) - _NAMES_SHOWN}" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
