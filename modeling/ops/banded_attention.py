"""Attention to a band (`band.py`).

Cost and memory are linear in the length: queries in blocks attend to the keys around their block, all blocks at once.
"""

import math

import torch
import torch.nn.functional as F

from .attention_kernels import Kernel, fused
from .band import Band, take


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = fused,
    landmark_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(q k^T scale) v over what the band shows.

    query [batch, length, heads, dim]; key and value [batch, length, heads or a divisor of them, dim]; `landmark_query`,
    like `query`, asks the landmarks in its place. Answers ([batch, length, heads, dim], weights of blocks or None):
    `dense_weights` brings those into the usual form.
    """
    size, groups = query.shape[-1], query.shape[2] // key.shape[2]
    scale = size**-0.5 if scale is None else scale
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    if landmark_query is None or band.landmarks is None:
        around = [band.beside_landmarks(x) for x in (key, value)]
    else:
        query, *around = with_landmark_scores(query, landmark_query, key, value, band)
    query, key, value = (x.transpose(1, 2) for x in (band.queries(query), *around))
    output, weights = kernel(query, key, value, band.mask.to(query.dtype), scale=scale, dropout=dropout)
    return band.back(output[..., :size].transpose(1, 2)).contiguous(), weights


def with_landmark_scores(query, landmark_query, key, value, band: Band) -> tuple[torch.Tensor, ...]:
    """The score of each landmark as one more number of a query, which a landmark's key takes and no other: the queries,
    and keys and values `beside_landmarks`, all that much wider."""
    found = take(band.in_order(key), band.landmarks)
    scores = torch.einsum("bihd,bjhd->bihj", landmark_query, found.to(landmark_query.dtype))
    size, count = query.shape[-1], scores.shape[-1]
    key, value = (band.beside_landmarks(F.pad(x, (0, count))) for x in (key, value))
    key[:, -count:] = F.pad(torch.eye(count, dtype=key.dtype, device=key.device), (size, 0))[None, :, None]
    return torch.cat((query, scores.to(query.dtype)), dim=-1), key, value


def attend_seen(
    query,
    key,
    value,
    seen: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    kernel: Kernel = fused,
    landmark_query=None,
    **told,
) -> torch.Tensor:
    """The same for few queries, of which `seen` [batch, queries, keys] says what they see, and which of the keys are
    landmarks, [batch, keys]."""
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -math.inf)
    told["scale"] = query.shape[-1] ** -0.5 if told.get("scale") is None else told["scale"]
    if landmark_query is not None:  # a key is asked by one half of a query or by the other
        query, marked = torch.cat((query, landmark_query), dim=-1), landmarks[..., None, None]
        key = torch.cat((key * ~marked, key * marked), dim=-1)
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    output, _ = kernel(*(x.transpose(1, 2) for x in (query, key, value)), mask[:, None], **told)
    return output.transpose(1, 2)


def dense_weights(weights: torch.Tensor, band: Band) -> torch.Tensor:
    """Weights of blocks as [batch, heads, length, length]: as large as those of full attention."""
    column = torch.arange(band.length, device=weights.device)[None]
    column = band.around_queries(column).view(band.dilation * band.blocks, -1)
    batch = len(weights) // len(column)
    column = column.repeat(batch, 1)
    if band.landmarks is not None:
        column = torch.cat((column, band.landmarks.repeat_interleave(len(column) // batch, 0)), dim=1)
    if band.order is not None:
        column = take(band.order.repeat_interleave(len(column) // batch, 0), column)
    weights = weights.permute(0, 2, 1, 3)  # [blocks, block, heads, keys]
    dense = weights.new_zeros(*weights.shape[:3], band.length)
    dense = dense.scatter_add(3, column[:, None, None].expand_as(weights), weights)
    return band.back(dense).transpose(1, 2)
