"""What attention to chosen blocks of keys is made of: queries choose, and those that chose the same block are compared
with it at once."""

import torch
import torch.nn.functional as F

from .arrangement import HIDDEN, weigh_scores

Choice = tuple[torch.Tensor, torch.Tensor]  # blocks [rows, heads, queries, count or all], whether there are as many
Part = tuple[torch.Tensor, torch.Tensor]  # an answer over some keys, and the normalizer by which parts are joined


def best_blocks(bound: torch.Tensor, count: int) -> Choice:
    """Those with the greatest `bound` [rows, heads, queries, blocks], which is -inf where a block is none to choose."""
    best = bound.topk(min(count, bound.shape[-1]), dim=-1)
    return best.indices, best.values > -torch.inf


def lines_of(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads] the number of each row and head."""
    return torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])


def rows_at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [rows, size, ...] -> [*index.shape, size, ...]. As flat rows: their gradient, which may lie in any order, is
    then laid out once and added up a row at a time."""
    return x.flatten(1).index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def attend_shown(query, key, value, seen: torch.Tensor, dropout: float) -> Part:
    """[..., queries, dim] to keys [..., keys, dim] of which some are `seen`."""
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill_(~seen, HIDDEN)
    weights, normalizer = weigh_scores(scores, joined=True)
    return F.dropout(weights, dropout).to(value.dtype) @ value, normalizer


def sorted_pairs(chosen: torch.Tensor, blocks: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of a query and a block that it chose, `chosen` [lines, pairs], sorted by block, in chunks of `size`
    that share one: (the slot of each pair [lines, pairs], the pair in each slot or -1 [lines, slots], the block of each
    chunk [lines, chunks]). Pairs with the block that there is not, number `blocks`, are told a slot of no pair."""
    lines, pairs = chosen.shape
    number, order = chosen.sort(dim=-1, stable=True)
    counted = chosen.new_zeros(lines, blocks + 1).scatter_add_(1, chosen, torch.ones_like(chosen))[:, :blocks]
    ends = (-(-counted // size)).cumsum(1)  # chunks up to and with each block
    start = F.pad(ends, (1, 0)) * size - F.pad(counted.cumsum(1), (1, 0))  # of a block's slots, over that of its pairs
    slots = (-(-pairs // size) + blocks) * size  # of the last chunk at least one is of no pair
    in_order = torch.arange(pairs, device=chosen.device) + start.gather(1, number)
    in_order = torch.where(number < blocks, in_order, slots)
    pair = chosen.new_full((lines, slots + 1), -1).scatter_(1, in_order, order)[:, :slots]
    slot = torch.empty_like(chosen).scatter_(1, order, in_order.clamp(max=slots - 1))
    chunk = torch.arange(slots // size, device=chosen.device).expand(lines, -1).contiguous()
    return slot, pair, torch.searchsorted(ends, chunk, right=True).clamp(max=blocks - 1)
