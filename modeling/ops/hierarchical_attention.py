"""Attention to a document in segments: first to segments, then to the tokens of those that were chosen.

    weight of token j for query i  =  e^(q_i k_j) e^(r_i g_s(j))  /  the same summed over all tokens that i sees

q_i, k_j compare tokens, r_i, g_s compare segments, and s(j) is the segment of j. That is the weight of a token times
that of its segment, normed again (Nallapati et al., 2016, arXiv:1602.06023, section 2.4); of the softmax over segments
only the numerator is left, since its denominator is the same for all tokens. A query sees the tokens of the `count`
segments that it weighs most, as Manakul and Gales (2021, arXiv:2109.03888) let it see the tokens of a few sentences.
What it weighs them by is part of the answer, and so the choice is learnt.

Each head chooses for itself. It reads as much as if all had one choice, since a head has keys of its own; heads
together see more of the document; and heads can be dealt out to processes, none of which knows what others chose.

Shapes: query, asking (q and r) [rows, heads, queries, dim].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .arrangement import join_rounds
from .chosen_blocks import attend_shown, best_blocks, lines_of, rows_at, sorted_pairs

ASKING_AT_ONCE = 4096
FEWEST_ASKING, MOST_ASKING = 16, 256  # queries that are compared with a segment at once


class Source(NamedTuple):
    """Documents in segments, and who asks which."""

    key: torch.Tensor  # [documents, key heads, segments, longest, dim] of tokens, by segment and place in it
    value: torch.Tensor
    leading: torch.Tensor  # [documents, key heads, segments, dim] keys of segments
    sizes: torch.Tensor  # [documents, segments] the tokens of each, 0 where there is none
    row: torch.Tensor  # [rows] the document that each row of queries asks


def weigh_segments(asking: torch.Tensor, source: Source, scale: float) -> torch.Tensor:
    """[rows, heads, queries, segments] r g, and -inf where there is no segment."""
    leading, real = (of_rows(x, source.row) for x in (source.leading, source.sizes > 0))
    groups = asking.shape[1] // leading.shape[1]
    asking = (asking * scale).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (asking @ leading.to(asking.dtype).transpose(-1, -2)).unflatten(2, (groups, -1)).flatten(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~real[:, None, None], -torch.inf)


def of_rows(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """x [documents, ...] -> [rows, ...]; as many rows as documents may ask in another order, too."""
    return x.index_select(0, row)


def dense_weights_by_segment(
    query: torch.Tensor, asking: torch.Tensor, source: Source, count: int, *, scale: float, choose=best_blocks
) -> torch.Tensor:
    """The definition: the weights of all tokens [rows, heads, queries, segments, longest]."""
    of_segments = weigh_segments(asking, source, scale)
    chosen, there = choose(of_segments, count)
    seen = torch.zeros_like(of_segments, dtype=torch.bool).scatter(-1, chosen, there)[..., None]
    seen = seen & within_segments(of_rows(source.sizes, source.row), source.key.shape[3])[:, None, None]
    key = of_rows(source.key, source.row).repeat_interleave(query.shape[1] // source.key.shape[1], dim=1)
    scores = torch.einsum("bhid,bhstd->bhist", query * scale, key.to(query.dtype)) + of_segments[..., None]
    return scores.masked_fill(~seen, -torch.inf).flatten(-2).softmax(-1).view(scores.shape)


def dense_hierarchical_attention(query, asking, source: Source, count: int, *, scale: float, choose=best_blocks):
    """The definition: what the queries answer, [rows, heads, queries, dim]."""
    weights = dense_weights_by_segment(query, asking, source, count, scale=scale, choose=choose)
    value = of_rows(source.value, source.row).repeat_interleave(query.shape[1] // source.value.shape[1], dim=1)
    return torch.einsum("bhist,bhstd->bhid", weights, value.to(weights.dtype)).to(query.dtype)


def within_segments(sizes: torch.Tensor, longest: int) -> torch.Tensor:
    """sizes [...] -> [..., longest] whether a place of a segment holds a token."""
    return torch.arange(longest, device=sizes.device) < sizes[..., None]


def hierarchical_attention(
    query: torch.Tensor,
    asking: torch.Tensor,
    source: Source,
    count: int,
    *,
    scale: float,
    dropout: float = 0.0,
    choose=best_blocks,
) -> torch.Tensor:
    """The same, by comparing queries with no token that they do not see: [rows, heads, queries, dim].

    Where queries choose fewer segments than there are, each takes the keys of its own: a step costs a product with the
    keys of all segments, and what it takes to attend to `count` of them. More queries are sorted by segment, and those
    that chose the same compared with it at once.
    """
    if not query.numel():
        return query
    outputs = []
    for some, theirs in zip(query.split(ASKING_AT_ONCE, dim=2), asking.split(ASKING_AT_ONCE, dim=2), strict=True):
        of_segments = weigh_segments(theirs, source, scale)
        chosen, there = choose(of_segments.detach(), count)
        attend = attend_each if chosen[0, 0].numel() <= of_segments.shape[-1] else attend_sorted
        weighed = of_segments.gather(-1, chosen).masked_fill(~there, -torch.inf)
        outputs.append(attend(some * scale, source, chosen, weighed, dropout).to(query.dtype))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def heads_of_rows(query: torch.Tensor, source: Source) -> torch.Tensor:
    """[rows, heads] which of the documents' heads of keys each head of a row asks."""
    groups = query.shape[1] // source.key.shape[1]
    return of_rows(lines_of(source.key), source.row).repeat_interleave(groups, dim=1)


def attend_each(query, source: Source, chosen: torch.Tensor, weighed: torch.Tensor, dropout: float) -> torch.Tensor:
    """What each query answers who takes the segments that it chose [rows, heads, queries, count], and weighed; -inf
    where there are not as many."""
    segments, longest = source.key.shape[2:4]
    block = heads_of_rows(query, source)[..., None, None] * segments + chosen
    key, value = (
        rows_at(x.flatten(0, 2), block).to(query.dtype).flatten(3, 4).flatten(0, 1) for x in (source.key, source.value)
    )
    sizes = source.sizes.take(source.row[:, None, None, None] * segments + chosen)
    mask = weighed[..., None].masked_fill(~within_segments(sizes, longest), -torch.inf)
    mask = mask.to(query.dtype).flatten(-2).flatten(0, 1)[:, :, None]
    output = F.scaled_dot_product_attention(query.flatten(0, 1)[:, :, None], key, value, mask, dropout, scale=1.0)
    return output.squeeze(2).unflatten(0, query.shape[:2])


def attend_sorted(query, source: Source, chosen: torch.Tensor, weighed: torch.Tensor, dropout: float) -> torch.Tensor:
    """The same, by comparing with each segment those who chose it, a few at a time: a part of their softmax, whose
    normalizer the segment's score is added to."""
    heads, queries, count = chosen.shape[1:]
    segments, longest = source.key.shape[2:4]
    size = 2 ** (queries * count // segments // 2).bit_length()
    size = min(max(FEWEST_ASKING, size), MOST_ASKING)
    numbers = torch.where(weighed > -torch.inf, chosen, segments).flatten(2).flatten(0, 1)
    slot, pair, block = sorted_pairs(numbers, segments, size)
    lines = lines_of(query).flatten()[:, None]
    of_key = heads_of_rows(query, source).flatten()[:, None] * segments + block
    key, value = (rows_at(x.flatten(0, 2), of_key).to(query.dtype) for x in (source.key, source.value))
    asked = rows_at(query.flatten(0, 2), lines * queries + pair.clamp(min=0) // count).unflatten(1, (-1, size))
    of_size = source.row.repeat_interleave(heads)[:, None] * segments + block
    seen = within_segments(source.sizes.take(of_size), longest)[:, :, None]
    found = attend_shown(asked, key, value, seen, dropout)
    place = lines * pair.shape[1] + slot
    output, normalizer = (rows_at(x.flatten(0, 2), place).view(-1, heads, queries, count, x.shape[-1]) for x in found)
    return join_rounds(output, normalizer + weighed[..., None])
