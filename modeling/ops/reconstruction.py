"""Attention by content to the tokens that leave a memory at the end of a segment (Rae et al., 2019, arXiv:1911.05507,
algorithm 2): how much of it each of them gets, and how much of what it answers is left once they are compressed.

    attention(q, x) = softmax(q (x K)^T / sqrt(dim)) x V

Everything is of `SegmentRows`: queries [rows, length, heads, dim] of whole segments, keys and values [rows, memory +
length, heads, dim], so that those that leave in the s-th segment lie where its queries do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .segment_attention import ROOM, in_segments, wide_softmax
from .segment_rows import Projected, SegmentRows


def pieces_of_rows(rows: SegmentRows, segments: int, heads: int, call: Callable[[slice], torch.Tensor]) -> list:
    """call(part) of a few segments at once."""
    count = max(1, ROOM // max(1, len(rows.first) * heads * rows.window.segment**2))
    return [call(slice(start, start + count)) for start in range(0, segments, count)]


def leaving(rows: SegmentRows, length: int) -> torch.Tensor:
    """[rows or 1, segments, segment] whether a place before a segment holds a token that leaves at its end."""
    place = torch.arange(length, device=rows.read.device)
    return (place >= rows.first[:, None]).unflatten(1, (-1, rows.window.segment))


def asking(rows: SegmentRows, length: int) -> torch.Tensor:
    """[rows or 1, segments, segment] whether a place holds a token that was not read before."""
    place = torch.arange(length, device=rows.read.device)
    real = (place >= rows.late[:, None]) & (place < rows.lengths[:, None])
    return real.unflatten(1, (-1, rows.window.segment))


@torch.no_grad()
def usage_of_rows(query: torch.Tensor, key: torch.Tensor, rows: SegmentRows) -> torch.Tensor:
    """[rows, segments, segment] the attention that each token gets that leaves at the end of a segment, from the
    tokens of the segment, in the mean over the heads."""
    length, segment = query.shape[1], rows.window.segment
    query, key = in_segments(query, segment), in_segments(key[:, :length], segment)
    hidden, asked = ~leaving(rows, length), asking(rows, length).to(query.dtype)

    def used(part: slice) -> torch.Tensor:
        weights = content_weights(query[:, :, part], key[:, :, part], hidden[:, part, None])
        return (weights.mean(0) * asked[:, part, :, None]).sum(-2)

    return torch.cat(pieces_of_rows(rows, length // segment, len(query), used), dim=1)


def last_segments(usage: torch.Tensor, rows: SegmentRows) -> torch.Tensor:
    """[rows, segment] of the segment that the next token of each row is of; zero where it begins one."""
    segment = (rows.lengths // rows.window.segment)[:, None, None].expand(len(usage), 1, usage.shape[-1])
    return F.pad(usage, (0, 0, 0, 1)).gather(1, segment)[:, 0]


@torch.no_grad()
def usage_of_step(query: torch.Tensor, keys: torch.Tensor, place: torch.Tensor, segment: int) -> torch.Tensor:
    """[batch, segment] the same of one token at a `place` [batch]; keys [batch, memory + segment, heads, dim], of which
    the last is the token's own."""
    slot = segment - 1 - (place % segment)[:, None] + torch.arange(segment, device=place.device)
    there = slot >= keys.shape[1] - 1 - place[:, None]
    leaving = keys.gather(1, slot[..., None, None].expand(-1, -1, *keys.shape[2:]))
    return content_weights(query.transpose(1, 2), leaving.transpose(1, 2), ~there[:, None, None]).mean(1)[:, 0]


def content_weights(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return wide_softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min))


def reconstruction_error(
    query: torch.Tensor, tokens: Projected, slots: Projected, rows: SegmentRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean square of what is lost, attention(query, tokens that leave) - attention(query, their slots), added up
    over the tokens of this call some of whose memory leaves; and how many these are.

    slots: keys and values [rows, slots, heads, dim] that were made of the tokens. A segment that an earlier call has
    begun is left out: what leaves there may have left already.
    """
    length, segment = query.shape[1], rows.window.segment
    start = rows.window.memory // segment if rows.aligned is None else 0  # before, nothing leaves
    shown = leaving(rows, length)[:, start:]
    asked = asking(rows, length)[:, start:] & shown.any(-1, keepdim=True)
    begun = (torch.arange(start, length // segment, device=query.device) == 0) & (rows.late > 0)[:, None]
    asked = asked & ~begun[..., None]
    if not shown.shape[1]:
        return 0.0 * slots[0].sum(), asked.sum()
    rate = length // slots[0].shape[1]
    query = blocks(query.detach(), segment)[:, start:]
    kept = [blocks(x, segment // rate)[:, start:] for x in slots]
    with torch.no_grad():
        expected = attention(query, *(blocks(x[:, :length], segment)[:, start:] for x in tokens), shown)
    lost = attention(query, *kept, shown.unflatten(-1, (-1, rate))[..., -1]) - expected
    square = lost.square().mean((2, 4)) * asked
    return square.sum(), asked.expand_as(square).sum()


def blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, length, heads, dim] -> [rows, segments, heads, size, dim]."""
    return x.unflatten(1, (-1, size)).transpose(2, 3)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Where nothing is shown, of everything."""
    shown = (shown | ~shown.any(-1, keepdim=True)).expand(*query.shape[:2], -1).flatten(0, 1)[:, None, None]
    flat = (x.flatten(0, 1) for x in (query, key, value))
    mask = shown.expand(-1, -1, query.shape[-2], -1)
    return F.scaled_dot_product_attention(*flat, attn_mask=mask).unflatten(0, query.shape[:2])
