"""PyTorch's own count of floating-point operations, the reference of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["counting"]


def counting() -> FlopCounterMode:
    """A counter that knows the processor's fused attention as well, which that of PyTorch 2.11 does not."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _flops})


def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)
