"""Attention to one's own segment and to a memory before it, by content and by distance (Dai et al., 2019,
arXiv:1901.02860, section 3).

    score(i, j) = content_i key_j + distance_i relative_(i - j)          out_i = softmax over visible j of score value_j

with content = query + u and distance = query + v, two biases that all tokens share: together the paper's four terms.
`Window` says which keys are visible. Places are counted over the real tokens of a document.

Shapes: content, distance, key, value [batch, length, heads, dim]; relative [window.span, heads, dim] of the distances
from 0 on; `still`, keys and values as numbers alone, of which no gradient reaches the tokens: they take the place of
`key` and `value` where these are of an earlier segment (None: they are no others). documents [batch, length] as in
`documents.py`; a state belongs to document 1.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .documents import Unpacked, document_runs, find_documents

QUERIES = 256  # that are compared at once with the keys that any of them sees
ROOM = 2**20  # scores that are written down at once, where more than one segment would fit: 4 MiB in float32


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

    def shows(self, query_place: torch.Tensor, key_place: torch.Tensor) -> torch.Tensor:
        """Whether tokens at one place see those at the other, in the same document."""
        first = query_place if self.same_length else query_place - query_place % self.segment
        return (key_place >= (first - self.memory).clamp(min=0)) & (key_place <= query_place)


class SegmentState(NamedTuple):
    """The last tokens of the last document, right-aligned, zero where there are fewer; and how many it has had."""

    key: torch.Tensor  # [batch, window.held, heads, dim]
    value: torch.Tensor
    read: torch.Tensor  # [batch]


Projected = tuple[torch.Tensor, torch.Tensor]  # keys and values


def dense_segment_attention(
    content,
    distance,
    key,
    value,
    relative,
    window: Window,
    *,
    still: Projected | None = None,
    documents=None,
    initial_state: SegmentState | None = None,
    output_final_state: bool = False,
    dropout: float = 0.0,
):
    """The definition above, all pairs at once. The reference for tests, for a step, and for less than a segment."""
    number, place = places(documents, content, initial_state)
    key_number, key_place = with_held(number, place, None if initial_state is None else initial_state.read, window)
    visible = (key_number[:, None] == number[:, :, None]) & window.shows(place[:, :, None], key_place[:, None])
    visible = visible[:, None]
    away = (place[:, :, None] - key_place[:, None]).clamp(0, window.span - 1)[:, None]
    keys, values = joined(initial_state, (key, value))
    scale = content.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", content * scale, keys)
    if still is not None:
        segment, key_segment = (x.div(window.segment, rounding_mode="floor") for x in (place, key_place))
        live = (segment[:, :, None] == key_segment[:, None])[:, None]
        still_keys, still_values = joined(initial_state, still)
        scores = torch.where(live, scores, torch.einsum("bqhd,bkhd->bhqk", content * scale, still_keys))
    by_distance = torch.einsum("bqhd,rhd->bhqr", distance * scale, relative)
    scores = scores + by_distance.gather(-1, away.expand(-1, scores.shape[1], -1, -1))
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = F.dropout(wide_softmax(scores).to(values.dtype), dropout, dropout > 0)
    if still is None:
        output = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    else:
        output = torch.einsum("bhqk,bkhd->bqhd", weights * live, values)
        output = output + torch.einsum("bhqk,bkhd->bqhd", weights * ~live, still_values)
    told = None if documents is None else number
    state = remember(keys, values, window, told, initial_state) if output_final_state else None
    return output, state


def block_segment_attention(
    content,
    distance,
    key,
    value,
    relative,
    window: Window,
    *,
    still: Projected | None = None,
    documents=None,
    initial_state: SegmentState | None = None,
    output_final_state: bool = False,
    dropout: float = 0.0,
):
    """The same answer, segments side by side: each is compared with its memory and itself."""
    told = {"documents": documents, "initial_state": initial_state}
    length = content.shape[1]
    if length <= window.segment:
        given = (content, distance, key, value, relative, window)
        return dense_segment_attention(
            *given, still=still, output_final_state=output_final_state, dropout=dropout, **told
        )
    live, still, number = (key, value), still or (key, value), None
    if documents is None and initial_state is None:
        aligned, first = None, torch.full((1,), window.memory, device=content.device)
    else:
        number, _ = places(documents, content, None)
        aligned, read, continued = align(number, initial_state, window)
        first = window.memory + read % window.segment - read
    queries = [in_whole_segments(x, aligned, window) for x in (content, distance)]
    live, still = (
        [F.pad(in_whole_segments(x, aligned, window), (0, 0, 0, 0, window.memory, 0)) for x in pair]
        for pair in (live, still)
    )
    if initial_state is not None:
        held = [x[aligned.batch_row] for x in (initial_state.key, initial_state.value)]
        live, still = (
            [with_memory(x, old, read, continued, window) for x, old in zip(pair, held, strict=True)]
            for pair in (live, still)
        )
    output = attend_blocks(*queries, live, still, first, relative, window, dropout)
    output = output[:, :length] if aligned is None else aligned.repack(output, *number.shape)
    if not output_final_state:
        return output, None
    told = None if documents is None else number
    return output, remember(*joined(initial_state, (key, value)), window, told, initial_state)


def attend_blocks(content, distance, live, still, first, relative, window: Window, dropout: float):
    """Queries [rows, length, heads, dim] of whole segments, the first of which begins a segment; two pairs of keys and
    values [rows, memory + length, heads, dim]; `first` [rows or 1]: where among these the document begins."""
    rows, length, heads, dim = content.shape
    segment, memory, span = window.segment, window.memory, window.span
    # Distances from the largest down to 0, and to -1, which is never seen
    relative = F.pad(relative.flip(0), (0, 0, 0, 0, 0, 1)).permute(1, 2, 0)
    content, distance = (in_segments(x * dim**-0.5, segment) for x in (content, distance))
    own = [in_segments(x[:, memory:], segment) for x in live]
    before = [x[:, :-segment].permute(2, 0, 1, 3).unfold(2, memory, segment).transpose(-1, -2) for x in still]
    count = max(1, ROOM // (rows * heads * min(segment, QUERIES) * span))
    outputs = []
    for start in range(0, length // segment, count):
        part = slice(start, start + count)
        seen = [torch.cat((old[:, :, part], now[:, :, part]), -2) for old, now in zip(before, own, strict=True)]
        asked = content[:, :, part], distance[:, :, part]
        pieces = [
            attend(*(x[:, :, :, here] for x in asked), *(x[:, :, :, shown] for x in seen), relative, hidden, dropout)
            for here, shown, hidden in pieces_of_a_segment(window, start, first)
        ]
        outputs.append(torch.cat(pieces, dim=-2))
    return torch.cat(outputs, dim=2).permute(1, 2, 3, 0, 4).flatten(1, 2)


def pieces_of_a_segment(window: Window, start: int, first: torch.Tensor) -> Iterator[tuple[slice, slice, Callable]]:
    """Queries that are taken at once, the keys that one of them sees, and what hides the keys that others see."""
    for begin in range(0, window.segment, QUERIES):
        end = min(begin + QUERIES, window.segment)
        least = begin if window.same_length else 0
        hidden = functools.partial(hide, window=window, begin=start * window.segment + least, first=first)
        yield slice(begin, end), slice(least, window.memory + end), hidden


def attend(content, distance, key, value, relative, hidden: Callable, dropout: float) -> torch.Tensor:
    """Queries [heads, rows, segments, queries, dim], of which the last stands where the last key does."""
    *many, queries, dim = content.shape
    keys = key.shape[-2]
    key, value = key.flatten(1, 2), value.flatten(1, 2)
    by_distance = distance.flatten(1, 3) @ relative[..., -keys - 1 :]
    # One column too many, so that each row begins a place earlier: the shift by distance is a view
    by_distance = by_distance.view(many[0], -1, queries * (keys + 1))[..., queries - 1 : -1]
    scores = by_distance.unflatten(-1, (queries, keys))
    if scores.requires_grad or dropout:
        scores = torch.baddbmm(scores.flatten(0, 1), content.flatten(0, 2), key.flatten(0, 1).transpose(-1, -2))
        with torch.no_grad():  # the gradient of what is hidden is zero already
            hidden(scores.view(*many, queries, keys))
        weights = F.dropout(wide_softmax(scores).to(value.dtype), dropout, dropout > 0)
        return (weights @ value.flatten(0, 1)).view(*many, queries, dim)
    hidden(scores.unflatten(1, many[1:]))
    output = F.scaled_dot_product_attention(content.flatten(1, 2), key, value, attn_mask=scores, scale=1.0)
    return output.unflatten(1, many[1:])


def hide(scores: torch.Tensor, window: Window, begin: int, first: torch.Tensor) -> None:
    """Overwrite the scores [heads, rows, segments, queries, keys] of what is not visible. `begin`: where the first key
    of the first segment stands in its row."""
    *_, segments, queries, keys = scores.shape
    least, ones = torch.finfo(scores.dtype).min, scores.new_ones(queries, queries, dtype=torch.bool)
    scores[..., keys - queries :].masked_fill_(ones.triu(1), least)
    if window.same_length:
        scores[..., :queries].masked_fill_(ones.tril(-1), least)
    if begin < window.memory:
        slot = torch.arange(begin, begin + keys - queries, device=scores.device)
        slot = slot + window.segment * torch.arange(segments, device=scores.device)[:, None]
        scores[..., : keys - queries].masked_fill_((slot < first[:, None, None])[None, :, :, None], least)


def in_segments(x: torch.Tensor, segment: int) -> torch.Tensor:
    """[rows, length, heads, dim] -> [heads, rows, segments, segment, dim]."""
    return x.unflatten(1, (-1, segment)).permute(3, 0, 1, 2, 4)


def wide_softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


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
    return tuple(torch.cat((held.to(x.dtype), x), dim=1) for held, x in zip(state[:2], after, strict=True))


def remember(keys, values, window: Window, number, state: SegmentState | None) -> SegmentState:
    """The state after the tokens of documents `number` (None: one, all real), of what `joined` makes of them."""
    keys, values = keys.detach(), values.detach()
    if state is None:
        room = (0, 0, 0, 0, window.held, 0)
        read = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
        state, keys, values = SegmentState(keys, values, read), F.pad(keys, room), F.pad(values, room)
    length = keys.shape[1] - window.held
    if number is None:
        return SegmentState(keys[:, length:], values[:, length:], state.read + length)
    last = number.max(dim=1, keepdim=True).values.clamp(min=1)
    read = torch.where(last[:, 0] == 1, state.read, 0) + (number == last).sum(1)
    member = with_held(number, number, state.read, window)[0] == last
    order = member.to(torch.uint8).argsort(dim=1, stable=True)[:, -window.held :]
    kept = member.gather(1, order)[..., None, None]
    index = order[..., None, None].expand(-1, -1, *keys.shape[2:])
    return SegmentState(keys.gather(1, index) * kept, values.gather(1, index) * kept, read)


def align(number, state: SegmentState | None, window: Window) -> tuple[Unpacked, torch.Tensor, torch.Tensor]:
    """Documents as rows that begin where a segment does; for each, how many of its tokens a state has read, and
    whether it is the one that the state is of."""
    found = find_documents(number)
    starts = number.flatten()[found.token[found.place == 0]]
    continued = found.first & (starts == 1)
    read = torch.zeros_like(found.lengths) if state is None else state.read[found.batch_row] * continued
    late = read % window.segment
    return found._replace(place=found.place + late[found.row], lengths=found.lengths + late), read, continued


def in_whole_segments(x: torch.Tensor, aligned: Unpacked | None, window: Window) -> torch.Tensor:
    """[batch, length, ...] -> [rows, whole segments, ...]."""
    x = x if aligned is None else aligned.unpack(x)
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % window.segment))


def with_memory(memories, held, read, continued, window: Window) -> torch.Tensor:
    """`memories` [rows, memory + length, heads, dim] with what the state has `held` of each row before its tokens."""
    slot = torch.arange(window.span, device=held.device)
    source = slot - (window.memory + read % window.segment)[:, None] + window.held
    there = (source >= 0) & (source < window.held) & continued[:, None]
    index = source.clamp(0, window.held - 1)[..., None, None].expand(-1, -1, *held.shape[2:])
    begun = torch.where(there[..., None, None], held.gather(1, index).to(memories.dtype), memories[:, : window.span])
    return torch.cat((begun, memories[:, window.span :]), dim=1)
