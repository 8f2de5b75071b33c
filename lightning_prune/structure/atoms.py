"""Union-find over atoms: one atom for every index of every axis, united when two indices can only go together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Atoms", "MismatchError"]

IndexArray = npt.NDArray[np.int64]


class MismatchError(Exception):
    """A cut network couples what the original does not: the cut would be wrong."""


class Atoms:
    """Classes of indices that must be removed together, and the reasons for which some must stay.

    Attributes:
        sealed: Refuse what a first trace did not see: uniting two classes of which one may shrink, or freezing one that
            may, raises `MismatchError`. The trial of a cut runs like this.
    """

    def __init__(self) -> None:
        self.parent: IndexArray = np.empty(0, dtype=np.int64)
        self.reason: IndexArray = np.empty(0, dtype=np.int64)  # index into `reasons`, or -1
        self.reasons: list[str] = []
        self.sealed = False
        self._count = 0
        self._frozen_roots: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)

    def fresh(self, n: int, reason: str = "") -> IndexArray:
        """``n`` new atoms; frozen at birth if a reason is given."""
        start, self._count = self._count, self._count + n
        if self._count > len(self.parent):
            grown = max(self._count, 2 * len(self.parent), 1024)
            self.parent = np.concatenate([self.parent, np.arange(len(self.parent), grown)])
            self.reason = np.concatenate([self.reason, np.full(grown - len(self.reason), -1)])
        atoms = np.arange(start, self._count)
        if reason:
            self.reason[atoms] = self._reason(reason)
        return atoms

    def find(self, atoms: IndexArray) -> IndexArray:
        """The representative of each atom's class."""
        roots = self.parent[atoms]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = self.parent[above]
        self.parent[atoms] = roots
        return roots

    def unite(self, a: IndexArray, b: IndexArray) -> None:
        """Unite atoms pairwise."""
        while True:
            ra, rb = self.find(a), self.find(b)
            apart = ra != rb
            if not apart.any():
                return
            low, high = np.minimum(ra, rb)[apart], np.maximum(ra, rb)[apart]
            if self.sealed and not (self.is_frozen(low) & self.is_frozen(high)).all():
                raise MismatchError("indices meet that belong to different units")
            np.minimum.at(self.parent, high, low)

    def freeze(self, atoms: IndexArray, reason: str) -> None:
        """Forbid the removal of these atoms' classes, for the reason given."""
        if self.sealed:
            if not self.is_frozen(atoms).all():
                raise MismatchError(f"a unit may not be removed here: {reason}")
            return
        fresh = atoms[self.reason[atoms] < 0]
        if fresh.size:
            self.reason[fresh] = self._reason(reason)

    def frozen(self) -> npt.NDArray[np.bool_]:
        """For every atom, if it represents its class: whether the class must stay."""
        held = np.flatnonzero(self.reason >= 0)
        frozen = np.zeros(len(self.parent), dtype=np.bool_)
        frozen[self.find(held)] = True
        return frozen

    def find_known(self, atoms: IndexArray) -> IndexArray:
        """Representatives of those of these atoms that exist here (and not only in a copy)."""
        return self.find(atoms[atoms < self._count])

    def sealed_copy(self, *, sealed: bool = True) -> Atoms:
        """The same classes, to check a second trace against: once sealed, nothing new may be united or frozen."""
        other = Atoms()
        other.parent, other.reason, other.reasons = self.parent.copy(), self.reason.copy(), list(self.reasons)
        other._count = self._count
        other._frozen_roots = other.frozen()[: self._count]
        other.sealed = sealed
        return other

    def is_frozen(self, atoms: IndexArray) -> npt.NDArray[np.bool_]:
        """Whether each atom's class must stay (once sealed; atoms born later are constants and count as frozen)."""
        roots = self.find(atoms)
        known = roots < len(self._frozen_roots)
        frozen = np.ones(len(roots), dtype=np.bool_)
        frozen[known] = self._frozen_roots[roots[known]]
        return frozen

    def class_reasons(self) -> dict[int, str]:
        """The first reason given for each frozen class, by representative."""
        everything = np.arange(self._count)
        held = everything[self.reason[everything] >= 0]
        first: dict[int, int] = {}
        for root, reason in zip(self.find(held).tolist(), self.reason[held].tolist(), strict=True):
            first[root] = min(reason, first.get(root, reason))
        return {root: self.reasons[reason] for root, reason in first.items()}

    def _reason(self, text: str) -> int:
        if not self.reasons or self.reasons[-1] != text:
            self.reasons.append(text)
        return len(self.reasons) - 1
