"""Union-find over atoms: one atom per index of every axis, united if two indices can only be removed together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Atoms", "IndexArray", "MismatchError", "NumberError", "SealedAtoms"]

IndexArray = npt.NDArray[np.int64]
_NONE: IndexArray = np.empty(0, dtype=np.int64)


class MismatchError(Exception):
    """The narrower network couples indices that the original does not, so the cut would be wrong.

    Attributes:
        atoms: Representatives of the units involved, if known.
    """

    def __init__(self, message: str, atoms: IndexArray = _NONE) -> None:
        super().__init__(message)
        self.atoms = atoms


class NumberError(MismatchError):
    """The narrower network runs other operators, or the same with other numbers."""


class Atoms:
    """Equivalence classes of indices that must be removed together, and the reasons why some are frozen.

    Unions are collected and processed in one batch when a class is looked up.
    """

    def __init__(self) -> None:
        self.parent: IndexArray = np.empty(0, dtype=np.int64)
        self.reason: IndexArray = np.empty(0, dtype=np.int64)  # index into `reasons`, or -1
        self.reasons: list[str] = []
        self._numbers: dict[str, int] = {}
        self._count = 0
        self._pairs: list[tuple[IndexArray, IndexArray]] = []
        self._runs: dict[int, IndexArray] = {}  # arrays returned by `fresh`

    def __len__(self) -> int:
        return self._count

    def fresh(self, n: int, reason: str = "") -> IndexArray:
        """Create ``n`` atoms, frozen if a reason is given."""
        start, self._count = self._count, self._count + n
        if self._count > len(self.parent):
            grown = max(self._count, 2 * len(self.parent), 1024)
            self.parent = np.concatenate([self.parent, np.arange(len(self.parent), grown)])
            self.reason = np.concatenate([self.reason, np.full(grown - len(self.reason), -1)])
        atoms = np.arange(start, self._count)
        self._runs[id(atoms)] = atoms
        if reason:
            self.reason[atoms] = self._number(reason)
        return atoms

    def find(self, atoms: IndexArray) -> IndexArray:
        """The representative of each atom's class."""
        self._unite_pending()
        return self._find(atoms)

    def unite(self, a: IndexArray, b: IndexArray) -> None:
        """Unite atoms pairwise."""
        if len(a) != len(b):
            raise MismatchError(f"{len(a)} indices meet {len(b)}")
        if a is not b:
            self._pairs.append((a, b))

    def freeze(self, atoms: IndexArray, reason: str) -> None:
        """Mark the classes of these atoms as not removable."""
        fresh = atoms[self.reason[atoms] < 0]
        if fresh.size:
            self.reason[fresh] = self._number(reason)

    def frozen(self, *, besides: str | None = None) -> npt.NDArray[np.bool_]:
        """Mask over atoms: True for representatives of frozen classes.

        Args:
            besides: Leave out reasons that begin like this.
        """
        counts = [besides is None or not text.startswith(besides) for text in self.reasons]
        held = np.flatnonzero(np.array([*counts, False])[self.reason])  # -1 is the last one
        frozen = np.zeros(len(self.parent), dtype=np.bool_)
        frozen[self.find(held)] = True
        return frozen

    def are_frozen(self, atoms: IndexArray) -> bool:
        """Whether all these atoms are in frozen classes."""
        return bool(self.frozen()[self.find(atoms)].all())

    def class_reasons(self) -> dict[int, str]:
        """The first reason given for each frozen class, by representative."""
        held = np.flatnonzero(self.reason[: self._count] >= 0)
        first = np.full(self._count, len(self.reasons))
        np.minimum.at(first, self.find(held), self.reason[held])
        return {root: self.reasons[first[root]] for root in np.flatnonzero(first < len(self.reasons)).tolist()}

    def _find(self, atoms: IndexArray) -> IndexArray:
        roots = self.parent[atoms]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = self.parent[above]
        self.parent[atoms] = roots
        return roots

    def _unite_pending(self) -> None:
        """Process the collected unions."""
        if not self._pairs:
            return
        # Each pair of arrays once.
        pairs = {(id(a), id(b)): (a, b) for a, b in self._pairs}.values()
        a, b = (np.concatenate(side) for side in zip(*filter(self._apart, pairs), (_NONE, _NONE), strict=True))
        self._pairs = []
        while True:
            ra, rb = self._find(a), self._find(b)
            apart = ra != rb
            if not apart.any():
                return
            a, b, ra, rb = a[apart], b[apart], ra[apart], rb[apart]
            # Every root that is not the smallest among its neighbours is attached to one, which at least halves the
            # roots.
            np.minimum.at(self.parent, np.maximum(ra, rb), np.minimum(ra, rb))

    def _apart(self, pair: tuple[IndexArray, IndexArray]) -> bool:
        """Attach one array to the other directly if none of its atoms were united before; False if that was done."""
        for above, below in (pair, pair[::-1]):
            later = id(below) in self._runs and len(below) and above.max() < below[0]
            if later and np.array_equal(self.parent[below], below):
                self.parent[below] = above
                return False
        return True

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.reasons)
            self.reasons.append(text)
        return self._numbers[text]


class SealedAtoms(Atoms):
    """Classes of a first trace that a second trace is checked against: nothing new may be united or frozen.

    Uniting two classes of which one is removable, or freezing a removable class, is a mismatch. Atoms created later are
    constants and count as frozen.
    """

    def __init__(self, atoms: Atoms) -> None:
        super().__init__()
        frozen = atoms.frozen()
        self.parent, self.reason, self._count = atoms.parent.copy(), atoms.reason.copy(), len(atoms)
        self._known, self._is_frozen = len(atoms), frozen
        self._held: list[tuple[IndexArray, str]] = []

    def freeze(self, atoms: IndexArray, reason: str) -> None:
        """Record the atoms; `check` compares them with the first trace."""
        self._held.append((atoms, reason))

    def check(self) -> None:
        """Compare the recorded unions and frozen atoms with the first trace.

        Raises:
            MismatchError: If anything new was united or frozen.
        """
        held = np.concatenate([_NONE, *(atoms for atoms, _ in self._held)])
        if self._loose(self._find(held)).size:
            for atoms, reason in self._held:
                loose = self._loose(self._find(atoms))
                if loose.size:
                    raise MismatchError(f"a unit may not be removed here: {reason}", loose)
        self._held = []
        if self._pairs:
            ra, rb = (self._find(np.concatenate(side)) for side in zip(*self._pairs, strict=True))
            apart = ra != rb
            loose = self._loose(np.concatenate([ra[apart], rb[apart]]))
            if loose.size:
                raise MismatchError("indices meet that belong to different units", loose)
            self._pairs = []

    def find(self, atoms: IndexArray) -> IndexArray:
        """The representative of each atom's class in the first trace."""
        return self._find(atoms)

    def are_frozen(self, atoms: IndexArray) -> bool:
        """Whether all these atoms are in classes that were frozen in the first trace."""
        return not self._loose(self._find(atoms)).size

    def _loose(self, roots: IndexArray) -> IndexArray:
        """The representatives among these that are not frozen."""
        known = roots[roots < self._known]
        return np.unique(known[~self._is_frozen[known]])
