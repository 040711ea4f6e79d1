"""What is left of tokens that fell out of memory: a few slots for many of them (Rae et al., 2019, arXiv:1911.05507).

Every `rate` tokens of a document, counted from its beginning, become a slot; `unit` tokens are compressed at once. A
segment sees the last `reach` slots of what has left the memory where it begins. Slots are numbered so that number g is
of the tokens from g * rate - memory on: those below memory / rate are of none.
"""

from typing import NamedTuple

import torch

from .segment_rows import Memory, Projected, SegmentRows, Window


class Rate(NamedTuple):
    """How a memory of tokens is compressed; all lengths but `reach` are multiples of `rate`."""

    tokens: Window
    reach: int  # slots that a segment sees
    rate: int  # tokens that become one slot
    unit: int  # tokens that are compressed at once: a divisor of a segment

    @property
    def slots(self) -> Window:
        """The window of a segment on slots: as it is on tokens, without a segment of its own."""
        return Window(self.tokens.segment // self.rate, self.reach)

    @property
    def missing(self) -> int:
        """Slots that are numbered, and are none."""
        return self.tokens.memory // self.rate

    def made(self, read: torch.Tensor) -> torch.Tensor:
        """How many slots are numbered after so many tokens."""
        return read // self.unit * (self.unit // self.rate)


class Slots(NamedTuple):
    """Slots of rows, in order, with `rate.reach` places before those of a row's first segment."""

    pair: Projected  # keys and values [rows, slots, heads, dim]
    begin: torch.Tensor  # [rows or 1] the number of the first
    rate: Rate

    def memory(self, fresh: bool) -> Memory:
        """The same as segments see it, side by side."""
        first, bound = self.rate.missing - self.begin, self.rate.missing + self.rate.reach
        return Memory(self.pair, self.rate.slots, first, bound, fresh)

    def seen_from(self, place: torch.Tensor, known: torch.Tensor, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, queries, slots] whether a token at a `place` [batch, queries] of the document sees a slot of its row,
        and how far away it is. `known` [batch, queries]: whether it is of this document."""
        step, reach = self.rate.slots[:2]
        end = place.div(window.segment, rounding_mode="floor")[..., None] * step
        slot = (self.begin[:, None] + torch.arange(self.pair[0].shape[1], device=place.device))[:, None]
        seen = (slot >= self.rate.missing) & (slot < end) & (slot >= end - reach) & known[..., None]
        return seen, (place % window.segment)[..., None] + window.memory + end - slot


def slots_of_state(held: Projected, read: torch.Tensor, rate: Rate) -> Slots:
    """Those that a state holds after `read` [batch] tokens, the last ones that were made, right-aligned."""
    return Slots(held, rate.made(read) - held[0].shape[1], rate)


def slots_of_rows(made: Projected, rows: SegmentRows, held: Projected | None, rate: Rate) -> Slots:
    """Those that were `made` [rows, slots, heads, dim] of the memory and the tokens of rows, and those before that a
    state holds."""
    of_slots = rows._replace(window=rate.slots, read=rate.made(rows.read))
    before = (None, None) if held is None else held
    pair = tuple(of_slots.after_memory(x, kept) for x, kept in zip(made, before, strict=True))
    return Slots(pair, rows.read // rows.window.segment * rate.slots.segment - rate.reach, rate)


def keep_slots(slots: Slots, rows: SegmentRows, held: Projected | None) -> Projected:
    """What a state holds of slots after the tokens of the rows: [batch, rate.slots.held, heads, dim]."""
    rate, pair = slots.rate, tuple(x.detach() for x in slots.pair)
    size = rate.slots.held
    ends = rate.reach + rate.made(rows.lengths)
    index = ends[:, None] - torch.arange(size, 0, -1, device=ends.device)
    there = (index >= 0)[..., None, None]
    index = index.clamp(min=0)[..., None, None].expand(len(pair[0]), -1, *pair[0].shape[2:])
    kept = (x.gather(1, index) * there for x in pair)
    return tuple(rows.keep(x, before) for x, before in zip(kept, held or (None, None), strict=True))


def keep_slots_of_step(new: Projected, held: Projected, ends: torch.Tensor) -> Projected:
    """The same after one token: what is `new` [batch, slots of a unit, heads, dim] counts where it `ends` [batch] a
    unit."""
    done = ends[:, None, None, None]
    kept = (torch.cat((x.to(made.dtype), made), dim=1)[:, made.shape[1] :] for x, made in zip(held, new, strict=True))
    return tuple(torch.where(done, after, x.to(after.dtype)) for after, x in zip(kept, held, strict=True))
