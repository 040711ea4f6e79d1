"""Attention to the last tokens, to the first, and to those earlier blocks that suit a query best, by a bound on the
scores of their keys (Quest: Tang et al., 2024, arXiv:2406.10774).

A text is cut into blocks. Of each, the largest and the least number of its keys in every channel are kept: what a query
can score there at most is

    bound(q, block) = sum over channels of max(q_c largest_c, q_c least_c)  >=  q k for all keys k of the block

A token sees the last `window` tokens, itself included, the first `sinks`, and the `count` blocks with the greatest
bounds among those that begin before the window. The future changes nothing, and a step reads as many keys however long
the text; of all blocks it reads the bounds alone.

Shapes: query [rows, heads, queries, dim]; key, value [rows, heads or a divisor of them, keys, dim], each at the place
where it stands in its text; place [rows or 1, queries] of the queries, each the one before it or the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .arrangement import join_rounds
from .chosen_blocks import Choice, Part, attend_shown, best_blocks, lines_of, rows_at, sorted_pairs

QUERIES_OF_CHUNK = 256  # that are compared with the keys around them, side by side
QUERIES_OF_SPAN = 4096  # queries that are handled at once
FEWEST_QUERIES, MOST_QUERIES = 32, 256  # queries that are compared with a block at once


class Retrieval(NamedTuple):
    """What a token sees."""

    window: int  # at least a block, so that a block that begins before it has ended
    sinks: int
    block: int  # keys of a block
    count: int  # blocks that a query chooses


class Text(NamedTuple):
    """Keys and values by place, whole blocks of them, and the bounds of blocks: those that are over, and of others
    anything."""

    key: torch.Tensor  # [rows, key heads, room, dim]
    value: torch.Tensor
    bounds: torch.Tensor  # [rows, key heads, room / block, 2 * dim] the largest and the least in each channel


def text_of(key: torch.Tensor, value: torch.Tensor, block: int) -> Text:
    """The text of keys and values."""
    missing = -key.shape[2] % block
    key, value = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (key, value))
    return Text(key, value, bounds_of(key.unflatten(2, (-1, block))))


def bounds_of(blocks: torch.Tensor) -> torch.Tensor:
    """[..., block, dim] -> [..., 2 * dim]."""
    blocks = blocks.detach()
    return torch.cat((blocks.amax(-2), blocks.amin(-2)), dim=-1)


def choose_blocks(query, bounds, place, rule: Retrieval, choose: Callable[..., Choice] = best_blocks) -> Choice:
    """By `choose(bound, count)`."""
    query, groups = query.detach(), query.shape[1] // bounds.shape[1]
    asked = torch.cat((query.clamp(min=0), query.clamp(max=0)), dim=-1).unflatten(1, (-1, groups))
    bound = asked.flatten(2, 3) @ bounds.to(query.dtype).transpose(-1, -2)
    bound = bound.unflatten(2, asked.shape[2:4]).flatten(1, 2)
    begin = torch.arange(bounds.shape[2], device=query.device) * rule.block
    open_ = begin <= (place[..., None] - rule.window)[:, None]
    return choose(bound.masked_fill(~open_, -torch.inf), rule.count)


def visible_by_retrieval(
    query: torch.Tensor, key: torch.Tensor, place: torch.Tensor, rule: Retrieval, choose=best_blocks
) -> torch.Tensor:
    """The definition: [rows, heads, queries, keys] whether a query sees a key."""
    keys = key.shape[2]
    chosen, there = choose_blocks(query, text_of(key, key, rule.block).bounds, place, rule, choose)
    shown = query.new_zeros(*query.shape[:3], -(-keys // rule.block), dtype=torch.bool)
    shown = shown.scatter(-1, chosen, there).repeat_interleave(rule.block, dim=-1)[..., :keys]
    column = torch.arange(keys, device=query.device)
    distance = (place[..., None] - column)[:, None]
    return (distance >= 0) & (shown | (distance < rule.window) | (column < rule.sinks))


def dense_weights_by_retrieval(query, key, place, rule: Retrieval, *, scale: float, choose=best_blocks) -> torch.Tensor:
    """The weights of all pairs [rows, heads, queries, keys], by the definition."""
    seen = visible_by_retrieval(query, key, place, rule, choose)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def step_of_retrieval(
    query: torch.Tensor,
    text: Text,
    place: torch.Tensor,
    rule: Retrieval,
    *,
    scale: float,
    dropout: float = 0.0,
    choose=best_blocks,
) -> torch.Tensor:
    """The same of a single query of each row, which takes the keys that it sees and reads no other."""
    (rows, heads), groups = query.shape[:2], query.shape[1] // text.key.shape[1]
    chosen, there = (x[:, :, 0] for x in choose_blocks(query, text.bounds, place, rule, choose))
    last = place.expand(rows, -1)
    near = torch.arange(rule.window - 1, -1, -1, device=place.device)
    first = torch.arange(rule.sinks, device=place.device).expand(rows, -1)
    among = (chosen[..., None] * rule.block + torch.arange(rule.block, device=place.device)).flatten(2)
    before = (last - rule.window)[:, None]  # what is later is near
    seen = there.repeat_interleave(rule.block, dim=-1) & (among <= before) & (among >= rule.sinks)
    near_and_first = torch.cat((last - near, first), dim=1)
    shown = torch.cat((last >= near, first <= last - rule.window), dim=1)
    columns = torch.cat((near_and_first.clamp(min=0)[:, None].expand(-1, heads, -1), among), dim=-1)
    columns = columns.clamp(max=text.key.shape[2] - 1)
    mask = torch.cat((shown[:, None].expand(-1, heads, -1), seen), dim=-1)[:, :, None]
    columns = columns + lines_of(text.key).repeat_interleave(groups, dim=1)[..., None] * text.key.shape[2]
    key, value = (rows_at(x.flatten(0, 2), columns).to(query.dtype) for x in text[:2])
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)


def retrieved_attention(
    query: torch.Tensor,
    text: Text,
    place: torch.Tensor,
    rule: Retrieval,
    *,
    scale: float,
    dropout: float = 0.0,
    choose=best_blocks,
) -> torch.Tensor:
    """The same of many queries. Blocks are compared with the queries that chose them, which are sorted by block; memory
    does not grow with the square of the text."""
    if not query.numel():
        return query
    place, outputs = place.expand(query.shape[0], -1), []
    for part, at in zip(query.split(QUERIES_OF_SPAN, dim=2), place.split(QUERIES_OF_SPAN, dim=1), strict=True):
        parts = [attend_near(part * scale, text, at, rule, dropout)]
        chosen, there = choose_blocks(part, text.bounds, at, rule, choose)
        if there.numel():
            parts.append(attend_chosen(part * scale, text, at, chosen, there, rule, dropout))
        outputs.append(join_rounds(*(torch.cat(x, dim=3) for x in zip(*parts, strict=True))))
    return torch.cat(outputs, dim=2)


def attend_near(query, text: Text, place: torch.Tensor, rule: Retrieval, dropout: float) -> Part:
    """To the window and the first tokens: one part."""
    queries, size = query.shape[2], min(QUERIES_OF_CHUNK, query.shape[2])
    missing = -queries % size
    query = F.pad(query, (0, 0, 0, missing)).unflatten(2, (-1, size))
    place = F.pad(place[:, None], (0, missing), mode="replicate")[:, 0].unflatten(1, (-1, size))
    around = torch.arange(1 - rule.window, size, device=place.device)
    column = place[..., :1] + around  # of the keys of each chunk
    first = torch.arange(rule.sinks, device=place.device).expand(*column.shape[:2], -1)
    distance = place[..., None] - column[:, :, None]
    seen = (distance >= 0) & (distance < rule.window) & (column >= 0)[:, :, None]
    seen = torch.cat((seen, first[:, :, None] <= place[..., None] - rule.window), dim=-1)
    column = torch.cat((column, first), dim=-1).clamp(0, text.key.shape[2] - 1)
    groups, lines = query.shape[1] // text.key.shape[1], lines_of(text.key)[:, :, None, None]
    key, value = (
        rows_at(x.flatten(0, 2), lines * x.shape[2] + column[:, None]).to(query.dtype).repeat_interleave(groups, dim=1)
        for x in text[:2]
    )
    found = attend_shown(query, key, value, seen[:, None], dropout)
    return tuple(x.flatten(2, 3)[:, :, :queries, None] for x in found)


def attend_chosen(
    query, text: Text, place: torch.Tensor, chosen: torch.Tensor, there: torch.Tensor, rule: Retrieval, dropout: float
) -> Part:
    """To the blocks that each query chose, a part for each; what of them is near or first counts there."""
    heads, queries, count = chosen.shape[1:]
    blocks, lines = text.bounds.shape[2], lines_of(query).flatten()[:, None]
    size = min(max(FEWEST_QUERIES, 2 ** (queries * count // blocks // 8).bit_length()), MOST_QUERIES)
    numbers = torch.where(there, chosen, blocks).flatten(2).flatten(0, 1)
    slot, pair, block = sorted_pairs(numbers, blocks, size)
    asks = pair.clamp(min=0) // count
    of_key = lines_of(text.key).repeat_interleave(heads // text.key.shape[1], dim=1).flatten()[:, None]
    key, value = (
        rows_at(x.flatten(0, 2).unflatten(0, (-1, rule.block)), of_key * blocks + block).to(query.dtype)
        for x in text[:2]
    )
    asked = rows_at(query.flatten(0, 2), lines * queries + asks).unflatten(1, (-1, size))
    column = block[..., None] * rule.block + torch.arange(rule.block, device=slot.device)
    before = (place[lines // heads, asks] - rule.window).masked_fill(pair < 0, -1).unflatten(1, (-1, size))
    seen = (column[:, :, None] <= before[..., None]) & (column >= rule.sinks)[:, :, None]
    found = attend_shown(asked, key, value, seen, dropout)
    place_of = lines * pair.shape[1] + slot
    return tuple(rows_at(x.flatten(0, 2), place_of).view(-1, heads, queries, count, x.shape[-1]) for x in found)
