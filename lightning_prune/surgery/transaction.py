"""The one way to change a live network: all edits and new contents together, checked once, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure import Size
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import is_within
from lightning_prune.surgery.change import Change, CutError
from lightning_prune.surgery.edits import Replace, apply
from lightning_prune.surgery.history import ATTRIBUTE, History, HistoryError, begun, edits_of, history_of
from lightning_prune.surgery.masks import Masks, attach_masks
from lightning_prune.surgery.optimizers import unwrap
from lightning_prune.surgery.repairs import install
from lightning_prune.surgery.replacing import require_modules
from lightning_prune.surgery.shrink import forget
from lightning_prune.surgery.specs import LayerSpec
from lightning_prune.surgery.tensors import canonical, named
from lightning_prune.surgery.verify import verify

__all__ = ["Transaction", "transaction"]


@contextmanager
def transaction(
    model: nn.Module,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    run: Callable[[], Any] | None = None,
    *,
    epoch: int = 0,
    step: int = 0,
    cut: int | None = None,
) -> Iterator[Transaction]:
    """Change a network, its optimizers and its averaged copies, whole or not at all.

    Within the context, edits are made and contents installed, in any number; a network need not be able to run in
    between. At its end the network is run forward and backward once, and has to give finite outputs and gradients if it
    did before. Whatever is raised within the context or at its end, interrupts included, takes everything back, to the
    bit. Histories are attached at each edit.

    Args:
        model: The network.
        optimizers: Every optimizer that steps one of its parameters. They stay the same objects, with their groups.
        copies: Modules of the same structure (averaged weights) that are changed alike.
        run: A forward pass of the network on an example, in the mode and precision that training uses. Without one
            nothing is checked, which is for contents that change no shape (masks).
        epoch: The epoch in which this is done, for the history.
        step: Optimizer steps that went before, for the history.
        cut: Its place in the schedule, from 0, for the history; by default the number of cuts before.

    Yields:
        The `Transaction`. Kept after the end, it can be undone as long as nothing was trained.

    Raises:
        CutError: If an edit does not fit, or the network does not run after it.
        HistoryError: If an edit does not fit the history.

    Example:
        Half of a layer goes, then the head is replaced and the network traced again:

        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune.structure import TracedModel, trace
        >>> from lightning_prune.surgery import spec_of, transaction
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> example = torch.zeros(1, 4)
        >>> traced = TracedModel.of(net, example)
        >>> with transaction(net, run=lambda: net(example)) as change:
        ...     structure = change.keep(trace(traced), {"0": (0, 1, 2, 3)})
        ...     head = {"2": spec_of(net[2], out_features=5)}
        ...     structure = change.replace(head, lambda: trace(traced), structure, new_dense=True)
        >>> net[0], net[2], structure.widths
        (Linear(in_features=4, out_features=4, bias=True), Linear(in_features=4, out_features=5, bias=True), {'0': 4})
    """
    change = Transaction(model, optimizers, copies, run, epoch=epoch, step=step, cut=cut)
    try:
        yield change
        change.verify()
    except BaseException:
        change.undo()
        raise


class Transaction(Change):
    """What is done to a network within :func:`transaction`, which makes it: edits and contents, and the way back."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        copies: Iterable[nn.Module],
        run: Callable[[], Any] | None,
        *,
        epoch: int,
        step: int,
        cut: int | None,
    ) -> None:
        super().__init__()
        self.model, self.optimizers, self.copies = model, tuple(optimizers), tuple(copies)
        history = history_of(model)
        if cut is None:
            cut = 0 if history is None else len({edit.cut for edit in history.edits})
        self.when = (epoch, step, cut)
        self._run = run
        self._checked = 0  # steps of the change that a run of the network has passed

    def keep(
        self, structure: Structure, kept: Mapping[str, tuple[int, ...]], info: Mapping[str, float] | None = None
    ) -> Structure:
        """Make the network narrower; a group that keeps no unit is taken out with its layers.

        Args:
            structure: Of the network as it is now.
            kept: Units to keep by group, ascending, counted in the present widths; groups left out stay whole.
            info: Plain numbers worth remembering (a share, a metric).

        Returns:
            The structure after it.

        Raises:
            CutError: If it cannot be done; everything was taken back.
            HistoryError: If it does not fit the history; nothing was done.
        """
        for edit in edits_of(structure, kept, *self.when, info):
            histories = {network: begun(network, structure).add(edit, network) for network in self._networks}
            with _as_cut_error():
                apply(self, edit, self.model, self.optimizers, self.copies)
            self._attach(histories)
        return structure.take(kept)

    def replace(
        self,
        modules: Mapping[str, LayerSpec],
        retrace: Callable[[], Structure],
        structure: Structure | None = None,
        *,
        new_dense: bool = False,
        info: Mapping[str, float] | None = None,
    ) -> Structure:
        """Exchange modules for others, and trace the network again.

        The new weights are drawn by their class's rule from random numbers of their own, alike in all processes; for
        others, :meth:`install` them.

        Args:
            modules: What takes the place of each module, by its name: see `spec_of`. They go together: a network whose
                tail becomes an identity needs its new head before it can run.
            retrace: Traces the changed network: ``lambda: trace(traced)`` with the same `TracedModel`, which holds the
                live network.
            structure: Of the network as it is now. May be left out if ``new_dense``, or if the network was cut before.
            new_dense: Whether shares (of units, parameters ...) refer to the new network from here on: for a new head
                at the start of a run. Else they go on referring to the network as it was: for a truncation.
            info: Plain numbers worth remembering.

        Returns:
            The structure after it, which later cuts take.

        Raises:
            TypeError: If ``modules`` is not a mapping of names to `LayerSpec`; nothing was done.
            CutError: If there is no such module; everything was taken back.
            StructureError: If the network cannot be traced; at the end of the context everything is taken back.
        """
        modules = _specs(modules)
        require_modules(self._networks, modules)
        edits, histories = {}, {}
        for network in self._networks:
            history = self._history(network, structure, new_dense=new_dense)
            # Until the network is traced: what is known to stand.
            widths = {g: width for g, width in history.widths_now.items() if width and not is_within(g, modules)}
            edits[network] = Replace(modules, widths, history.original, new_dense, *self.when, info or {})
            histories[network] = history.add(edits[network], network)
        with _as_cut_error():
            apply(self, edits[self.model], self.model, self.optimizers, self.copies)
        self._attach(histories)
        after = retrace()
        self._attach({network: h.found(after, new_dense=new_dense) for network, h in histories.items()})
        return after

    def install(self, contents: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers other contents, by name and in their present shapes.

        Averaged copies keep what they have.
        """
        if contents:
            install(self, self.model, contents)

    def mask(self, masks: Masks) -> None:
        """Set weights to zero for good: in the network, which keeps the masks, its copies and the optimizers' state.

        Args:
            masks: All masks that the network has from now on, by name of the parameter; true where a weight is zero.
        """
        self.edit_attributes(self.model, lambda: attach_masks(self.model, masks))
        present = named(self.model)
        by_parameter = {present[name]: mask for name, mask in masks.items()}
        remembered = [
            (value, mask)
            for optimizer in map(unwrap, self.optimizers)
            for parameter, mask in by_parameter.items()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.shape == mask.shape
        ]
        everywhere = [(named(network)[name], mask) for network in self._networks for name, mask in masks.items()]
        for tensor, mask in (*everywhere, *remembered):
            self.overwrite(tensor, tensor.detach().masked_fill(mask.to(tensor.device), 0))

    def forget(self) -> None:
        """Clear the state of the optimizers: they step as if for the first time."""
        forget(self, self.optimizers)

    def verify(self) -> None:
        """Run the network forward and backward, if it was changed since the last time; called at the end.

        Raises:
            CutError: If it fails, or outputs or gradients are no longer finite.
        """
        if self._run is not None and len(self._done) > self._checked:
            with _as_cut_error():
                verify(self, self._run, self.model)
        self._checked = len(self._done)

    @property
    def _networks(self) -> tuple[nn.Module, ...]:
        return (self.model, *self.copies)

    def _history(self, network: nn.Module, structure: Structure | None, *, new_dense: bool) -> History:
        if structure is not None:
            return begun(network, structure)
        history = history_of(network)
        if history is not None:
            return history
        if not new_dense:
            raise HistoryError(
                "Expected the structure of the network as it is before a module is replaced: shares go on referring to "
                "it. Trace it before, or let the new network be the dense one (`new_dense=True`)."
            )
        return History({}, Size(0, 0, memory=0))

    def _attach(self, histories: Mapping[nn.Module, History]) -> None:
        for network, history in histories.items():
            self.set_attributes(network, {ATTRIBUTE: history})


def _specs(modules: object) -> dict[str, LayerSpec]:
    items = list(modules.items()) if isinstance(modules, Mapping) else []
    wrong = [found for name, found in items if not (isinstance(name, str) and isinstance(found, LayerSpec))]
    if wrong or not isinstance(modules, Mapping):
        raise TypeError(
            "expected a `LayerSpec` by the name of each module, got "
            f"{type(wrong[0] if wrong else modules).__name__}. Describe a layer by `spec_of(layer)`, or build a "
            '`LayerSpec("Linear", {"in_features": 8, "out_features": 3})`. Nothing has changed.'
        )
    return {canonical(name): spec for name, spec in items}


@contextmanager
def _as_cut_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CutError(f"The cut failed and was taken back, nothing has changed: {error}") from error
