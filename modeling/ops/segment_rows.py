"""What attention to segments and a memory before them sees, what it has to hold, and texts as rows of whole segments.

Places are counted over the real tokens of a document; documents as in `documents.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .documents import Unpacked, document_runs, find_documents


class Window(NamedTuple):
    """A token sees its segment up to itself, and `memory` tokens before the segment; with `same_length`, `memory`
    tokens before itself, wherever its segment begins."""

    segment: int
    memory: int
    same_length: bool = False

    @property
    def span(self) -> int:
        """The keys that the queries of a segment see, all together."""
        return self.memory + self.segment

    @property
    def held(self) -> int:
        """The tokens that the next one may see: what a state has to hold."""
        return self.memory if self.same_length else self.span - 1

    def first_seen(self, place: torch.Tensor) -> torch.Tensor:
        """The first place that a token sees."""
        start = place if self.same_length else place - place % self.segment
        return (start - self.memory).clamp(min=0)

    def shows(self, query_place: torch.Tensor, key_place: torch.Tensor) -> torch.Tensor:
        """Whether tokens at one place see those at the other, in the same document."""
        return (key_place >= self.first_seen(query_place)) & (key_place <= query_place)


class SegmentState(NamedTuple):
    """The last tokens of the last document, right-aligned, zero where there are fewer; and how many it has had."""

    key: torch.Tensor  # [batch, window.held, heads, dim]
    value: torch.Tensor
    read: torch.Tensor  # [batch]


Projected = tuple[torch.Tensor, torch.Tensor]  # keys and values


class Memory(NamedTuple):
    """What lies before the segments of rows: each sees `window.memory` places of it, and each next one begins, and
    ends, `window.segment` places later."""

    pair: Projected  # [rows, window.memory + window.segment * segments, heads, dim]
    window: Window
    first: torch.Tensor  # [rows or 1] from where on the places are real
    bound: int  # the most that `first` can be, and is where rows are fresh
    fresh: bool  # whether no row goes on with a document: it begins where the segments do

    def unseen(self, segment: int) -> int:
        """How many of the first places before a segment are surely not real."""
        return min(max(self.bound - segment * self.window.segment, 0), self.window.memory) if self.fresh else 0

    def blocks(self, segments: int) -> Projected:
        """[heads, rows, segments, window.memory, dim]"""
        step, reach = self.window.segment, self.window.memory
        ends = reach + step * (segments - 1)
        return tuple(x[:, :ends].permute(2, 0, 1, 3).unfold(2, reach, step).transpose(-1, -2) for x in self.pair)


def places(documents, like, state: SegmentState | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, length] the number of each token's document, 0 for padding, and its place there."""
    real, run = document_runs(documents, like)
    count = real.cumsum(1)
    starts = run.diff(dim=1, prepend=torch.ones_like(run[:, :1])) != 0
    before = torch.where(starts, count - 1, 0).cummax(1).values
    read = 0 if state is None else state.read[:, None] * (run == 1)
    return run * real, count - 1 - before + read


def with_held(number, place, read: torch.Tensor | None, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of what a state holds after `read` tokens, followed by the tokens themselves; -1 for what is none."""
    number = torch.where(number > 0, number, -1)
    if read is None:
        return number, place
    held = read[:, None] - torch.arange(window.held, 0, -1, device=place.device)
    held_number = torch.where(held >= 0, torch.ones_like(held), -1)
    return torch.cat((held_number, number), dim=1), torch.cat((held, place), dim=1)


def joined(state: SegmentState | None, after: Projected) -> Projected:
    """What a state holds, and what comes after."""
    if state is None:
        return after
    return tuple(follow(held, x) for held, x in zip(state[:2], after, strict=True))


def follow(held: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """One after the other, in the type of what comes after."""
    return torch.cat((held.to(after.dtype), after), dim=1)


def remember(
    tensors: tuple[torch.Tensor, ...], window: Window, documents, read: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The state after what `joined` made of a state, which had `read` tokens, and the tokens of `documents`: tensors
    [batch, window.held, ...] and the tokens read."""
    tensors = tuple(x.detach() for x in tensors)
    if read is None:
        read = torch.zeros(len(tensors[0]), dtype=torch.long, device=tensors[0].device)
        tensors = tuple(F.pad(x, (0, 0, 0, 0, window.held, 0)) for x in tensors)
    length = tensors[0].shape[1] - window.held
    if documents is None:
        return tuple(x[:, length:] for x in tensors), read + length
    last = documents.max(dim=1, keepdim=True).values.clamp(min=1)
    member = with_held(documents, documents, read, window)[0] == last
    order = member.to(torch.uint8).argsort(dim=1, stable=True)[:, -window.held :]
    kept = member.gather(1, order)[..., None, None]
    index = order[..., None, None]
    read = torch.where(last[:, 0] == 1, read, 0) + (documents == last).sum(1)
    return tuple(x.gather(1, index.expand(-1, -1, *x.shape[2:])) * kept for x in tensors), read


def next_state(live: Projected, window: Window, documents, state: SegmentState | None) -> SegmentState:
    """The state after what `joined` made of keys and values."""
    held, read = remember(live, window, documents, None if state is None else state.read)
    return SegmentState(*held, read)


class SegmentRows(NamedTuple):
    """Documents as rows of whole segments, the first of which begins a segment."""

    window: Window
    shape: torch.Size  # batch, length
    aligned: Unpacked | None  # None where each row of the batch is a document of its own, from its beginning
    read: torch.Tensor  # [rows] how many of the tokens of a row a state has read
    continued: torch.Tensor  # [rows] whether a row is the one that the state of its batch row is of

    @property
    def late(self) -> torch.Tensor:
        """[rows] how many places of the first segment a state has read."""
        return self.read % self.window.segment

    @property
    def lengths(self) -> torch.Tensor:
        """[rows] where among the places of a row its tokens end."""
        if self.aligned is None:
            return torch.full_like(self.read, self.shape[1])
        return self.aligned.lengths

    @property
    def first(self) -> torch.Tensor:
        """[rows] where among the keys a document begins."""
        return self.window.memory + self.late - self.read

    def lay(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, heads, dim] -> [rows, segments * segment, heads, dim], a segment at least."""
        x = x if self.aligned is None else self.aligned.unpack(x)
        missing = -x.shape[1] % self.window.segment if x.shape[1] else self.window.segment
        return F.pad(x, (0, 0, 0, 0, 0, missing))

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, : self.shape[1]] if self.aligned is None else self.aligned.repack(rows, *self.shape)

    def keep(self, of_rows: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
        """[rows, ...] -> [batch, ...] of the last document of each row of the batch; where there is none, what was
        `held`."""
        if self.aligned is None:
            return of_rows
        if held is None:
            held = of_rows.new_zeros(self.shape[0], *of_rows.shape[1:])
        last = self.aligned.last
        return held.to(of_rows.dtype).index_put((self.aligned.batch_row[last],), of_rows[last])

    def lay_keys(self, pair: Projected, state: SegmentState | None) -> Projected:
        """The same of keys and values, with the memory of each row before them: [rows, memory + ...]."""
        held = (None, None) if state is None else state[:2]
        return tuple(self.after_memory(self.lay(x), before) for x, before in zip(pair, held, strict=True))

    def after_memory(self, rows: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
        """`rows` with the memory before them."""
        rows = F.pad(rows, (0, 0, 0, 0, self.window.memory, 0))
        return rows if held is None else self.with_memory(rows, held)

    def with_memory(self, rows: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """`rows` with what a state has `held` in place of what lies before the tokens."""
        span, size = self.window.span, held.shape[1]
        slot = torch.arange(span, device=held.device)
        source = slot - (self.window.memory + self.late)[:, None] + size
        there = (source >= 0) & (source < size) & self.continued[:, None]
        index = source.clamp(0, size - 1)[..., None, None].expand(-1, -1, *held.shape[2:])
        held = held[self.aligned.batch_row].gather(1, index).to(rows.dtype)
        return torch.cat((torch.where(there[..., None, None], held, rows[:, :span]), rows[:, span:]), dim=1)


def find_rows(like: torch.Tensor, documents, state: SegmentState | None, window: Window) -> SegmentRows:
    """The rows of a batch `like` [batch, length, ...]."""
    shape = like.shape[:2]
    if documents is None and state is None:
        none = torch.zeros(1, dtype=torch.long, device=like.device)
        return SegmentRows(window, shape, None, none, none.bool())
    number, _ = places(documents, like, None)
    found = find_documents(number)
    continued = found.first & (number.flatten()[found.token[found.place == 0]] == 1)
    read = torch.zeros_like(found.lengths) if state is None else state.read[found.batch_row] * continued
    late = read % window.segment
    aligned = found._replace(place=found.place + late[found.row], lengths=found.lengths + late)
    return SegmentRows(window, shape, aligned, read, continued)
