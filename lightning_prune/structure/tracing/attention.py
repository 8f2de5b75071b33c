"""`torch.nn.MultiheadAttention` of a copy that is traced."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_prune.structure.attention import attention

__all__ = ["AttentionWeights"]


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

        def forward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            key_padding_mask: Tensor | None = None,
            need_weights: bool = True,
            attn_mask: Tensor | None = None,
            average_attn_weights: bool = True,
            is_causal: bool = False,
        ) -> Any:
            computed = need_weights and self.computed
            out = attention(
                layer, query, key, value, key_padding_mask, computed, attn_mask, average_attn_weights, is_causal
            )
            if computed or not need_weights:
                return out
            unread = _Unread()
            self._returned.add(unread)
            self.left_out = True
            return out[0], unread

        return forward
