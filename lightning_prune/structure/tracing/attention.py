"""`torch.nn.MultiheadAttention` of a copy that is traced."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_prune.structure.attention import attention

__all__ = ["AttentionWeights"]

_SIGNATURE = inspect.signature(attention)


class _Unread:
    """Stands for attention weights that a network asks for and does not use."""


class AttentionWeights:
    """Whether a network uses the attention weights that `torch.nn.MultiheadAttention` returns by default.

    Their mean over the heads changes with the heads, so no head may leave where they are used. They are computed only
    there.

    Attributes:
        computed: Whether runs compute them.
        left_out: Whether any were left out since `start`.
    """

    def __init__(self) -> None:
        self.computed = False
        self.left_out = False
        self._returned: weakref.WeakSet[_Unread] = weakref.WeakSet()

    def start(self, computed: bool) -> None:
        """Begin a run."""
        self.computed, self.left_out = computed, False
        self._returned.clear()

    @property
    def kept(self) -> bool:
        """Whether the network kept what was left out, in its output for one."""
        return bool(self._returned)

    def forward_of(self, layer: nn.MultiheadAttention) -> Callable[..., Any]:
        """A `forward` for a layer, that computes what the layer does at any number of heads and any width."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            asked = _SIGNATURE.bind(layer, *args, **kwargs)
            asked.apply_defaults()
            needed = asked.arguments["need_weights"]
            asked.arguments["need_weights"] = needed and self.computed
            out = attention(*asked.args, **asked.kwargs)
            if self.computed or not needed:
                return out
            unread = _Unread()
            self._returned.add(unread)
            self.left_out = True
            return out[0], unread

        forward.__wrapped__ = layer.forward  # type: ignore[attr-defined]  # its signature is what `inspect` reports
        return forward
