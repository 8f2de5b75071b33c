"""What a network costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field

from lightning_prune.structure.graph import Structure

__all__ = ["Size"]


@dataclass(frozen=True)
class Size:
    """What a network costs: counted from its structure, and measured where somebody has measured it.

    Attributes:
        params: Number of parameters; with masks, of those that are not masked.
        macs: Multiply-accumulates of one sample's forward pass (1 MAC = 2 FLOPs).
        widths: Units per group.
        memory: Bytes of the activations of one sample, see `CostModel.memory`; ``None`` if unknown.
        table_latency: Milliseconds of one sample by the table of latencies, if there is one.
        bytes: Size of the saved ``state_dict``.
        latency: Milliseconds per forward pass by batch size.
        latency_spread: Half of the interquartile range of these, where it is known.
        backbone: Number of parameters of the backbone alone, where it is known which part that is.
        layers: Parameters of the convolutional layers of the backbone, the first one first, see `layer_parameters`.
        reachable: Shares of ``"params"`` and ``"macs"`` that lie on what can be pruned, where they are known; see
            `Structure.reachable`.
        zeros: Number of masked weights, where there are masks.
    """

    params: int
    macs: int
    widths: Mapping[str, int] = field(default_factory=dict)
    _: KW_ONLY
    memory: int | None = None
    table_latency: float | None = None
    bytes: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)
    latency_spread: Mapping[int, float] = field(default_factory=dict)
    backbone: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    reachable: Mapping[str, float] = field(default_factory=dict)
    zeros: int | None = None

    @classmethod
    def of(cls, structure: Structure) -> Size:
        """What can be counted of a network as it is."""
        widths, cost = structure.widths, structure.cost
        latency = None if cost.latency_table is None else cost.latency(widths)
        memory = cost.memory(widths)
        return cls(cost.params(widths), cost.macs(widths), widths, memory=memory, table_latency=latency)

    def among(self, selected: Collection[str], structure: Structure) -> tuple[str, ...]:
        """The ``selected`` groups, and those that have vanished since the network had this size."""
        return (*selected, *(self.widths.keys() - structure.widths.keys()))

    def amount(self, quantity: str, selected: Collection[str]) -> float:
        """The size in ``quantity`` (see `Target`); units are counted over the ``selected`` groups only.

        Raises:
            ValueError: If the latency is asked for and was not measured.
        """
        if quantity == "units":
            return sum(self.widths[name] for name in selected)
        amount: float | None = self.table_latency if quantity in ("latency", "latency_ms") else getattr(self, quantity)
        if amount is None:
            raise ValueError(
                f"expected a {quantity} that was measured, got none: the structure needs a table of latencies"
            )
        return amount
