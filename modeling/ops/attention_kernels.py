"""Softmax attention of rows of queries to rows of keys: fused, or written out where its weights are wanted; and any
attention, documents as rows of their own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .documents import find_documents

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


def by_documents(attend, query, key, value, documents, **options) -> torch.Tensor:
    """attend(query, key, value), documents as rows of their own; 0 at padding. Groups of query heads may share a key
    and value head."""
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    if documents is None:
        return attend(query, key, value, **options)
    found = find_documents(documents)
    if not len(found.lengths):  # all is padding
        return torch.zeros_like(query)
    answer = attend(*(found.unpack(x) for x in (query, key, value)), **options)
    return found.repack(answer, *documents.shape)
