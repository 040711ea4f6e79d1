"""Attention to one's own segment and to a memory before it, by content and by distance (Dai et al., 2019,
arXiv:1901.02860, section 3).

    score(i, j) = content_i key_j + distance_i relative_(i - j)          out_i = softmax over visible j of score value_j

with content = query + u and distance = query + v, two biases that all tokens share: together the paper's four terms.
`Window` says which keys are visible. Places are counted over the real tokens of a document.

Shapes: content, distance, key, value [batch, length, heads, dim]; relative [span, heads, dim] of the distances from 0
on, as many as keys that the queries of a segment see; `still`, keys and values as numbers alone, of which no gradient
reaches the tokens: they take the place of `key` and `value` where these are of an earlier segment (None: they are no
others); `slots`, a compressed memory that the memory follows as if they were one (Rae et al., 2019, arXiv:1911.05507).
documents [batch, length] as in `documents.py`; a state belongs to document 1.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .compressed_memory import Slots
from .segment_rows import (
    Memory,
    Projected,
    SegmentState,
    Window,
    find_rows,
    joined,
    next_state,
    places,
    with_held,
)

QUERIES = 256  # that are compared at once with the keys that any of them sees
ROOM = 2**20  # scores that are written down at once, where more than one segment would fit: 4 MiB in float32


def dense_segment_attention(
    content,
    distance,
    key,
    value,
    relative,
    window: Window,
    *,
    still: Projected | None = None,
    slots: Slots | None = None,
    documents=None,
    initial_state: SegmentState | None = None,
    output_final_state: bool = False,
    dropout: float = 0.0,
    live: Projected | None = None,
):
    """The definition above, all pairs at once. The reference for tests, for a step, and for less than a segment.

    `live`: what the state holds with keys and values behind it, where the caller has put them together."""
    number, place = places(documents, content, initial_state)
    key_number, key_place = with_held(number, place, None if initial_state is None else initial_state.read, window)
    visible = (key_number[:, None] == number[:, :, None]) & window.shows(place[:, :, None], key_place[:, None])
    away = place[:, :, None] - key_place[:, None]
    segment, key_segment = (x.div(window.segment, rounding_mode="floor") for x in (place, key_place))
    now = segment[:, :, None] == key_segment[:, None]
    live = joined(initial_state, (key, value)) if live is None else live
    state = next_state(live, window, documents, initial_state) if output_final_state else None
    before = live if still is None else joined(initial_state, still)
    if slots is not None:
        older = slots.pair
        seen, far = slots.seen_from(place, number == 1, window)
        visible, away = torch.cat((seen, visible), dim=-1), torch.cat((far, away), dim=-1)
    scale, now = content.shape[-1] ** -0.5, now[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", content * scale, live[0])
    if still is not None:
        scores = torch.where(now, scores, torch.einsum("bqhd,bkhd->bhqk", content * scale, before[0]))
    if slots is not None:
        scores = torch.cat((torch.einsum("bqhd,bkhd->bhqk", content * scale, older[0]), scores), dim=-1)
    by_distance = torch.einsum("bqhd,rhd->bhqr", distance * scale, relative[: scores.shape[-1]])
    away = away.clamp(0, by_distance.shape[-1] - 1)[:, None].expand_as(scores)
    scores = (scores + by_distance.gather(-1, away)).masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    weights = F.dropout(wide_softmax(scores).to(live[1].dtype), dropout, dropout > 0)
    output = 0.0
    if slots is not None:
        of_slots, weights = weights.split((older[1].shape[1], live[1].shape[1]), dim=-1)
        output = torch.einsum("bhqk,bkhd->bqhd", of_slots, older[1])
    if still is None:
        return output + torch.einsum("bhqk,bkhd->bqhd", weights, live[1]), state
    output = output + torch.einsum("bhqk,bkhd->bqhd", weights * now, live[1])
    return output + torch.einsum("bhqk,bkhd->bqhd", weights * ~now, before[1]), state


def block_segment_attention(
    content,
    distance,
    key,
    value,
    relative,
    window: Window,
    *,
    still: Projected | None = None,
    slots: Slots | None = None,
    documents=None,
    initial_state: SegmentState | None = None,
    output_final_state: bool = False,
    dropout: float = 0.0,
):
    """The same answer, segments side by side: each is compared with its memory and itself."""
    if content.shape[1] <= window.segment and (slots is None or documents is None):
        told = {"still": still, "slots": slots, "documents": documents, "initial_state": initial_state}
        told |= {"output_final_state": output_final_state, "dropout": dropout}
        return dense_segment_attention(content, distance, key, value, relative, window, **told)
    rows = find_rows(content, documents, initial_state, window)
    queries = [rows.lay(x) for x in (content, distance)]
    live = rows.lay_keys((key, value), initial_state)
    held = live if still is None else rows.lay_keys(still, initial_state)
    fresh = initial_state is None
    before = [] if slots is None else [slots.memory(fresh)]
    before.append(Memory(held, window, rows.first, window.memory, fresh))
    own = tuple(x[:, window.memory :] for x in live)
    output = rows.back(attend_blocks(*queries, own, before, relative, window, dropout))
    if not output_final_state:
        return output, None
    return output, next_state(joined(initial_state, (key, value)), window, documents, initial_state)


def attend_blocks(content, distance, own: Projected, before: list[Memory], relative, window: Window, dropout: float):
    """Queries, and their own keys and values, [rows, length, heads, dim] of whole segments, the first of which begins a
    segment; and what lies before, the farthest first."""
    rows, length, heads, dim = content.shape
    segment, span = window.segment, len(relative)
    # Distances from the largest down to 0, and to -1, which is never seen
    relative = F.pad(relative.flip(0), (0, 0, 0, 0, 0, 1)).permute(1, 2, 0) * dim**-0.5
    content, distance = (in_segments(x, segment) for x in (content, distance))
    pairs = [memory.blocks(length // segment) for memory in before]
    keys, values = zip(*pairs, tuple(in_segments(x, segment) for x in own), strict=True)
    count = max(1, ROOM // max(1, rows * heads * min(segment, QUERIES) * span))
    cut = (x.split(count, dim=2) for x in (content, distance, *keys, *values))
    outputs = []
    for number, (asked, beside, *seen) in enumerate(zip(*cut, strict=True)):
        pair = torch.cat(seen[: len(keys)], dim=-2), torch.cat(seen[len(keys) :], dim=-2)
        outputs.append(attend_segments(asked, beside, *pair, relative, number * count, before, window, dropout))
    return torch.cat(outputs, dim=2).permute(1, 2, 3, 0, 4).flatten(1, 2)


def attend_segments(
    content, distance, key, value, relative, start: int, before: list[Memory], window: Window, dropout: float
):
    """Of segments from `start` on, [heads, rows, segments, ...]: queries that are taken at once, with the keys that one
    of them sees, and what hides the keys that others see."""
    reach = sum(memory.window.memory for memory in before)
    unseen = sum(memory.unseen(start + content.shape[2] - 1) for memory in before)
    outputs, asked = [], zip(*(x.split(QUERIES, dim=-2) for x in (content, distance)), strict=True)
    for begin, queries in zip(range(0, window.segment, QUERIES), asked, strict=True):
        least = max(unseen, begin) if window.same_length else unseen
        shown = slice(least, reach + begin + queries[0].shape[-2])
        hidden = functools.partial(hide, window=window, before=before, start=start, begin=begin, least=least)
        seen = (x[..., shown, :] for x in (key, value))
        outputs.append(attend(*queries, *seen, relative, hidden, dropout))
    return torch.cat(outputs, dim=-2)


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
        tokens = content.flatten(0, 2), key.flatten(0, 1).transpose(-1, -2)
        scores = torch.baddbmm(scores.flatten(0, 1), *tokens, alpha=dim**-0.5)
        with torch.no_grad():  # the gradient of what is hidden is zero already
            hidden(scores.view(*many, queries, keys))
        weights = F.dropout(wide_softmax(scores).to(value.dtype), dropout, dropout > 0)
        return (weights @ value.flatten(0, 1)).view(*many, queries, dim)
    hidden(scores.unflatten(1, many[1:]))
    output = F.scaled_dot_product_attention(content.flatten(1, 2), key, value, attn_mask=scores)
    return output.unflatten(1, many[1:])


def hide(scores: torch.Tensor, window: Window, before: list[Memory], start: int, begin: int, least: int) -> None:
    """Overwrite the scores [heads, rows, segments, queries, keys] of what is not visible. `start`: the number of the
    first segment; `begin`: the first query in a segment; `least`: how many of the first keys were left out."""
    *_, segments, queries, keys = scores.shape
    lowest = torch.finfo(scores.dtype).min
    scores[..., keys - queries :] += scores.new_full((queries, queries), -torch.inf).triu_(1)
    if window.same_length and least < begin + queries:
        ones = scores.new_ones(queries, queries, dtype=torch.bool)
        scores[..., :queries].masked_fill_(ones.tril(begin - least - 1), lowest)
    column = 0
    for memory in before:
        step, reach = memory.window.segment, memory.window.memory
        left_out, least = min(least, reach), max(0, least - reach)
        slot = torch.arange(start * step + left_out, start * step + reach, device=scores.device)
        if len(slot) and start * step + left_out < memory.bound:
            slot = slot + step * torch.arange(segments, device=scores.device)[:, None]
            missing = (slot < memory.first[:, None, None])[None, :, :, None]
            scores[..., column : column + reach - left_out].masked_fill_(missing, lowest)
        column += reach - left_out


def in_segments(x: torch.Tensor, segment: int) -> torch.Tensor:
    """[rows, length, heads, dim] -> [heads, rows, segments, segment, dim]."""
    return x.unflatten(1, (-1, segment)).permute(3, 0, 1, 2, 4)


def wide_softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
