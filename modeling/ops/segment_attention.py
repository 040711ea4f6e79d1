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

import torch
import torch.nn.functional as F

from .segment_rows import Projected, SegmentState, Window, find_rows, joined, places, remember, with_held

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
    keys, values = joined(initial_state, (key, value))
    farthest = min(window.span, keys.shape[1]) - 1
    away = (place[:, :, None] - key_place[:, None]).clamp(0, farthest)[:, None]
    scale = content.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", content * scale, keys)
    if still is not None:
        segment, key_segment = (x.div(window.segment, rounding_mode="floor") for x in (place, key_place))
        live = (segment[:, :, None] == key_segment[:, None])[:, None]
        still_keys, still_values = joined(initial_state, still)
        scores = torch.where(live, scores, torch.einsum("bqhd,bkhd->bhqk", content * scale, still_keys))
    by_distance = torch.einsum("bqhd,rhd->bhqr", distance * scale, relative[: keys.shape[1]])
    scores = scores + by_distance.gather(-1, away.expand(-1, scores.shape[1], -1, -1))
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = F.dropout(wide_softmax(scores).to(values.dtype), dropout, dropout > 0)
    if still is None:
        output = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    else:
        output = torch.einsum("bhqk,bkhd->bqhd", weights * live, values)
        output = output + torch.einsum("bhqk,bkhd->bqhd", weights * ~live, still_values)
    state = remember(keys, values, window, documents, initial_state) if output_final_state else None
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
    if content.shape[1] <= window.segment:
        told = {"still": still, "documents": documents, "initial_state": initial_state}
        told |= {"output_final_state": output_final_state, "dropout": dropout}
        return dense_segment_attention(content, distance, key, value, relative, window, **told)
    rows = find_rows(content, documents, initial_state, window)
    queries = [rows.lay(x) for x in (content, distance)]
    live = rows.lay_keys((key, value), initial_state)
    held = live if still is None else rows.lay_keys(still, initial_state)
    output = rows.back(attend_blocks(*queries, live, held, rows.first, relative, window, dropout))
    if not output_final_state:
        return output, None
    return output, remember(*joined(initial_state, (key, value)), window, documents, initial_state)


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
