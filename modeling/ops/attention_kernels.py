"""Softmax attention of rows of queries to rows of keys: fused, or written out where its weights are wanted."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def fused(query, key, value, mask, scale=None, dropout: float = 0.0) -> tuple[torch.Tensor, None]:
    """[rows, heads, queries or keys, dim] by torch's fused attention."""
    output = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
    return output, None


def written_out(query, key, value, mask, scale=None, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with its weights [rows, heads, queries, keys]."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=wide).to(query.dtype)
    return F.dropout(weights, dropout) @ value, weights
