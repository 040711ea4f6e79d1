"""Attention to about 2 sqrt(n) of n tokens, through which each can reach all in two layers (Child et al., 2019,
arXiv:1904.10509, section 4.2).

    strided:  i sees j <= i  where  i - j < stride  or  (i - j) mod stride = 0
    fixed:    i sees j <= i  where  j // stride = i // stride  or  j mod stride >= stride - columns

The paper gives the two halves of a pattern to layers in turn, to heads in parallel, or to one merged head that sees
both; here it is the last: one softmax over the union, in every head. Places i and j count the real tokens of a
document. Cost grows as n (stride + n / stride): as n^1.5 where the stride is sqrt(n).
"""

import torch
import torch.nn.functional as F

from .attention_kernels import Kernel, by_documents, fused
from .partial_attention import Partial, partial_attention, together

TILE = 128  # queries of `fixed_attention` that are compared at once, in whole blocks


def sees_strided(query_place: torch.Tensor, key_place: torch.Tensor, stride: int) -> torch.Tensor:
    """The definition, of places in one document."""
    distance = query_place - key_place
    return (distance >= 0) & ((distance < stride) | (distance % stride == 0))


def sees_fixed(query_place: torch.Tensor, key_place: torch.Tensor, stride: int, columns: int) -> torch.Tensor:
    """The definition, of places in one document."""
    own = key_place // stride == query_place // stride
    return (key_place <= query_place) & (own | (key_place % stride >= stride - columns))


def strided_attention(query, key, value, stride: int, *, documents=None, scale=None, dropout: float = 0.0):
    """Shapes [batch, length, heads, dim], of keys and values a divisor of the heads; documents [batch, length] as in
    `documents.py`."""
    options = {"stride": stride, "scale": query.shape[-1] ** -0.5 if scale is None else scale, "dropout": dropout}
    return by_documents(strided_rows, query, key, value, documents, **options)


def fixed_attention(
    query,
    key,
    value,
    stride: int,
    columns: int,
    *,
    documents=None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = fused,
):
    """The same."""
    options = {"stride": stride, "columns": columns, "scale": scale, "dropout": dropout, "kernel": kernel}
    return by_documents(fixed_rows, query, key, value, documents, **options)


def strided_rows(query, key, value, stride: int, scale: float, dropout: float) -> torch.Tensor:
    """A text as a grid, `stride` tokens to a line: a token sees its line up to itself, the rest of the line before, and
    its column above."""
    length = query.shape[1]
    grids = [
        F.pad(x, (0, 0, 0, 0, 0, -length % stride)).unflatten(1, (-1, stride)).permute(0, 3, 1, 2, 4)
        for x in (query, key, value)
    ]  # [batch, heads, lines, stride, dim]
    query, key, value = grids
    first = F.scaled_dot_product_attention(
        *(x[:, :, 0] for x in grids), dropout_p=dropout, is_causal=True, scale=scale
    )[:, :, None]
    if query.shape[2] > 1:
        parts = [near_lines(query, key, value, scale, dropout), columns_above(query, key, value, scale, dropout)]
        first = torch.cat((first, together(parts)), dim=2)
    return first.flatten(2, 3).transpose(1, 2)[:, :length]


def near_lines(query, key, value, scale: float, dropout: float) -> Partial:
    """Each line but the first with itself and the one before: the last `stride` tokens."""
    batch, heads, lines, stride, _ = query.shape
    near = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3).flatten(0, 2) for x in (key, value))
    column = torch.arange(2 * stride, device=query.device)
    distance = stride + column[:stride, None] - column
    hidden = (distance < 0) | (distance >= stride)
    found = partial_attention(query[:, :, 1:].flatten(0, 2), *near, hidden, scale, dropout)
    return found.each(lambda x: x.unflatten(0, (batch, heads, lines - 1)))


def columns_above(query, key, value, scale: float, dropout: float) -> Partial:
    """Each column with itself, of lines that are earlier: the answers of all lines but the first."""
    batch, heads, lines, stride, _ = query.shape
    columns = [x.transpose(2, 3).flatten(0, 2) for x in (query[:, :, 1:], key[:, :, :-1], value[:, :, :-1])]
    hidden = torch.ones(lines - 1, lines - 1, dtype=torch.bool, device=query.device).triu(1)
    found = partial_attention(*columns, hidden, scale, dropout)
    return found.each(lambda x: x.unflatten(0, (batch, heads, stride)).transpose(2, 3))


def fixed_rows(query, key, value, stride: int, columns: int, kernel: Kernel, **options) -> torch.Tensor:
    """Blocks in tiles: all queries of a tile see the last columns of all blocks before it, and beside those what the
    pattern says of the tile."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    length, size = query.shape[2], stride * max(1, TILE // stride)
    told = [last_columns(x, stride, columns) for x in (key, value)]
    place = torch.arange(min(size, length), device=query.device)
    seen = sees_fixed(place[:, None], place, stride, columns)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    outputs = []
    for start in range(0, length, size):
        asked, before = query[:, :, start : start + size], start // stride * columns
        count = asked.shape[2]
        keys, values = (
            torch.cat((summary[:, :, :before], x[:, :, start : start + size]), dim=2)
            for summary, x in zip(told, (key, value), strict=True)
        )
        shown = F.pad(mask[:count, :count], (before, 0))
        outputs.append(kernel(asked, keys, values, shown, **options)[0])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def last_columns(x: torch.Tensor, stride: int, columns: int) -> torch.Tensor:
    """[batch, heads, length, dim] -> the last columns of each whole block, [batch, heads, blocks * columns, dim]."""
    whole = x.shape[2] // stride * stride
    return x[:, :, :whole].unflatten(2, (-1, stride))[:, :, :, stride - columns :].flatten(2, 3)
