"""`torch.nn.MultiheadAttention` whose heads and embedding width can shrink apart from each other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiheadAttention", "attention", "scale_of"]


def attention(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `MultiheadAttention` computes with the parameters of a layer; arguments and results are PyTorch's."""
    if is_causal and attn_mask is None:
        raise RuntimeError("expected `attn_mask` with `is_causal`, which only says that this mask is causal")
    if query.is_nested:
        return _attention_of_nested(layer, query), None
    only_causal = is_causal and key_padding_mask is None and not need_weights
    is_batched, is_self = query.dim() == 3, query is key and key is value
    if not is_batched:
        query, key, value = query[None], key[None], value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not layer.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    projected = _projected(layer, query, key, value, is_self)
    q, k, v = (part.view(*part.shape[:2], -1, layer.head_dim).transpose(1, 2) for part in projected)
    if layer.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = None if only_causal else _mask(layer, attn_mask, key_padding_mask, q, k)
    dropout, scale = layer.dropout if layer.training else 0.0, scale_of(layer)
    weights: Tensor | None = None
    if need_weights:
        products = q * scale @ k.transpose(-2, -1)
        weights = F.dropout((products if mask is None else products + mask).softmax(-1), dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, only_causal, scale=scale)
    out = layer.out_proj(out.transpose(1, 2).flatten(2))
    if not is_batched:
        return out[0], None if weights is None else weights[0]
    return out if layer.batch_first else out.transpose(0, 1), weights


def scale_of(layer: nn.MultiheadAttention) -> float:
    """The factor of the products of queries and keys: that of the heads' first width, if they have become narrower."""
    scale: float = vars(layer).get("scale", layer.head_dim**-0.5)
    return scale


def _projected(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, is_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, ``(batch, length, heads · features)``."""
    if layer.in_proj_weight is not None and is_self:
        q, k, v = F.linear(query, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        packed = layer.in_proj_weight
        w_q, w_k, w_v = weights if packed is None else packed.chunk(3)
        b_q, b_k, b_v = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
    if layer.bias_k is not None and layer.bias_v is not None:
        k = torch.cat((k, layer.bias_k.expand(len(k), -1, -1)), 1)
        v = torch.cat((v, layer.bias_v.expand(len(v), -1, -1)), 1)
    return q, k, v


def _mask(
    layer: nn.MultiheadAttention, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as numbers to add, which broadcast to ``(batch, heads, queries, keys)``."""
    added = int(layer.bias_k is not None) + int(layer.add_zero_attn)
    whole = None
    for mask in (attention, padding):
        if mask is None:
            continue
        if mask is padding:
            mask = mask[:, None, None]
        elif mask.dim() == 3:  # one for each head of each sample
            mask = mask.view(*q.shape[:2], *mask.shape[1:])
        if not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        mask = F.pad(mask, (0, added)) if added else mask
        if mask.shape[-1] != k.shape[2]:
            raise RuntimeError(f"expected a mask of {k.shape[2] - added} keys, got {mask.shape[-1] - added}")
        whole = mask if whole is None else whole + mask
    return whole


def _attention_of_nested(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention over samples of different lengths, which `nn.TransformerEncoder` packs in eval mode."""
    lengths = [len(sample) for sample in x.unbind()]
    padded = x.to_padded_tensor(0.0)
    positions = torch.arange(padded.shape[1], device=padded.device)
    absent = positions >= torch.tensor(lengths, device=padded.device)[:, None]
    out, _ = attention(layer, padded, padded, padded, absent, need_weights=False)
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)])


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with any number of heads of ``head_dim`` features, whatever its embedding width.

    PyTorch's computes the features of a head as embedding width / number of heads, so neither can change alone, and
    their scale from the features. A layer takes this class when it is cut; parameters, arguments and results are the
    same. Heads that have lost features keep their scale, in the attribute ``scale``.
    """

    forward = attention
