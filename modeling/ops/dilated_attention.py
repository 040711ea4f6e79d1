"""Dilated segments (LongNet: Ding et al., 2023, arXiv:2307.02486): near tokens densely, far ones ever more thinly.

For each pair (segment w, dilation r), head h takes of every segment of w tokens those at places p with p mod r = h mod
r, and they attend to each other causally. The answers are weighed by the denominators of their softmaxes (equation 11):
one softmax over the keys of all pairs, in which a key counts as often as it is shown. Places count the real tokens of a
document. Cost per head is n times the sum of w / r^2: linear in the length.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .attention_kernels import by_documents
from .partial_attention import Partial, causal_partial, together


def times_shown(query_place, key_place, heads: int, segments: Sequence[int], dilations: Sequence[int]) -> torch.Tensor:
    """The definition: how often a key is shown to a query of the same document, [batch, heads, queries, keys].
    query_place [batch, queries], key_place [batch, keys]."""
    query_place, key_place = query_place[:, None, :, None], key_place[:, None, None]
    head, count = torch.arange(heads, device=query_place.device)[:, None, None], 0
    for segment, dilation in zip(segments, dilations, strict=True):
        shown = (query_place // segment == key_place // segment) & (key_place <= query_place)
        taken = ((query_place - head) % dilation == 0) & ((key_place - head) % dilation == 0)
        count = count + (shown & taken).to(torch.int8)
    return count


def dilated_attention(
    query,
    key,
    value,
    segments: Sequence[int],
    dilations: Sequence[int],
    *,
    documents=None,
    scale: float | None = None,
    dropout: float = 0.0,
):
    """Shapes [batch, length, heads, dim], of keys and values a divisor of the heads; documents [batch, length] as in
    `documents.py`. Each dilation divides its segment; the first is 1."""
    options = {"segments": segments, "dilations": dilations, "dropout": dropout}
    options["scale"] = query.shape[-1] ** -0.5 if scale is None else scale
    return by_documents(dilated_rows, query, key, value, documents, **options)


def dilated_rows(query, key, value, segments, dilations, scale: float, dropout: float) -> torch.Tensor:
    length, parts = query.shape[1], []
    for segment, dilation in zip(segments, dilations, strict=True):
        size = min(segment, -(-length // dilation) * dilation)
        lines = [in_segments_of(x, size, dilation) for x in (query, key, value)]
        batch, many, _, heads, _ = lines[0].shape
        rows = (x.transpose(2, 3).flatten(0, 2) for x in lines)
        found = causal_partial(*rows, scale, dropout)
        found = found.each(lambda x, shape=(batch, many, heads): x.unflatten(0, shape).transpose(2, 3))
        parts.append(back_in_order(found, dilation, length))
    return together(parts)


def in_segments_of(x: torch.Tensor, size: int, dilation: int) -> torch.Tensor:
    """[batch, length, heads, dim] -> [batch, segments, size / dilation, heads, dim], of each head its own places."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size // dilation, dilation))
    if dilation == 1:
        return x[:, :, :, 0]
    head = torch.arange(x.shape[-2], device=x.device)
    return x[:, :, :, head % dilation, head]


def back_in_order(found: Partial, dilation: int, length: int) -> Partial:
    """[batch, segments, size / dilation, heads, ...] -> [batch, length, heads, ...]; nothing where a head took no
    token."""
    if dilation == 1:
        return found.each(lambda x: x.flatten(1, 2)[:, :length])
    head = torch.arange(found.top.shape[3], device=found.top.device)

    def spread(x: torch.Tensor, empty: float) -> torch.Tensor:
        places = x.new_full((*x.shape[:3], dilation, *x.shape[3:]), empty)
        places[:, :, :, head % dilation, head] = x
        return places.flatten(1, 3)[:, :length]

    least = torch.finfo(found.top.dtype).min
    return Partial(spread(found.numerator, 0.0), spread(found.denominator, 0.0), spread(found.top, least))
