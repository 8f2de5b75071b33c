"""Atomic changes of a live network: edits and new contents, verified once."""

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
from lightning_prune.surgery.history import ATTRIBUTE, History, HistoryError, edits_of, history_of, history_or_new
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
    agree: Callable[[bool], bool] = bool,
) -> Iterator[Transaction]:
    """Change a network, its optimizers and its averaged copies atomically.

    Within the context, any number of edits and contents can be applied; the network need not run in between. On exit,
    the network is run forward and backward once, and must have finite outputs and gradients if it had before. If
    anything is raised, including KeyboardInterrupt, everything is undone exactly. Histories are updated at each edit.

    Args:
        model: The network.
        optimizers: All optimizers of its parameters. They stay the same objects, with their groups.
        copies: Modules of the same structure (averaged weights), which are changed too.
        run: Runs a forward pass on an example, in the mode and precision of the training. Nothing is verified if None,
            for changes that keep all shapes (masks).
        epoch: Epoch, for the history.
        step: Number of optimizer steps so far, for the history.
        cut: Index of the cut in the schedule, for the history; by default the number of cuts so far.
        agree: In distributed training, returns whether the verification has succeeded in all processes, given whether
            it has in this one.

    Yields:
        The `Transaction`, which can also be undone later, as long as nothing was trained.

    Raises:
        CutError: If an edit does not match, or the network does not run after it.
        HistoryError: If an edit does not match the history.

    Example:
        Remove half of a layer, then replace the head and trace the network again:

        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune.structure import TracedModel, trace
        >>> from lightning_prune.surgery import spec_of, transaction
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> example = torch.zeros(2, 4)
        >>> traced = TracedModel.of(net, example)
        >>> with transaction(net, run=lambda: net(example)) as change:
        ...     structure = change.keep(trace(traced), {"0": (0, 1, 2, 3)})
        ...     head = {"2": spec_of(net[2], out_features=5)}
        ...     structure = change.replace(head, lambda: trace(traced), structure, new_dense=True)
        >>> net[0], net[2], structure.widths
        (Linear(in_features=4, out_features=4, bias=True), Linear(in_features=4, out_features=5, bias=True), {'0': 4})
    """
    change = Transaction(model, optimizers, copies, run, epoch=epoch, step=step, cut=cut, agree=agree)
    try:
        yield change
        change.verify()
    except BaseException:
        change.undo()
        raise


class Transaction(Change):
    """Edits and contents applied within :func:`transaction`, which can be undone."""

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
        agree: Callable[[bool], bool],
    ) -> None:
        super().__init__()
        self.model, self.optimizers, self.copies = model, tuple(optimizers), tuple(copies)
        history = history_of(model)
        if cut is None:
            cut = 0 if history is None else len({edit.cut for edit in history.edits})
        self.when = (epoch, step, cut)
        self._run, self._agree = run, agree
        self._checked = 0  # steps of the change that are verified

    def keep(
        self, structure: Structure, kept: Mapping[str, tuple[int, ...]], info: Mapping[str, float] | None = None
    ) -> Structure:
        """Make the network narrower; groups without units are removed with their layers.

        Args:
            structure: Structure of the network.
            kept: Units to keep by group, ascending, in the current numbering; other groups keep all units.
            info: Additional numbers for the history (a share, a metric).

        Returns:
            The structure after the cut.

        Raises:
            CutError: If the cut fails.
            HistoryError: If it does not match the history.
        """
        for edit in edits_of(structure, kept, *self.when, info):
            histories = {network: history_or_new(network, structure).add(edit, network) for network in self._networks}
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
        """Replace modules and trace the network again.

        New weights have the default initialization with a fixed seed, equal in all processes; use :meth:`install` for
        others.

        Args:
            modules: Specs of the new modules, by name: see `spec_of`. All are replaced before the network is traced.
            retrace: Traces the changed network: ``lambda: trace(traced)`` with the same `TracedModel`, which holds the
                live network.
            structure: Structure of the network; optional with ``new_dense``, or if the network was cut before.
            new_dense: Whether shares (of units, parameters, ...) refer to the new network from here on, as for a new
                head at the start of a run, rather than to the previous dense network, as for a truncation.
            info: Additional numbers for the history.
        """
        modules = _specs(modules)
        require_modules(self._networks, modules)
        edits, histories = {}, {}
        for network in self._networks:
            history = self._history(network, structure, new_dense=new_dense)
            # Until the network is traced, the groups that are known to remain.
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
        """Set the contents of parameters and buffers, by name and in their current shapes.

        Averaged copies are not changed.
        """
        if contents:
            install(self, self.model, contents)

    def mask(self, masks: Masks) -> None:
        """Set the masks of the network and apply them to its weights, copies and optimizer state.

        Args:
            masks: All masks of the network, by name of the parameter; True where a weight is masked.
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
        """Clear the state of the optimizers."""
        forget(self, self.optimizers)

    def verify(self) -> None:
        """Run the network forward and backward if it was changed since the last verification; called on exit.

        Raises:
            CutError: If it fails, or outputs or gradients are no longer finite.
        """
        if self._run is not None and len(self._done) > self._checked:
            with _as_cut_error():
                verify(self, self._run, self.model, self._agree)
        self._checked = len(self._done)

    @property
    def _networks(self) -> tuple[nn.Module, ...]:
        return (self.model, *self.copies)

    def _history(self, network: nn.Module, structure: Structure | None, *, new_dense: bool) -> History:
        if structure is not None:
            return history_or_new(network, structure)
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
