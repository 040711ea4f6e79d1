"""Which blocks a block sees: a window, some that all see, and some at random (BigBird, arXiv:2007.14062, section 2).

Those at random are the ones with the highest priority among those that are left, and the priority of block j for block
i is a hash of (seed, layer, i, j): nothing else decides, neither how long other texts are nor where padding is, nor
whether the model is trained.
"""

from typing import NamedTuple

import torch

from .block_sparse_attention import NO_BLOCK, BlockPattern, Blocks, make_pattern

HASHED_AT_ONCE = 2**16  # priorities: few, since there is one for every pair of blocks
NOWHERE = -(2**30)  # in the place of the place of a block
WORD_BITS = 2**32 - 1


class BlockChoice(NamedTuple):
    """How many blocks a block sees of each kind."""

    window: int  # around itself, with itself; if causal, up to itself
    first: int  # at the start of its text
    last: int  # at the end of its text
    random: int
    causal: bool
    seed: int

    @property
    def reach(self) -> tuple[int, int]:
        """How far the window goes before the block, and after it."""
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

    def seen(self, place: torch.Tensor, count: torch.Tensor, longest: int, layer: int) -> torch.Tensor:
        """[rows, kinds] the places of the blocks that those at `place` [rows] see in texts of `count` [rows] blocks, at
        most `longest`, NOWHERE where there are fewer."""
        (before, after), device = self.reach, place.device
        place, count = place[:, None], count[:, None]
        first = torch.arange(self.first, device=device).expand(place.shape[0], -1)
        last = count - 1 - torch.arange(self.last, device=device)
        near = place + torch.arange(-before, after + 1, device=device)
        top = place + 1 if self.causal else count - self.last
        chosen = self.at_random(place, torch.minimum(top, place - before) if self.causal else top, longest, layer)
        kinds = (
            first.masked_fill(first >= (top if self.causal else count), NOWHERE),
            last.masked_fill(last < self.first, NOWHERE),
            near.masked_fill((near < self.first) | (near >= top), NOWHERE),
            chosen,
        )
        return torch.cat(kinds, dim=1)

    def at_random(self, place: torch.Tensor, top: torch.Tensor, longest: int, layer: int) -> torch.Tensor:
        """[rows, random] of the blocks from `first` up to `top` [rows, 1] outside the window."""
        before, after = self.reach
        column = torch.arange(longest, device=place.device)
        count, rows = min(self.random, longest), max(1, HASHED_AT_ONCE // max(1, longest))
        found = []
        for near, end in zip(place.split(rows), top.split(rows), strict=True):
            left = (column >= self.first) & (column < end) & ((column < near - before) | (column > near + after))
            priority = murmur(murmur(murmur(column.new_full((1,), self.seed) + layer * 0x9E3779B1) + near) + column)
            priority = torch.where(left, (priority << 24) | column, NOWHERE)  # no two are equal
            best = priority.topk(count, dim=1).values
            found.append(torch.where(best == NOWHERE, NOWHERE, best & (2**24 - 1)))
        return torch.cat(found)

    def pattern(self, blocks: Blocks, layer: int, asked: torch.Tensor | None = None) -> BlockPattern:
        """What the blocks of texts, or those `asked` [rows] for, see in a layer. Of an encoder, the blocks that all see
        see all."""
        if self.causal:
            rows = torch.arange(len(blocks.place), device=blocks.place.device) if asked is None else asked
            groups = ()
        else:
            ends, rows = blocks.ends(self.first, self.last)
            groups = ((ends, blocks.of_text(ends[:, 0]) if ends.numel() else ends),)
        groups = ((rows[:, None], self.keys(blocks, rows, layer)), *groups)
        return make_pattern(blocks, groups, self.causal)

    def keys(self, blocks: Blocks, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """[rows, count] the indices of the blocks that the blocks `rows` see, in order, those that are none at last."""
        seen = self.seen(blocks.place[rows], blocks.count[rows], blocks.longest, layer)
        ahead = torch.arange(-blocks.ahead, 0, device=rows.device).expand(rows.shape[0], -1)
        seen = torch.cat((ahead, seen), dim=1)
        keys = torch.where(seen == NOWHERE, NO_BLOCK, blocks.first[rows, None] + seen)
        return keys.sort(dim=1, descending=True).values[:, : max(1, blocks.ahead + blocks.longest)]


def murmur(x: torch.Tensor) -> torch.Tensor:
    """A number below 2^32 for each whole number, as good as random: the last steps of MurmurHash3."""
    x = x & WORD_BITS
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD_BITS
    return x ^ (x >> 16)
